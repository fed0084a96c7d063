"""Checkpoints: written completely or skipped, kept or removed, and what to do if one cannot be read."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import distributed
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

MARKER = "complete.json"

BUILDING = "_saving"  # the Trainer uploads nothing that begins with _


def finish_checkpoint(built: Path, final: Path) -> None:
    """Mark a written checkpoint as complete, and rename it to `final`, which is replaced if it exists."""
    sizes = {str(file.relative_to(built)): file.stat().st_size for file in built.rglob("*") if file.is_file()}
    (built / MARKER).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    if final.exists():
        final.rename(built.parent / "replaced")
    built.rename(final)
    shutil.rmtree(built.parent, ignore_errors=True)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint. Incomplete ones are skipped with a warning."""
    steps = _steps_of(output_dir) | _steps_of(output_dir / BUILDING)
    for path in sorted(steps, key=lambda path: -steps[path]):
        problem = "was still being written" if path.parent.name == BUILDING else what_is_missing(path)
        if problem is None:
            return path
        logger.warning("%s is skipped: %s.", path, problem)
    return None


def remove_old_checkpoints(newest: Path, best: str | None, limit: int | None) -> None:
    """Keep `limit` checkpoints in the folder of newest, always including newest and the best.

    Their order is by step, because clocks are sometimes set back. Steps after that of newest are removed first: they
    are older than the run, which was resumed at an earlier step. transformers' rotate_checkpoints would take the
    highest step for the newest, and delete the checkpoint that was just written.
    """
    steps = _steps_of(newest.parent)
    kept = {newest.name, Path(best or newest).name}
    old = [path for path in steps if path.name not in kept]
    old.sort(key=lambda path: (steps[path] < steps[newest], steps[path]))
    for path in old[: max(0, len(steps) - limit)] if limit and limit > 0 else []:
        shutil.rmtree(path, ignore_errors=True)


def _steps_of(folder: Path) -> dict[Path, int]:
    """The checkpoints in a folder, complete or not."""
    steps = {path: path.name.rpartition("-")[2] for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()}
    return {path: int(step) for path, step in steps.items() if step.isdecimal()}


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint is incomplete; None if it is complete."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no {MARKER}, which is written last"
    if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
        return f"its {MARKER} does not list files and their sizes"
    for name, size in sizes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} bytes of {size}"
    return None


def how_to_resume(output_dir: Path) -> str:
    """Sentences for the end of a message: the last complete checkpoint, and the flags to resume from it."""
    last = newest_checkpoint(output_dir)
    kept = f"{last} is the last complete checkpoint" if last else "No checkpoint had been written"
    return f"{kept}. Resume with: --output_dir {output_dir} --resume_from_checkpoint last"


def require_readable_state(checkpoint: Path) -> None:
    """Raises: ValueError if a file that a resumed run needs cannot be read.

    Tensors are memory-mapped, so the check takes milliseconds. A pickle cannot run code: weights_only allows only
    tensors, numbers and other plain types.
    """
    for file in sorted(checkpoint.iterdir()):
        with explain_unreadable(file), safe_globals():
            if file.name == TRAINER_STATE_NAME:
                state = TrainerState.load_from_json(str(file))
                if not isinstance(state.global_step, int):
                    raise ValueError(f"global_step must be a number, found {state.global_step!r}")
            elif file.suffix == ".safetensors":
                safe_open(file, "pt").keys()
            elif file.suffix in (".pt", ".pth"):
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)


@contextmanager
def explain_unreadable(path: Path | str) -> Iterator[None]:
    """Turn any exception that a reader raises on damaged or hostile content into one ValueError.

    path: a file, or the checkpoint that contains it.
    """
    try:
        yield
    except (OSError, torch.OutOfMemoryError, distributed.DistError):
        raise
    except Exception as error:
        if "gloo" in str(error):  # another process has ended, see explain_lost_process
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read: it is damaged, or was not written by this program. {said}\nResume from another "
            "checkpoint: --resume_from_checkpoint CHECKPOINT"
        ) from error


@contextmanager
def explain_other_run(checkpoint: str | None) -> Iterator[None]:
    """Turn the errors of a checkpoint that does not fit this run's model or optimizer into one ValueError."""
    try:
        yield
    except Exception as error:
        if not any(sign in str(error) for sign in ("size mismatch", "parameter group", "Missing key")):
            with explain_unreadable(checkpoint):
                raise
        raise ValueError(
            f"{checkpoint} was saved by a run with another model, --image_size, --freeze, --lora_target_modules or "
            f"--optim. Resume with the settings of that run, or start a new run in another output_dir.\n{error}"
        ) from error


@contextmanager
def explain_full_disk(output_dir: Path) -> Iterator[None]:
    """Turn the different errors of torch and safetensors on a full disk into one OSError.

    It names the last complete checkpoint and how to resume from it.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch's writer only reports an unexpected position
        free = shutil.disk_usage(output_dir).free if output_dir.is_dir() else 0
        is_reported = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not is_reported and free > 2**20:
            raise
        shutil.rmtree(output_dir / BUILDING, ignore_errors=True)
        raise OSError(
            f"The disk of {output_dir} is full. Free some space, e.g. with fewer checkpoints: --save_total_limit 1. "
            f"{how_to_resume(output_dir)}"
        ) from error


@contextmanager
def explain_lost_process(output_dir: Path) -> Iterator[None]:
    """Turn the different errors of gloo and NCCL, when another process has ended, into one ConnectionError.

    It names the last complete checkpoint and how to resume from it.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError, which names a line of gloo's source
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError(
            "Another process of this run has ended; see its message, or that of the launcher, for the reason. "
            f"{how_to_resume(output_dir)}\n{str(error).splitlines()[0]}"
        ) from error
