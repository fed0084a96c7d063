"""Checkpoints that are whole or are passed over, and that go on with the settings and data they began with."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch import distributed
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from blip_ft.arguments import BlipTrainingArguments, DataArguments, ModelArguments, RetrievalArguments, Settings
from blip_ft.data_pipeline import CaptionRows, StreamedRows
from blip_ft.outputs import decided_by_main

logger = logging.getLogger(__name__)

SETTINGS_FILE = "run_settings.json"
# Settings that begin so change neither weights nor scores: where and how much is logged, saved, pushed and read ahead,
# on what device, and how memory is saved. Not the evaluation's: it chooses the best checkpoint.
FREE = (
    *("output_dir", "logging_", "log_", "disable_tqdm", "report_to", "run_name", "project", "trackio_", "sample_steps"),
    *("save_", "push_to_hub", "hub_", "resume_from_checkpoint", "restore_callback_states", "enable_jit_checkpoint"),
    *("per_device_eval_batch_size", "eval_on_start", "test_", "do_", "dataloader_", "debug", "skip_", "allow_"),
    *("use_cpu", "local_rank", "ddp_", "full_determinism", "accelerator_config", "torch_compile", "torch_empty_cache"),
    *("gradient_checkpointing", "activation_checkpointing", "cache_image_features", "cache_limit_gb"),
    # check_saved_engine knows which of these cannot go on
    *("fsdp", "deepspeed"),
    # Names of what may have been moved, and what leaves rows out: fingerprints tell what is in them.
    *("model_name_or_path", "model_revision", "dataset_name", "eval_dataset_name", "image_folder"),
    *("questions_file", "annotations_file", "eval_questions_file", "eval_annotations_file"),
    *("check_images", "max_bad_fraction"),
)
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


def settle_settings(
    checkpoint: str | None,
    args: BlipTrainingArguments,
    parts: Sequence[Settings],
    rows: dict[str, Dataset | CaptionRows | StreamedRows],
    outline: torch.nn.Module,
) -> dict[str, Any]:
    """What a run's results depend on, to be kept in each of its checkpoints; those of checkpoint must be the same.

    Args:
        checkpoint: folder to resume from, if any.
        parts: the recipe's other argument dataclasses, ModelArguments and DataArguments among them.
        rows: "train" and "eval".
        outline: the model without its weights.
    Raises: ValueError, in all processes, that lists the differences, unless allow_changed_settings is on.
    """

    def settle() -> dict[str, Any]:
        # as they are read again
        settings = json.loads(json.dumps(_settings_of(args, parts, rows, outline), default=str))
        if checkpoint:
            _require_same_settings(Path(checkpoint), settings, args.allow_changed_settings)
        return settings

    return decided_by_main(settle)


def _settings_of(
    args: BlipTrainingArguments,
    parts: Sequence[Settings],
    rows: dict[str, Dataset | CaptionRows | StreamedRows],
    outline: torch.nn.Module,
) -> dict[str, Any]:
    named = {name: value for part in parts for name, value in asdict(part).items()} | args.to_dict()
    settings = {name: value for name, value in named.items() if not name.startswith(FREE)}
    settings["cache_dtype"] = args.cache_dtype if args.cache_image_features else "fp32"
    settings["processes"] = args.world_size
    if named["streaming"]:
        settings["dataloader_num_workers"] = args.dataloader_num_workers  # each draws from rows of its own
    elif not any(isinstance(part, RetrievalArguments) for part in parts):
        # a step of as many rows is the same, however they are shared out
        for name in ("processes", "per_device_train_batch_size", "gradient_accumulation_steps"):
            del settings[name]
        settings["rows_a_step"] = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    (model_args,) = (part for part in parts if isinstance(part, ModelArguments))
    (data_args,) = (part for part in parts if isinstance(part, DataArguments))
    settings["base_checkpoint"] = _fingerprint_of_checkpoint(model_args, outline)
    for name, part in rows.items():
        is_stream = isinstance(part, StreamedRows)
        settings[f"rows_to_{name}"] = f"a stream of {data_args.label}" if is_stream else _fingerprint_of_rows(part)
    return settings


def _fingerprint_of_rows(rows: Dataset | CaptionRows) -> str:
    """Of their number and of all columns but the image itself, whose id is among them."""
    table = rows.pictures if isinstance(rows, CaptionRows) else rows
    digest = hashlib.sha1()
    for batch in table.remove_columns("image").with_format("arrow").iter(10_000):
        digest.update(json.dumps(batch.to_pydict()).encode())
    return f"{len(rows):,} rows, {digest.hexdigest()[:12]}"


def _fingerprint_of_checkpoint(args: ModelArguments, outline: torch.nn.Module) -> str:
    """The Hub's commit; of a folder, the content of weights, configuration and vocabulary."""
    if args.hub_id:
        return f"{args.hub_id} {getattr(outline.config, '_commit_hash', None) or args.model_revision}"
    folder, digest = Path(args.model_name_or_path), hashlib.sha1()
    if args.model_name_or_path == "demo":
        return "demo"
    names = ("config.json", "adapter_config.json", "tokenizer.json", "vocab.txt", "*.safetensors", "pytorch_model*.bin")
    for file in sorted(file for name in names for file in folder.glob(name)):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:12]


def _require_same_settings(checkpoint: Path, settings: dict[str, Any], allow: bool) -> None:
    file = checkpoint / SETTINGS_FILE
    if not file.exists():
        logger.warning("%s does not say with which settings it was saved; they are not compared.", checkpoint)
        return
    with explain_unreadable(file):
        saved = dict(json.loads(file.read_text(encoding="utf-8")).items())
    changed = [
        f"  {name}: {json.dumps(saved[name]) if name in saved else 'not saved'} -> {json.dumps(value)}"
        for name, value in settings.items()
        if name not in saved or saved[name] != value
    ]
    if not changed:
        return
    found = f"{checkpoint} was saved by a run with other settings (saved -> now):\n" + "\n".join(changed)
    if not allow:
        raise ValueError(
            f"{found}\nThe result would be that of neither run. Resume with the saved settings, start a new run in "
            "another output_dir, or accept the difference with --allow_changed_settings."
        )
    logger.warning("%s\nThey are accepted, as --allow_changed_settings says.", found)


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
        last = newest_checkpoint(output_dir)
        kept = f"{last} is complete" if last else "No checkpoint had been written"
        raise ConnectionError(
            f"Another process of this run has ended; its message, or the launcher's, says why. {kept}. Resume with: "
            f"--output_dir {output_dir} --resume_from_checkpoint last\n{str(error).splitlines()[0]}"
        ) from error
