"""Refuse what cannot be trained before weights load, then load the model."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import BlipProcessor, PreTrainedModel, Trainer, get_scheduler, set_seed
from transformers.integrations import unset_hf_deepspeed_config

from blip_ft.arguments import BlipTrainingArguments, ModelArguments, PeftArguments
from blip_ft.data.sampling import require_whole_batch
from blip_ft.data.streaming import StreamedRows
from blip_ft.modeling.adapters import (
    add_lora,
    count_parameters,
    freeze_model,
    part_names,
    unknown_layers,
    without_adapter,
)
from blip_ft.modeling.checkpoint_files import require_positions
from blip_ft.models import ModelLoader, load_model
from blip_ft.results.files import claim, decided_by_main, is_free, names_in, numbered_folders, require_claim
from blip_ft.training.checkpoints import (
    newest_checkpoint,
    require_readable_state,
    what_is_missing,
)
from blip_ft.training.engines import (
    check_engine,
    check_saved_engine,
)
from blip_ft.training.feature_cache import require_constant_features

logger = logging.getLogger(__name__)


def build_meta_model(
    task: str, model_args: ModelArguments, peft_args: PeftArguments, *with_lengths: Any
) -> PreTrainedModel | PeftModel:
    """The model that load_for_training will give, from its config alone: without weights and memory.

    with_lengths: arguments whose lengths of texts must fit the model, see require_positions.
    Raises: ValueError for what cannot work with this checkpoint.
    """
    name = model_args.model_name_or_path
    needed = "use_peft needs a checkpoint that can be loaded again under the adapter"
    if peft_args.use_peft and name == "demo":
        raise ValueError(f"{needed}; demo is made of new weights each time.")
    if peft_args.use_peft and model_args.allow_new_weights:
        raise ValueError(
            "An adapter is saved without the weights of its base, so new weights would be lost. Use allow_new_weights "
            "or use_peft, not both."
        )
    loader = ModelLoader(
        name,
        task=task,
        device="cpu",
        image_size=model_args.image_size,
        label_smoothing=model_args.label_smoothing,
        dropout=model_args.dropout,
        revision=model_args.model_revision,
        allow_pickle=model_args.allow_pickle,
    )
    model, config, base = loader._prepare()
    if base and peft_args.use_peft:
        raise ValueError(
            f'{needed}; {name} is an adapter itself. Merge it first: load_model("{name}", merge=True), then '
            "save_model(...)."
        )
    require_positions(config, *with_lengths)
    if peft_args.use_peft:
        with torch.device("meta"):
            model = add_lora(model, peft_args)
    frozen = model_args.frozen_parts
    if unknown := unknown_layers(model, frozen):
        raise ValueError(
            f"freeze names parts of the model; {', '.join(unknown)} is none. There are {', '.join(part_names(model))}, "
            "and their parts, e.g. vision_model.encoder.layers.0"
        )
    if idle := unknown_layers(model, frozen, trainable_only=True):
        raise ValueError(
            f"freeze names {', '.join(idle)}, where nothing is trained anyway: with use_peft only the adapter is. Take "
            "it out of freeze."
        )
    if frozen:
        freeze_model(model, frozen)
    if not count_parameters(model)["trainable"]:
        raise ValueError("Everything is frozen, so nothing would be trained. Take something out of freeze.")
    return model


def load_for_training(
    task: str, model_args: ModelArguments, peft_args: PeftArguments, training_args: BlipTrainingArguments
) -> tuple[PreTrainedModel | PeftModel, BlipProcessor]:
    """Model and processor as the arguments say: resized, smoothed, frozen, in few bits, with an adapter.

    What build_meta_model would refuse is not looked for again.
    """
    # transformers would shard while it loads under ZeRO-3, from a config whose batch sizes are not filled in yet, and
    # what changes the weights after loading needs them whole; DeepSpeed shards when training begins
    unset_hf_deepspeed_config()
    # the Trainer seeds after the weights of an adapter, of the demo and of a head that a checkpoint lacks are drawn
    set_seed(training_args.seed)
    loaded = load_model(
        model_args.model_name_or_path,
        task=task,
        device=training_args.device,
        load_in_8bit=peft_args.load_in_8bit,
        load_in_4bit=peft_args.load_in_4bit,
        image_size=model_args.image_size,
        label_smoothing=model_args.label_smoothing,
        dropout=model_args.dropout,
        revision=model_args.model_revision,
        allow_pickle=model_args.allow_pickle,
        allow_new_weights=model_args.allow_new_weights,
        merge=not peft_args.use_peft,  # an adapter given to start from becomes part of the weights
    )
    model = loaded["model"]
    if peft_args.use_peft:
        model = add_lora(model, peft_args, model_args.model_revision)
    if model_args.frozen_parts:
        freeze_model(model, model_args.frozen_parts)
    counts = count_parameters(model)
    logger.info(
        "%s: %.1f M parameters, %.1f M of them trained",
        type(loaded["model"]).__name__,
        *(counts["total_millions"], counts["trainable_millions"]),
    )
    return model, loaded["processor"]


def prepare_output_dir(args: BlipTrainingArguments, recipe: str, peft_args: PeftArguments) -> str | None:
    """Settle args.output_dir before anything is written, and return the checkpoint to resume from, if any.

    Not given: outputs/<recipe>, else the next free outputs/<recipe>-2, -3, ...; with `--resume_from_checkpoint last`
    the newest of them. Given and not empty: refused, unless resuming. It is this run's until it ends: a folder in which
    another one is still writing is refused, or passed over if none is given.
    """
    check_engine(args, recipe, is_quantized=peft_args.load_in_8bit or peft_args.load_in_4bit)
    resume = args.resume_from_checkpoint
    given = args.output_dir if args.output_dir_was_given else None
    args.output_dir = decided_by_main(lambda: _choose_output_dir(given, recipe, resume))
    if not resume:
        return None
    checkpoint = decided_by_main(lambda: _choose_checkpoint(Path(args.output_dir), resume, peft_args, args))
    if checkpoint is None:
        logger.warning("There is no whole checkpoint in %s: starting from the beginning.", args.output_dir)
        return None
    problem = what_is_missing(checkpoint)
    # output_dir may lie on a disk of each machine
    problems = gather_object([f"{socket.gethostname()}: {problem}"] if problem else [])
    if problems:
        raise ValueError(
            f"{checkpoint} must be on each machine, and is not on {', '.join(dict.fromkeys(problems))}. Copy it "
            "there, and train with --save_on_each_node or an output_dir that all machines share."
        )
    return str(checkpoint)


def _choose_checkpoint(
    output_dir: Path, resume: str, peft_args: PeftArguments, args: BlipTrainingArguments
) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, None if `last` finds none. Raises: ValueError."""
    if resume == "last":
        checkpoint = newest_checkpoint(output_dir)
        if checkpoint is None:
            return None
    else:
        checkpoint = Path(resume)
        problem = what_is_missing(checkpoint)
        if problem:
            raise ValueError(
                f"resume_from_checkpoint {resume}: {problem}. Give a checkpoint-... folder of an earlier run, or "
                "`last` for the newest whole one of output_dir."
            )
    if not any(checkpoint.glob("rng_state*.pth")):
        raise ValueError(
            f"{checkpoint} was saved with --save_only_model and has no optimizer state, so it cannot be resumed. Start "
            f"a new run from its weights: --model_name_or_path {checkpoint}, with another output_dir."
        )
    require_readable_state(checkpoint)
    check_saved_engine(checkpoint, args)
    _require_same_kind(checkpoint, peft_args)
    return checkpoint


def _require_same_kind(checkpoint: Path, args: PeftArguments) -> None:
    file = checkpoint / "adapter_config.json"
    if file.exists() != args.use_peft:
        kind, flag = ("an adapter", "Add") if file.exists() else ("a whole model", "Leave out")
        raise ValueError(f"{checkpoint} holds {kind}. {flag} --use_peft, or begin in another output_dir.")


def check_run(args: BlipTrainingArguments, rows: Dataset | StreamedRows, meta_model: torch.nn.Module) -> None:
    """Refuse, before weights are loaded, what cannot be trained on these rows or kept of this model, if it is trained.

    meta_model: the model without its weights. Raises: ValueError.
    """
    if not args.do_train:
        return
    if args.cache_image_features:
        require_constant_features(without_adapter(meta_model))
    _require_optimizer(args, meta_model)
    if not isinstance(rows, StreamedRows):
        require_whole_batch(len(rows), args.train_batch_size * args.world_size * args.gradient_accumulation_steps)


def _require_optimizer(args: BlipTrainingArguments, meta_model: torch.nn.Module) -> None:
    """Make optimiser and scheduler for one weight, as the Trainer will after all weights are loaded."""
    try:
        make, settings = Trainer.get_optimizer_cls_and_kwargs(args, meta_model)
        for name in ("params", "model", "optimizer_dict"):  # of some, for the Trainer, not for the optimiser
            settings.pop(name, None)
        optimizer = make([torch.nn.Parameter(torch.zeros(1))], **settings)
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"No optimiser or scheduler can be made of --optim {args.optim.value}, --optim_args, --adam_..., "
            f"--lr_scheduler_type {args.lr_scheduler_type.value} and --lr_scheduler_kwargs: {error}"
        ) from error


def _choose_output_dir(given: str | None, recipe: str, resume: str | None) -> str:
    if given is not None:
        there = next(path for path in (Path(given), *Path(given).absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"output_dir {given} cannot be made: {there} is no folder to write into. Choose another.")
        require_claim(Path(given))
        # the list that a run stopped for bad rows leaves is no run
        if names_in(Path(given)) - {"bad_rows.jsonl"} and not resume:
            raise ValueError(
                f"output_dir {given} is not empty. Choose another, remove it, or go on with what is there: "
                "--resume_from_checkpoint last"
            )
        return given
    newest = None
    for folder in numbered_folders(recipe):
        if not is_free(folder):
            newest = folder
        elif resume and newest:
            require_claim(newest)
            return str(newest)
        elif claim(folder) and is_free(folder):  # once more, for now no other program can write there
            return str(folder)
