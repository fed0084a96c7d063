"""LoRA adapters, freezing and counting of parameters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    PreTrainedModel,
)
from transformers.models.blip import modeling_blip

from blip_ft.arguments import PeftArguments

logger = logging.getLogger(__name__)

# every linear layer of attention and feed-forward; the head is tied to the embeddings, and merging into it changes both
LORA_TARGETS = ("query", "key", "value", "dense", "qkv", "projection", "fc1", "fc2")


def add_lora(model: PreTrainedModel, args: PeftArguments, revision: str | None = None) -> PeftModel:
    """The model with a new trainable LoRA adapter, and all else frozen. It saves for stock PEFT and transformers.

    revision: the branch, tag or commit of the base that the adapter belongs to.
    Raises: ValueError for a target that is in no layer, is not linear or a convolution, or has tied weights.
    """
    wanted = "lora_target_modules must name linear layers or convolutions of the model"
    tied = _tied_names(model)
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(args.lora_target_modules or LORA_TARGETS),
        # the head's transform; its output layer is the embedding table
        exclude_modules=r".*\.cls\..*" if hasattr(model, "text_decoder") else None,
        revision=revision,
        task_type=None,  # every other one makes PEFT pass inputs_embeds, which BLIP has no place for
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"{wanted}: {error}") from error
    targeted = adapted.base_model.targeted_module_names
    for name in args.lora_target_modules or ():
        if not any(f".{target}".endswith(f".{name}") for target in targeted):
            raise ValueError(f"{wanted}; {name} names none. The head of the text decoder (cls) is never adapted.")
    for name in targeted:
        layer = adapted.get_base_model().get_submodule(name)
        kind = type(layer.get_base_layer() if isinstance(layer, LoraLayer) else layer)
        if not issubclass(kind, (nn.Linear, nn.Conv2d)):
            raise ValueError(f"{wanted}; {name} is a layer of type {kind.__name__}. Leave it out.")
        if f"{name}.weight" in tied:
            raise ValueError(
                f"{wanted} that share their weights with no other. {name} shares them with another part of the model, "
                "which merging the adapter would change too. Leave it out."
            )
    return save_for_stock(adapted)


def freeze_model(model: nn.Module, freeze_layers: Sequence[str] | str | None = None) -> None:
    """Stop training the named parts, or all for None. A name matches whole dotted parts of parameter names.

    A weight that two parts share, as the decoder's head and its word embeddings do, is frozen by the name of either.
    """
    _set_requires_grad(model, freeze_layers, False)


def unfreeze_model(model: nn.Module, unfreeze_layers: Sequence[str] | str | None = None) -> None:
    """Train the named parts, or all for None. A name matches whole dotted parts of parameter names.

    Of a model with an adapter only the adapter is trained: nothing else of it would be saved.
    """
    _set_requires_grad(model, unfreeze_layers, True)


def unknown_layers(model: nn.Module, names: list[str], trainable_only: bool = False) -> list[str]:
    """Those names that match no parameter of the model, or none that is trained."""
    parameters = [
        f".{name}."
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad or not trainable_only
    ]
    return [name for name in names if not any(f".{name}." in parameter for parameter in parameters)]


def part_names(model: nn.Module) -> list[str]:
    """The model's largest named parts, e.g. vision_model, text_encoder, text_decoder."""
    model = without_adapter(model)
    return [name for name, _ in model.named_children()]


def count_parameters(model: nn.Module) -> dict[str, int | float]:
    """Numbers of parameters: total, trainable, frozen, and total_millions, trainable_millions.

    A 4-bit weight counts as the parameters it stands for, not as its packed bytes.
    """
    total = trainable = 0
    for parameter in model.parameters():
        # bitsandbytes packs two 4-bit values in a byte
        number = parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
        total += number
        trainable += number if parameter.requires_grad else 0
    return {
        "total": total,
        "trainable": trainable,
        "frozen": total - trainable,
        "total_millions": total / 1e6,
        "trainable_millions": trainable / 1e6,
    }


def _set_requires_grad(model: nn.Module, names: Sequence[str] | str | None, value: bool) -> None:
    names = [names] if isinstance(names, str) else names
    unknown = unknown_layers(model, names or [])
    if unknown:
        logger.warning("No parameter is named %s; the parts are %s.", ", ".join(unknown), ", ".join(part_names(model)))
    # a tied weight goes by each of its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if value and isinstance(model, PeftModel) and model.base_model.prefix not in name:
            continue
        if parameter.is_floating_point() and (names is None or any(f".{part}." in f".{name}." for part in names)):
            parameter.requires_grad = value


def without_adapter(model: nn.Module) -> nn.Module:
    """The BLIP model itself; an adapter's layers are part of it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _tied_names(model: nn.Module) -> set[str]:
    """The names of parameters that stand in the model at several places."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _stock_class(stock: type, is_prompt_tuning: bool = False) -> type:
    return stock


def save_for_stock(adapted: PeftModel) -> PeftModel:
    # peft 0.21 saves the class's module as `parent_library`, and AutoPeftModel refuses all but those it knows: stock's
    # class of the same name has the same weights
    stock = getattr(modeling_blip, type(adapted.get_base_model()).__name__)
    adapted._get_base_model_class = partial(_stock_class, stock)
    return adapted
