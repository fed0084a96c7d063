"""Check that the weights of a checkpoint or an adapter fit the model and are valid numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from blip_ft.modeling.checkpoint_files import ADAPTER_FILE, find_file
from blip_ft.modeling.loading_errors import blame_file

logger = logging.getLogger(__name__)


def require_matching_weights(
    model: PreTrainedModel, info: dict[str, Any], name: str, task: str, allow_new_weights: bool
) -> None:
    """Raise ValueError, or warn if allow_new_weights, unless the checkpoint has the model's weights and no others.

    info: what from_pretrained returns with output_loading_info.
    """
    known = model.state_dict()
    lacking, surplus = (name_parts(info[key], known) for key in ("missing_keys", "unexpected_keys"))
    found = [
        *([f"it has no weights for {lacking}, which would be randomly initialized"] if lacking else []),
        *([f"its weights of {surplus} would not be used"] if surplus else []),
    ]
    if not found:
        return
    message = f"{name} does not fit {type(model).__name__} as described in its {CONFIG_NAME}: {', and '.join(found)}."
    if not allow_new_weights:
        raise ValueError(
            f"{message} Check that the folder is complete, that its files belong together, and that the checkpoint was "
            f"made for the task {task}. To start from it anyway, add --allow_new_weights (load_model: "
            "allow_new_weights=True)."
        )
    logger.warning(message)


def require_fitting_adapter(model: PreTrainedModel, name: str, base: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError unless the adapter has exactly the weights that its config needs on this model.

    model: the base without weights, from build_on_meta.
    """
    known = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    with blame_file(ADAPTER_FILE, name), torch.device("meta"):
        config = PeftConfig.from_pretrained(name, **known)
        config.init_lora_weights = False  # some initializations need the base's weights
        wanted = get_peft_model_state_dict(PeftModel(model, config), save_embedding_layers=False)
    saved = load_peft_weights(name, device="cpu", **known)
    lacking, surplus = (
        name_parts(keys, wanted) for keys in (wanted.keys() - saved.keys(), saved.keys() - wanted.keys())
    )
    shapes = [key for key in wanted.keys() & saved.keys() if wanted[key].shape != saved[key].shape]
    found = [
        *([f"it has no weights for {lacking}"] if lacking else []),
        *([f"the base has no layers for its weights of {surplus}"] if surplus else []),
        *([f"its weights of {name_parts(shapes, wanted)} have different shapes"] if shapes else []),
    ]
    if found:
        raise ValueError(
            f"The adapter {name} does not fit its base {base} ({type(model).__name__}): {', and '.join(found)}. Set "
            f"base_model_name_or_path in {ADAPTER_FILE} to the checkpoint that the adapter was trained on."
        )


def require_floats(model: nn.Module, name: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for weights saved as integers. transformers would load them without an error."""
    if not (file := find_file(name, SAFE_WEIGHTS_NAME, kwargs)):
        return  # the weights are in several files, or in a pickle
    with safe_open(file, "pt") as weights:
        saved = set(weights.keys()) & {key for key, _ in model.named_parameters(remove_duplicate=False)}
        whole = [key for key in saved if "F" not in weights.get_slice(key).get_dtype()]  # F32, BF16, ...
    if whole:
        raise ValueError(f"{name} has integer weights in {list_some(whole)}. Save them as floats.")


def require_finite_weights(model: nn.Module, name: str) -> None:
    """Raise ValueError for weights that are NaN or infinite, because every answer would be empty or wrong."""
    broken = [
        key
        for key, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not tensor.is_meta and not is_finite(tensor)
    ]
    if broken:
        raise ValueError(
            f"{name} has weights that are NaN or infinite, in {list_some(broken)}. Use an earlier checkpoint, or save "
            "or download this one again. If it was loaded in float16, try float32 or bfloat16."
        )


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """True if no number of the tensor is NaN or infinite, as a tensor () on the same device to avoid a sync."""
    if not tensor.numel():
        return torch.tensor(True, device=tensor.device)
    # minimum and maximum are NaN if any number is; this is twelve times as fast as isfinite on every number
    return torch.stack(tensor.aminmax()).isfinite().all()


def name_parts(keys: Iterable[str], known: Iterable[str]) -> str:
    """The shortest dotted names that cover all keys and no other known key, as one string."""
    keys = set(keys)
    prefixes_of_others = {prefix for key in set(known) - keys for prefix in _prefixes(key)}
    return list_some({next(prefix for prefix in _prefixes(key) if prefix not in prefixes_of_others) for key in keys})


def list_some(names: Iterable[str]) -> str:
    """The first ten names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _prefixes(key: str) -> list[str]:
    """For a.b.c: a, a.b, a.b.c."""
    names = key.split(".")
    return [".".join(names[:length]) for length in range(1, len(names) + 1)]
