"""Read the files of a checkpoint or an adapter, in a folder or on the Hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from transformers import BlipConfig, BlipProcessor, PreTrainedModel
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from blip_ft.modeling.blip import TASK_OF_CLASS, TASKS
from blip_ft.modeling.loading_errors import blame_file

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"

# config entries of BLIP classes, see BlipBase.start_token_setting
START_TOKENS = ("question_start_token", "itm_start_token")

PROCESSOR_FILES = f"{PROCESSOR_NAME}, tokenizer_config.json or tokenizer.json"


def read_config(name: str, kwargs: dict[str, Any]) -> BlipConfig:
    """Read the config of a checkpoint. Raises: ValueError if a value is invalid, or the checkpoint is not of BLIP."""
    with blame_file(CONFIG_NAME, name):
        content, _ = BlipConfig.get_config_dict(name, **kwargs)
        json.dumps(content, allow_nan=False)
    if "model_type" not in content:
        raise EntryNotFoundError(f"{CONFIG_NAME} does not exist or has no model_type")
    found = content["model_type"]
    if found != BlipConfig.model_type:
        own_code = " It contains its own code, which is never run here." if "auto_map" in content else ""
        raise ValueError(
            f"{name} is a checkpoint of type {found!r}; supported: {BlipConfig.model_type} (BLIP, not BLIP-2 or "
            f"InstructBLIP) with the tasks {', '.join(TASKS)}.{own_code}"
        )
    with blame_file(CONFIG_NAME, name):
        config = BlipConfig.from_pretrained(name, **kwargs)
        text = config.text_config
        for key in ("bos_token_id", "pad_token_id", "sep_token_id"):
            if not 0 <= getattr(text, key) < text.vocab_size:
                raise ValueError(f"text_config.{key} must be a token id, 0 to {text.vocab_size - 1}")
        for key in START_TOKENS:
            if getattr(config, key, "cls") not in ("cls", "enc"):
                raise ValueError(f"{key} must be cls or enc")
        list(config.architectures or ())  # raises if it is not a list
    return config


def read_processor(name: str, kwargs: dict[str, Any]) -> BlipProcessor:
    """Read the processor of a checkpoint. Raises: ValueError if a value in its files is invalid."""
    # without trust_remote_code, transformers asks on stdin whether to run the checkpoint's code
    with blame_file(PROCESSOR_FILES, name):
        return BlipProcessor.from_pretrained(name, **{**kwargs, "trust_remote_code": False})


def fit_processor(processor: BlipProcessor, config: BlipConfig, name: str) -> None:
    """Make processor and config agree on text length, image size and pixel normalization, in place.

    Raises: ValueError if the tokenizer does not have the vocabulary that the checkpoint was trained with.
    """
    tokenizer, text, vision = processor.tokenizer, config.text_config, config.vision_config
    # BLIP's [DEC] and [ENC] come right after BERT's vocabulary; the tokenizer may or may not include them
    if not text.bos_token_id <= len(tokenizer) <= text.vocab_size:
        raise ValueError(
            f"The tokenizer of {name} does not match its weights: it has {len(tokenizer)} tokens, but the model was "
            f"trained with {text.bos_token_id} to {text.vocab_size}. Check that tokenizer.json or vocab.txt exists "
            "and is complete, or copy the tokenizer's files from the checkpoint that this one was fine-tuned from."
        )
    images = processor.image_processor
    with blame_file(PROCESSOR_FILES, name):
        # the loss and the first token, [DEC], assume that texts start in column 0
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
        images.size = {"height": vision.image_size, "width": vision.image_size}
        vision.image_mean, vision.image_std = list(images.image_mean), list(images.image_std)
        pixels = images(Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
        if not pixels.isfinite().all():
            raise ValueError("with image_mean and image_std, a black image gives numbers that are not finite")


def build_on_meta(task: str, config: BlipConfig, name: str) -> PreTrainedModel:
    """Build the model on the meta device, which needs no memory, and run one image and one text through it.

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


def task_of_config(config: BlipConfig) -> str:
    """The task of the config's architecture, else vqa with a warning."""
    for name in config.architectures or ():
        if name in TASK_OF_CLASS:
            return TASK_OF_CLASS[name]
    logger.warning(
        "The checkpoint's config does not name a BLIP architecture; using the task vqa. Set task to change it."
    )
    return "vqa"


def require_positions(config: BlipConfig, *with_lengths: Any) -> None:
    """Raise ValueError if a max_..._tokens or generation_max_length exceeds the model's number of positions.

    with_lengths: dataclasses of arguments.
    """
    longest = config.text_config.max_position_embeddings
    lengths = [(name, value) for arguments in with_lengths for name, value in vars(arguments).items()]
    too_long = [
        f"{name} {value}"
        for name, value in lengths
        if re.fullmatch(r"max_\w+_tokens|generation_max_length", name) and (value or 0) > longest
    ]
    if too_long:
        raise ValueError(
            f"The checkpoint supports texts of at most {longest} tokens (max_position_embeddings in "
            f"{CONFIG_NAME}), found {', '.join(too_long)}. Set at most {longest}."
        )


def base_of_adapter(
    name: str, kwargs: dict[str, Any], wanted_task: str | None
) -> tuple[str, dict[str, Any], str | None] | None:
    """Find the base of a PEFT adapter.

    Returns: None if name is not an adapter. Else the name of the base checkpoint, the arguments to load it with, and
        the task that the adapter was trained for (None if unknown), which can differ from the task of its base.
    Raises: ValueError if the adapter was trained for a task other than wanted_task.
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
            raise TypeError(f"base_model_name_or_path must be a Hub id or a folder, found {base!r}")
    if not base:
        raise ValueError(
            f"The adapter {name} does not name its base checkpoint. Set base_model_name_or_path in {ADAPTER_FILE}."
        )
    if wanted_task and task and task != wanted_task:
        raise ValueError(f"{name} is an adapter for the task {task} and cannot be used for {wanted_task}.")
    # the revision in kwargs is the adapter's; that of the base is in the adapter's config
    return base, {**kwargs, "revision": revision}, task


def refuse_pickle(name: str, safe: Sequence[str], pickled: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if the checkpoint has the pickled file and none of the safe files."""
    if not any(find_file(name, file, kwargs) for file in safe) and find_file(name, pickled, kwargs):
        raise ValueError(
            f"{name} has its weights only in {pickled}, a pickle, which can run any code when it is loaded. Ask its "
            f"author for {safe[0]}, or, if you trust the source, add --allow_pickle (load_model: allow_pickle=True)."
        )


def find_file(name: str, file: str, kwargs: dict[str, Any]) -> Path | None:
    """The path of a checkpoint's file, in the folder or downloaded from the Hub; None if the file does not exist.

    Raises: LocalEntryNotFoundError if the Hub cannot be reached and the cache has no checkpoint of this name.
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
