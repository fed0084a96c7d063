"""Files of a checkpoint, in a folder or on the Hub, and why loading them failed."""

from __future__ import annotations

import errno
import json
import logging
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    BlipConfig,
    BlipProcessor,
    PreTrainedModel,
)
from transformers.utils import (
    CONFIG_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_NAME,
)

from blip_ft.data.secrets import hide_secrets
from blip_ft.modeling.blip import TASK_OF_CLASS, TASKS

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"

PROCESSOR_FILES = f"{PROCESSOR_NAME}, tokenizer_config.json or tokenizer.json"


def require_positions(config: BlipConfig, *with_lengths: Any) -> None:
    """Raise ValueError if a max_..._tokens or generation_max_length is more than the model has positions for."""
    longest = config.text_config.max_position_embeddings
    lengths = [(name, value) for arguments in with_lengths for name, value in vars(arguments).items()]
    too_long = [
        f"{name} {value}"
        for name, value in lengths
        if re.fullmatch(r"max_\w+_tokens|generation_max_length", name) and (value or 0) > longest
    ]
    if too_long:
        raise ValueError(
            f"The checkpoint reads and writes texts of at most {longest} tokens (max_position_embeddings in "
            f"{CONFIG_NAME}), found {', '.join(too_long)}. Set at most {longest}."
        )


def task_of_config(config: BlipConfig) -> str:
    for name in config.architectures or ():
        if name in TASK_OF_CLASS:
            return TASK_OF_CLASS[name]
    logger.warning("The checkpoint names no BLIP architecture; taking the task vqa. Set task to choose another.")
    return "vqa"


@contextmanager
def explain_loading(name: str, of: str = "") -> Iterator[None]:
    """Turn what libraries raise while they load the checkpoint name into a ValueError that says what to check."""
    try:
        yield
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{of}The weights of {name} have other shapes than its {CONFIG_NAME} says; the files do not belong "
            f"together. Save or download them anew.\n{error}"
        ) from error
    # EOFError and KeyError: a pickle or a tokenizer.json that is empty or something else
    except (
        *(OSError, EntryNotFoundError, HFValidationError, SafetensorError),
        *(pickle.UnpicklingError, EOFError, KeyError),
    ) as error:
        raise ValueError(of + describe_loading_error(name, error)) from error


@contextmanager
def blame_file(file: str, name: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into a ValueError that names the config file: only its values can be the cause.

    Not what explain_loading tells apart: a file that cannot be had or read, and weights of other shapes.
    """
    try:
        yield
    except (OSError, EntryNotFoundError, HFValidationError, SafetensorError, pickle.UnpicklingError, EOFError):
        raise
    except Exception as error:
        if any(text in str(error) for text in ("size mismatch", "ignore_mismatched_sizes", "out of memory")):
            raise
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file} of {name} holds a value that does not work. Correct it, or get the file anew. "
            f"{type(error).__name__}: {said}"
        ) from error


def read_config(name: str, kwargs: dict[str, Any]) -> BlipConfig:
    with blame_file(CONFIG_NAME, name):
        content, _ = BlipConfig.get_config_dict(name, **kwargs)
        json.dumps(content, allow_nan=False)
    if "model_type" not in content:
        raise EntryNotFoundError(f"there is no {CONFIG_NAME} with a model_type")
    found = content["model_type"]
    if found != BlipConfig.model_type:
        own_code = " It brings code of its own, which is never run here." if "auto_map" in content else ""
        raise ValueError(
            f"{name} is a checkpoint of type {found!r}; supported: {BlipConfig.model_type} (BLIP of "
            f"2022, not BLIP-2 or InstructBLIP) with the tasks {', '.join(TASKS)}.{own_code}"
        )
    with blame_file(CONFIG_NAME, name):
        config = BlipConfig.from_pretrained(name, **kwargs)
        text = config.text_config
        for key in ("bos_token_id", "pad_token_id", "sep_token_id"):
            if not 0 <= getattr(text, key) < text.vocab_size:
                raise ValueError(f"text_config.{key} is the number of a token, 0 to {text.vocab_size - 1}")
        for key in ("question_start_token", "itm_start_token"):
            if getattr(config, key, "cls") not in ("cls", "enc"):
                raise ValueError(f"{key} is cls or enc")
        list(config.architectures or ())
    return config


def build_on_meta(task: str, config: BlipConfig, name: str) -> PreTrainedModel:
    """The model without weights and memory, after it has read an image and a text of no content.

    Raises: ValueError if the config does not describe a model that can be built and called.
    """
    with blame_file(CONFIG_NAME, name), torch.device("meta"), torch.no_grad():
        model = TASKS[task](config).eval()
        side = config.vision_config.image_size
        images = model.encode_images(torch.empty(1, 3, side, side, dtype=torch.uint8)).last_hidden_state
        for part, module in model.named_children():
            if part in ("text_encoder", "text_decoder"):
                module(input_ids=torch.zeros(1, 2, dtype=torch.long), encoder_hidden_states=images)
    return model.train()


def read_processor(name: str, kwargs: dict[str, Any]) -> BlipProcessor:
    # with trust_remote_code left out, transformers asks on stdin whether to run a checkpoint's code
    with blame_file(PROCESSOR_FILES, name):
        return BlipProcessor.from_pretrained(name, **{**kwargs, "trust_remote_code": False})


def fit_processor(processor: BlipProcessor, config: BlipConfig, name: str) -> None:
    """Let processor and config agree on lengths, sizes and pixels.

    Raises: ValueError for a tokenizer without the words that the checkpoint was trained with.
    """
    tokenizer, text, vision = processor.tokenizer, config.text_config, config.vision_config
    # BLIP's [DEC] and [ENC] come right after the words of BERT; a tokenizer may have them too
    if not text.bos_token_id <= len(tokenizer) <= text.vocab_size:
        raise ValueError(
            f"The tokenizer of {name} does not belong to its weights: it knows {len(tokenizer)} tokens, and the model "
            f"was trained with {text.bos_token_id} to {text.vocab_size}. Check that tokenizer.json or vocab.txt is "
            "there and complete; else copy the tokenizer's files from the checkpoint that it was fine-tuned from."
        )
    images = processor.image_processor
    with blame_file(PROCESSOR_FILES, name):
        # the loss and the first token, [DEC], are read from the left
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
        images.size = {"height": vision.image_size, "width": vision.image_size}
        vision.image_mean, vision.image_std = list(images.image_mean), list(images.image_std)
        pixels = images(Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
        if not pixels.isfinite().all():
            raise ValueError("image_mean and image_std turn a black image into numbers that are not finite")


def require_fitting_adapter(model: PreTrainedModel, name: str, base: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError unless the adapter's weights are those that its config asks for on this model.

    model: without weights, as build_on_meta gives it.
    """
    known = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    with blame_file(ADAPTER_FILE, name), torch.device("meta"):
        config = PeftConfig.from_pretrained(name, **known)
        config.init_lora_weights = False  # some ways compute with the base's weights
        wanted = get_peft_model_state_dict(PeftModel(model, config), save_embedding_layers=False)
    saved = load_peft_weights(name, device="cpu", **known)
    lacking, surplus = (
        name_parts(keys, wanted) for keys in (wanted.keys() - saved.keys(), saved.keys() - wanted.keys())
    )
    shapes = [key for key in wanted.keys() & saved.keys() if wanted[key].shape != saved[key].shape]
    found = [
        *([f"it has no weights for {lacking}"] if lacking else []),
        *([f"its weights of {surplus} have no place"] if surplus else []),
        *([f"its weights of {name_parts(shapes, wanted)} have other shapes"] if shapes else []),
    ]
    if found:
        raise ValueError(
            f"The adapter {name} does not fit its base {base} ({type(model).__name__}): {', and '.join(found)}. Let "
            f"base_model_name_or_path in {ADAPTER_FILE} name the checkpoint that it was trained on."
        )


def require_floats(model: nn.Module, name: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for weights saved as whole numbers, which transformers would take as they are, rounded."""
    if not (file := find_file(name, SAFE_WEIGHTS_NAME, kwargs)):
        return  # in several files, or a pickle
    with safe_open(file, "pt") as weights:
        saved = set(weights.keys()) & {key for key, _ in model.named_parameters(remove_duplicate=False)}
        whole = [key for key in saved if "F" not in weights.get_slice(key).get_dtype()]  # F32, BF16, ...
    if whole:
        raise ValueError(f"{name} has its weights of {list_some(sorted(whole))} as whole numbers. Save it as floats.")


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """(), True if no number of a tensor is NaN or infinite; on its device, so that asking does not wait for it."""
    if not tensor.numel():
        return torch.tensor(True, device=tensor.device)
    # the least and the greatest number are NaN if any is; twelve times as fast as isfinite on every number
    return torch.stack(tensor.aminmax()).isfinite().all()


def require_finite_weights(model: nn.Module, name: str) -> None:
    """Raise ValueError for weights that are NaN or infinite: every answer would be empty or wrong."""
    broken = [
        key
        for key, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not tensor.is_meta and not is_finite(tensor)
    ]
    if broken:
        raise ValueError(
            f"{name} has weights that are NaN or infinite, in {list_some(broken)}. Take an earlier checkpoint, or save "
            "or download it anew. If it was loaded in float16, try float32 or bfloat16."
        )


def name_parts(keys: Iterable[str], known: Iterable[str]) -> str:
    """The fewest dotted names that stand for keys and for no other of the known ones, in words."""
    keys = set(keys)
    prefixes_of_others = {prefix for key in set(known) - keys for prefix in _prefixes(key)}
    return list_some({next(prefix for prefix in _prefixes(key) if prefix not in prefixes_of_others) for key in keys})


def _prefixes(key: str) -> list[str]:
    """a, a.b, a.b.c of a.b.c."""
    names = key.split(".")
    return [".".join(names[:length]) for length in range(1, len(names) + 1)]


def list_some(names: Iterable[str], most: int = 10) -> str:
    first, more = sorted(names)[:most], len(set(names)) - most
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def base_of_adapter(
    name: str, kwargs: dict[str, Any], wanted_task: str | None
) -> tuple[str, dict[str, Any], str | None] | None:
    """If name is a folder or Hub id of a PEFT adapter: its base checkpoint, the arguments to load that with, and the
    task that the adapter was trained for, which its base need not have; None if it does not say.

    Raises: ValueError for an adapter of another task than the wanted one.
    """
    file = find_file(name, ADAPTER_FILE, kwargs)
    if file is None:
        return None
    with blame_file(ADAPTER_FILE, name):
        config = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(config, allow_nan=False)
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
        task = TASK_OF_CLASS.get((config.get("auto_mapping") or {}).get("base_model_class"))
        if not isinstance(base or "", str):
            raise TypeError(f"base_model_name_or_path is a name or a folder, found {base!r}")
    if not base:
        raise ValueError(f"The adapter {name} does not say which checkpoint it belongs to (base_model_name_or_path).")
    if wanted_task and task and task != wanted_task:
        raise ValueError(f"{name} is an adapter for the task {task}, and cannot be used for {wanted_task}.")
    # the adapter's own revision is not its base's
    return base, {**kwargs, "revision": revision}, task


def refuse_pickle(name: str, safe: Sequence[str], pickled: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError where name has its weights as the pickled file and none of the safe ones."""
    if not any(find_file(name, file, kwargs) for file in safe) and find_file(name, pickled, kwargs):
        raise ValueError(
            f"{name} has its weights as {pickled} only, a pickle, which can run any code when it is read. Ask for "
            f"{safe[0]}; or, if you trust where it comes from, add --allow_pickle (load_model: allow_pickle=True)."
        )


def find_file(name: str, file: str, kwargs: dict[str, Any]) -> Path | None:
    """A file of a folder or of the Hub; None where there is none.

    Raises: LocalEntryNotFoundError where the Hub is not reached and the cache has no checkpoint of that name either.
    """
    if Path(name).exists():
        path = Path(name) / file
        return path if path.is_file() else None
    known = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    try:
        return Path(hf_hub_download(name, file, **known))
    except LocalEntryNotFoundError:  # the Hub was not reached; a checkpoint may still be in the cache
        known = {key: known[key] for key in ("revision", "cache_dir") if key in known}
        if not any(
            isinstance(try_to_load_from_cache(name, other, **known), str) for other in (CONFIG_NAME, ADAPTER_FILE)
        ):
            raise
        return None
    except EntryNotFoundError:
        return None


def describe_loading_error(name: str, error: Exception) -> str:
    """Which of name, network, disk or access stands behind a failure to load, as far as the errors tell."""
    path, causes = Path(name), [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)

    def caused_by(*types: type) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    if any(getattr(cause, "errno", None) == errno.ENOSPC for cause in causes):
        advice = f"The disk is full: free some of it, or let HF_HOME name another (now {constants.HF_HOME})."
    elif path.exists():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:20]) if path.is_dir() else "a file"
        advice = (
            f"{name} must be a folder with config.json, model.safetensors and the processor's files; found: {found}."
        )
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        advice = f"There is no folder {name}. Check the path."
    elif caused_by(GatedRepoError):
        advice = f"{name} is gated: accept its terms on its page, and set HF_TOKEN."
    elif caused_by(RevisionNotFoundError):
        advice = f"{name} is on the Hub and has no such revision. Check the revision."
    elif caused_by(RepositoryNotFoundError, HFValidationError):
        advice = (
            f"{name} is no folder here and no model of the Hub that can be seen. Check the spelling (owner/name); for "
            "a private one set HF_TOKEN."
        )
    elif constants.HF_HUB_OFFLINE:
        advice = (
            f"{name} is no folder here, is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or check the name."
        )
    elif caused_by(EntryNotFoundError) and not caused_by(LocalEntryNotFoundError):
        advice = f"{name} is on the Hub and lacks a file that is needed. Check that it is a BLIP checkpoint."
    else:
        advice = (
            f"{name} is no folder here, is not in the cache, and {constants.ENDPOINT} could not be reached. Check the "
            "network, a proxy, HF_ENDPOINT, and the spelling (owner/name)."
        )
    return hide_secrets(f"{advice}\nThe loader said: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
