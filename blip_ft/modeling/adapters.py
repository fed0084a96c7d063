"""Add LoRA adapters, freeze parts of a model, and count parameters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from blip_ft.arguments import PeftArguments
from blip_ft.arguments.families import family_of

logger = logging.getLogger(__name__)


def add_lora(model: PreTrainedModel, args: PeftArguments, revision: str | None = None) -> PeftModel:
    """Add a new, trainable LoRA adapter and freeze everything else. Stock PEFT can load the saved adapter.

    revision: branch, tag or commit of the base, which is saved with the adapter.
    Raises: ValueError if a target matches no layer, is neither a linear layer nor a convolution, or has tied weights.
    """
    needed = "lora_target_modules must name linear layers or convolutions of the model"
    tied = _tied_names(model)
    family = family_of(model.config)
    # leave out the head: BLIP's and OPT's is tied to the embeddings. retrieval has none
    head = r".*\.lm_head" if family.reads_prompts else r".*\.cls\..*" if hasattr(model, "text_decoder") else None
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules or family.lora_targets,
        exclude_modules=head,
        revision=revision,
        task_type=None,  # with any other, PEFT passes inputs_embeds, which BLIP does not accept
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"{needed}: {error}") from error
    targeted = adapted.base_model.targeted_module_names
    for name in args.lora_target_modules or ():
        if not any(f".{target}".endswith(f".{name}") for target in targeted):
            raise ValueError(f"{needed}; {name} matches none. The head (cls, lm_head) cannot be adapted.")
    for name in targeted:
        layer = adapted.get_base_model().get_submodule(name)
        kind = type(layer.get_base_layer() if isinstance(layer, LoraLayer) else layer)
        if not issubclass(kind, (nn.Linear, nn.Conv2d)):
            raise ValueError(f"{needed}; {name} is a layer of type {kind.__name__}. Remove it from the list.")
        if f"{name}.weight" in tied:
            raise ValueError(
                f"{needed} whose weights are not tied. {name} shares its weights with another part of the model, which "
                "merging the adapter would also change. Remove it from the list."
            )
    return save_for_stock(adapted)


def freeze_model(model: nn.Module, freeze_layers: Sequence[str] | str | None = None) -> None:
    """Freeze the named parts, or the whole model if freeze_layers is None.

    A name matches whole dotted parts of parameter names. A tied weight, such as the decoder's head and its word
    embeddings, is frozen by either name.
    """
    _set_requires_grad(model, freeze_layers, False)


def unfreeze_model(model: nn.Module, unfreeze_layers: Sequence[str] | str | None = None) -> None:
    """Unfreeze the named parts, or the whole model if unfreeze_layers is None. Names match as in freeze_model.

    In a model with an adapter, only the adapter is unfrozen, because only the adapter is saved.
    """
    _set_requires_grad(model, unfreeze_layers, True)


def unknown_layers(model: nn.Module, names: list[str], trainable_only: bool = False) -> list[str]:
    """The names that match no parameter of the model, or no trainable parameter if trainable_only."""
    parameters = [
        f".{name}."
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad or not trainable_only
    ]
    return [name for name in names if not any(f".{name}." in parameter for parameter in parameters)]


def part_names(model: nn.Module) -> list[str]:
    """Names of the model's top-level modules, e.g. vision_model, text_encoder, text_decoder."""
    model = without_adapter(model)
    return [name for name, _ in model.named_children()]


def count_parameters(model: nn.Module) -> dict[str, int | float]:
    """Count parameters: total, trainable, frozen, and total_millions, trainable_millions.

    In 4-bit weights, the parameters are counted, not the packed bytes.
    """
    total = trainable = 0
    for parameter in model.parameters():
        # bitsandbytes packs two 4-bit values into one byte
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
        logger.warning(
            "No parameter matches %s; the parts of the model are %s.", ", ".join(unknown), ", ".join(part_names(model))
        )
    # a tied weight is listed under each of its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if value and isinstance(model, PeftModel) and model.base_model.prefix not in name:
            continue
        if parameter.is_floating_point() and (names is None or any(f".{part}." in f".{name}." for part in names)):
            parameter.requires_grad = value


def without_adapter(model: nn.Module) -> nn.Module:
    """The BLIP model inside a PeftModel, with the adapter's layers still in it; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _tied_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are used at several places of the model."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _stock_class(stock: type, is_prompt_tuning: bool = False) -> type:
    return stock


def save_for_stock(adapted: PeftModel) -> PeftModel:
    """Make PEFT save the class of transformers as the adapter's base class, in place, and return the model."""
    # peft 0.21 saves the module of the base's class as `parent_library`, and AutoPeftModel only accepts modules that it
    # knows. The class of the same name in transformers has the same weights
    stock = next(cls for cls in type(adapted.get_base_model()).__mro__ if cls.__module__.startswith("transformers."))
    adapted._get_base_model_class = partial(_stock_class, stock)
    return adapted
