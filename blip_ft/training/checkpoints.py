"""Checkpoints that are whole or are passed over."""

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
    """Mark a written checkpoint as whole, and move it to its name; what stood there is replaced."""
    sizes = {str(file.relative_to(built)): file.stat().st_size for file in built.rglob("*") if file.is_file()}
    (built / MARKER).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    if final.exists():
        final.rename(built.parent / "replaced")
    built.rename(final)
    shutil.rmtree(built.parent, ignore_errors=True)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint; those cut short are named in a warning."""
    steps = _steps_of(output_dir) | _steps_of(output_dir / BUILDING)
    for path in sorted(steps, key=lambda path: -steps[path]):
        problem = "was still being written" if path.parent.name == BUILDING else what_is_missing(path)
        if problem is None:
            return path
        logger.warning("%s is passed over: %s.", path, problem)
    return None


def remove_old_checkpoints(newest: Path, best: str | None, limit: int | None) -> None:
    """Keep `limit` of the checkpoints beside newest, always newest itself and the best.

    By step, for clocks are set back. Later steps than that of newest go first: they are from before it was resumed at
    an earlier one. transformers' rotate_checkpoints would take the highest step for the newest, and delete what has
    just been written.
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
    """Why a checkpoint is not whole; None if it is."""
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
    """Raises: ValueError if a file that a resumed run reads cannot be read.

    Tensors are not read but mapped: it takes milliseconds, before weights are loaded. No pickle can run code, for
    weights_only allows nothing but tensors, numbers and the like.
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
    """What readers raise on broken or hostile content, which can be anything, ends in one message.

    path: a file, or the checkpoint with it. Raises: ValueError.
    """
    try:
        yield
    except (OSError, torch.OutOfMemoryError, distributed.DistError):
        raise
    except Exception as error:
        if "gloo" in str(error):  # a process is lost, see below
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is damaged, or was not written by this program, and cannot be read: {said}\nResume from another "
            "checkpoint: --resume_from_checkpoint CHECKPOINT"
        ) from error


@contextmanager
def explain_full_disk(output_dir: Path) -> Iterator[None]:
    """A full disk, which torch and safetensors report in their own ways, ends in one message.

    Raises: OSError that names the last whole checkpoint and how to go on from it.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch's writer tells of an unexpected position only
        free = shutil.disk_usage(output_dir).free if output_dir.is_dir() else 0
        told = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not told and free > 2**20:
            raise
        shutil.rmtree(output_dir / BUILDING, ignore_errors=True)
        last = newest_checkpoint(output_dir)
        kept = f"{last} is whole" if last else "no checkpoint had been written before"
        raise OSError(
            f"The disk of {output_dir} is full; {kept}. Make room there (fewer checkpoints: --save_total_limit 1), "
            f"then go on with: --output_dir {output_dir} --resume_from_checkpoint last"
        ) from error


@contextmanager
def explain_lost_process(output_dir: Path) -> Iterator[None]:
    """A collective whose other side has ended, which gloo and NCCL report in their own ways, ends in one message.

    Raises: ConnectionError that names the last complete checkpoint and how to resume.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError with the place in its source
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError(
            "Another process of this run has ended; its message, or the launcher's, says why. "
            f"{how_to_resume(output_dir)}\n{str(error).splitlines()[0]}"
        ) from error
