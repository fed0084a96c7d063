"""A resumed run goes on with the settings, the data and the base checkpoint that it began with."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from blip_ft.arguments import BlipTrainingArguments, DataArguments, ModelArguments, RetrievalArguments, Settings
from blip_ft.data.streaming import StreamedRows
from blip_ft.data.tables import CaptionRows
from blip_ft.results.files import decided_by_main
from blip_ft.training.checkpoints import explain_unreadable

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


def settle_settings(
    checkpoint: str | None,
    args: BlipTrainingArguments,
    parts: Sequence[Settings],
    rows: dict[str, Dataset | CaptionRows | StreamedRows],
    meta_model: torch.nn.Module,
) -> dict[str, Any]:
    """What a run's results depend on, to be kept in each of its checkpoints; those of checkpoint must be the same.

    Args:
        checkpoint: folder to resume from, if any.
        parts: the recipe's other argument dataclasses, ModelArguments and DataArguments among them.
        rows: "train" and "eval".
        meta_model: the model without its weights.
    Raises: ValueError, in all processes, that lists the differences, unless allow_changed_settings is on.
    """

    def settle() -> dict[str, Any]:
        # as they are read again
        settings = json.loads(json.dumps(_settings_of(args, parts, rows, meta_model), default=str))
        if checkpoint:
            _require_same_settings(Path(checkpoint), settings, args.allow_changed_settings)
        return settings

    return decided_by_main(settle)


def _settings_of(
    args: BlipTrainingArguments,
    parts: Sequence[Settings],
    rows: dict[str, Dataset | CaptionRows | StreamedRows],
    meta_model: torch.nn.Module,
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
    settings["base_checkpoint"] = _fingerprint_of_checkpoint(model_args, meta_model)
    for name, part in rows.items():
        is_stream = isinstance(part, StreamedRows)
        settings[f"rows_to_{name}"] = f"a stream of {data_args.label}" if is_stream else _fingerprint_of_rows(part)
    return settings


def _fingerprint_of_rows(rows: Dataset | CaptionRows) -> str:
    """Of their number and of all columns but the image itself, whose id is among them."""
    table = rows.images if isinstance(rows, CaptionRows) else rows
    digest = hashlib.sha1()
    for batch in table.remove_columns("image").with_format("arrow").iter(10_000):
        digest.update(json.dumps(batch.to_pydict()).encode())
    return f"{len(rows):,} rows, {digest.hexdigest()[:12]}"


def _fingerprint_of_checkpoint(args: ModelArguments, meta_model: torch.nn.Module) -> str:
    """The Hub's commit; of a folder, the content of weights, configuration and vocabulary."""
    if args.hub_id:
        return f"{args.hub_id} {getattr(meta_model.config, '_commit_hash', None) or args.model_revision}"
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
