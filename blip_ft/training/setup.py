"""Refuse what cannot be trained before weights load, then load the model."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    BlipProcessor,
    PreTrainedModel,
    set_seed,
)
from transformers.integrations import unset_hf_deepspeed_config

from blip_ft.arguments import BlipTrainingArguments, ModelArguments, PeftArguments
from blip_ft.modeling.adapters import add_lora, count_parameters, freeze_model, part_names, unknown_layers
from blip_ft.modeling.checkpoint_files import require_positions
from blip_ft.models import ModelLoader, load_model

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
