"""Check that a run resumes with the settings, the data and the base checkpoint that it started with."""

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
from blip_ft.modeling.checkpoint_files import ADAPTER_FILE
from blip_ft.results.files import decided_by_main
from blip_ft.training.checkpoints import explain_unreadable

logger = logging.getLogger(__name__)

SETTINGS_FILE = "run_settings.json"

# Settings that begin like this change neither weights nor scores: logging, saving, pushing, prefetching, the device,
# and ways to save memory. Settings of the evaluation are not free: it chooses the best checkpoint.
FREE = (
    *("output_dir", "logging_", "log_", "disable_tqdm", "report_to", "run_name", "project", "trackio_", "sample_steps"),
    *("save_", "push_to_hub", "hub_", "resume_from_checkpoint", "restore_callback_states", "enable_jit_checkpoint"),
    *("per_device_eval_batch_size", "eval_on_start", "test_", "do_", "dataloader_", "debug", "skip_", "allow_"),
    *("use_cpu", "local_rank", "ddp_", "full_determinism", "accelerator_config", "torch_compile", "torch_empty_cache"),
    *("gradient_checkpointing", "activation_checkpointing", "cache_image_features", "cache_limit_gb"),
    # check_saved_engine refuses engines that cannot resume
    *("fsdp", "deepspeed"),
    # Data and checkpoints may be moved, and some settings only remove rows: fingerprints compare the content.
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
    """The settings that determine the results of a run. They are saved in each of its checkpoints.

    Args:
        checkpoint: folder to resume from, whose settings must be the same; None if the run does not resume.
        parts: the other arguments of the recipe, which include ModelArguments and DataArguments.
        rows: "train" and "eval".
        meta_model: the model without weights.
    Raises: ValueError, in all processes, with a list of the differences, unless allow_changed_settings is set.
    """

    def settle() -> dict[str, Any]:
        # in the form in which json reads them again
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
        settings["dataloader_num_workers"] = args.dataloader_num_workers  # each worker shuffles a part of the rows
    elif not any(isinstance(part, RetrievalArguments) for part in parts):
        # a step depends on the number of its rows, not on how they are distributed
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
    """The number of rows, and a hash of all columns except the image itself; image_id is one of them."""
    table = rows.images if isinstance(rows, CaptionRows) else rows
    digest = hashlib.sha1()
    for batch in table.remove_columns("image").with_format("arrow").iter(10_000):
        digest.update(json.dumps(batch.to_pydict()).encode())
    return f"{len(rows):,} rows, {digest.hexdigest()[:12]}"


def _fingerprint_of_checkpoint(args: ModelArguments, meta_model: torch.nn.Module) -> str:
    """The commit of a checkpoint on the Hub; a hash of weights, configuration and vocabulary for a folder."""
    if args.hub_id:
        return f"{args.hub_id} {getattr(meta_model.config, '_commit_hash', None) or args.model_revision}"
    folder, digest = Path(args.model_name_or_path), hashlib.sha1()
    if args.model_name_or_path == "demo":
        return "demo"
    names = ("config.json", ADAPTER_FILE, "tokenizer.json", "vocab.txt", "*.safetensors", "pytorch_model*.bin")
    for file in sorted(file for name in names for file in folder.glob(name)):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:12]


def _require_same_settings(checkpoint: Path, settings: dict[str, Any], allow: bool) -> None:
    file = checkpoint / SETTINGS_FILE
    if not file.exists():
        logger.warning("%s has no %s, so its settings are not compared with this run.", checkpoint, SETTINGS_FILE)
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
            f"{found}\nThe result would not be that of either run. Resume with the saved settings, start a new run in "
            "another output_dir, or accept the changes with --allow_changed_settings."
        )
    logger.warning("%s\nThe changes are accepted because of --allow_changed_settings.", found)
