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
from transformers import (
    InstructBlipProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from blip_ft.arguments.families import family_of
from blip_ft.data.text_formats import COPY_PROCESSOR, require_family
from blip_ft.modeling.loading_errors import blame_file
from blip_ft.modeling.registry import CONFIGS, MODEL_REGISTRY, PROCESSORS, TASKS_OF_CLASS, task_of

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"

# config entries of ours, which the config of an adapter's base does not have
OWN_ENTRIES = ("question_start_token", "itm_start_token", "task", "prompt", "clean_questions")

# rows of an embedding beyond its vocabulary: 28 in T5, 7 in OPT, more if it was padded to a multiple
MOST_PADDING = 128

PROCESSOR_FILES = f"{PROCESSOR_NAME}, tokenizer_config.json or tokenizer.json"


def read_config(name: str, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """Read the config of a checkpoint. Raises: ValueError if a value is invalid, or the family is not supported."""
    with blame_file(CONFIG_NAME, name):
        content, _ = PreTrainedConfig.get_config_dict(name, **kwargs)
        json.dumps(content, allow_nan=False)
    if "model_type" not in content:
        raise EntryNotFoundError(f"{CONFIG_NAME} does not exist or has no model_type")
    found = content["model_type"]
    if found not in CONFIGS:
        own_code = " It contains its own code, which is never run here." if "auto_map" in content else ""
        known = "; ".join(f"{kind} for {', '.join(tasks)}" for kind, tasks in MODEL_REGISTRY.items())
        raise ValueError(f"{name} is a checkpoint of type {found!r}. Supported: {known}.{own_code}")
    with blame_file(CONFIG_NAME, name):
        config = CONFIGS[found].from_pretrained(name, **kwargs)
    family_of(config)
    with blame_file(CONFIG_NAME, name):
        _require_valid_entries(config)
    return config


def _require_valid_entries(config: PreTrainedConfig) -> None:
    """Raises: ValueError for an entry that would fail later."""
    text, family = config.text_config, family_of(config)
    read = ("bos_token_id", "pad_token_id", "sep_token_id")
    if family.reads_prompts:  # OPT's and Vicuna's tokens are those of the tokenizer
        read = ("pad_token_id", "decoder_start_token_id") if family.language_model == "t5" else ()
    for key in read:
        if not 0 <= getattr(text, key) < text.vocab_size:
            raise ValueError(f"text_config.{key} must be a token id, 0 to {text.vocab_size - 1}")
    if not 0 <= getattr(config.vision_config, "drop_path", 0.0) < 1:
        raise ValueError("vision_config.drop_path must be between 0 and 1, 1 excluded")
    if not isinstance(getattr(config, "prompt", ""), str):
        raise TypeError("prompt must be a string")
    if not isinstance(getattr(config, "clean_questions", False), bool):
        raise TypeError("clean_questions must be true or false")
    for key in ("question_start_token", "itm_start_token"):
        if getattr(config, key, "cls") not in ("cls", "enc"):
            raise ValueError(f"{key} must be cls or enc")
    list(config.architectures or ())  # raises if it is not a list


def read_processor(name: str, config: PreTrainedConfig, kwargs: dict[str, Any]) -> ProcessorMixin:
    """Read the processor of a checkpoint. Raises: ValueError if a value in its files is invalid."""
    # without trust_remote_code, transformers asks on stdin whether to run the checkpoint's code
    with blame_file(PROCESSOR_FILES, name):
        return PROCESSORS[config.model_type].from_pretrained(name, **{**kwargs, "trust_remote_code": False})


def fit_processor(processor: ProcessorMixin, config: PreTrainedConfig, name: str) -> None:
    """Make processor and config agree on text length, image size and pixel normalization, in place.

    Raises: ValueError if the tokenizer does not have the vocabulary that the checkpoint was trained with.
    """
    tokenizer, vision = processor.tokenizer, config.vision_config
    family = family_of(config)
    if family.reads_prompts:
        _fit_prompts(processor, config, name)
    else:
        _require_vocabulary(tokenizer, config, name)
    images = processor.image_processor
    with blame_file(PROCESSOR_FILES, name):
        # Batches of blip_ft are padded on the right whatever is said here. Batches that the saved processor makes for
        # transformers' generate need padding before the prompts of a decoder-only model
        tokenizer.padding_side = "left" if family.language_model in ("opt", "llama") else "right"
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # otherwise it is not saved
        # a cut prompt still ends as the model was trained
        tokenizer.truncation_side = "left" if family.reads_prompts else "right"
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest_text(config))
        images.size = {"height": vision.image_size, "width": vision.image_size}
        vision.image_mean, vision.image_std = list(images.image_mean), list(images.image_std)
        pixels = images(Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
        if not pixels.isfinite().all():
            raise ValueError("with image_mean and image_std, a black image gives numbers that are not finite")


def _require_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    text = config.text_config
    # BLIP's [DEC] and [ENC] come right after BERT's vocabulary; the tokenizer may or may not include them
    if not text.bos_token_id <= len(tokenizer) <= text.vocab_size:
        raise ValueError(
            f"The tokenizer of {name} does not match its weights: it has {len(tokenizer)} tokens, but the model was "
            f"trained with {text.bos_token_id} to {text.vocab_size}. Check that tokenizer.json or vocab.txt exists "
            "and is complete, or copy the tokenizer's files from the checkpoint that this one was fine-tuned from."
        )


def _fit_prompts(processor: ProcessorMixin, config: PreTrainedConfig, name: str) -> None:
    """fit_processor for BLIP-2 and InstructBLIP."""
    tokenizer, rows = processor.tokenizer, config.text_config.vocab_size
    require_family(tokenizer, family_of(config), name)
    _require_rows(tokenizer, rows, name, "language model")
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    if getattr(config, "image_token_index", None) is None:  # checkpoints from before transformers 4.46
        if image_token < rows:
            config.image_token_index = image_token
        else:
            logger.warning(
                "%s has no row for the token <image>, which transformers' own batches need. Batches of blip_ft work.",
                name,
            )
    processor.num_query_tokens = config.num_query_tokens  # None in the files of some checkpoints
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(processor, InstructBlipProcessor):
        own, qformer = processor.qformer_tokenizer, config.qformer_config
        _require_rows(own, qformer.vocab_size, name, "Q-Former, in the folder qformer_tokenizer,")
        own.padding_side, own.truncation_side = "right", "left"
        own.model_max_length = min(own.model_max_length, qformer.max_position_embeddings)


def _require_rows(tokenizer: PreTrainedTokenizerBase, rows: int, name: str, part: str) -> None:
    """Raise ValueError unless the tokenizer can have the vocabulary of an embedding with this number of rows."""
    # the processor adds `<image>` to a tokenizer that lacks it, and nothing here reads that token
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    needed = max((*words, tokenizer.eos_token_id or 0)) + 1
    if not rows - MOST_PADDING < max(needed, len(tokenizer)) or needed > rows:
        raise ValueError(
            f"The tokenizer of {name} for the {part} does not match its weights: it has {len(tokenizer)} tokens, and "
            f"the embedding {rows} rows. {COPY_PROCESSOR}"
        )


def build_on_meta(task: str, config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """Build the model on the meta device, which needs no memory, and run one image and one text through it.

    Raises: ValueError if the config does not describe a model that can be built and called.
    """
    if task not in MODEL_REGISTRY[config.model_type]:
        raise ValueError(
            f"{name} is a checkpoint of {family_of(config).name}, which is not supported for {task}; supported: "
            f"{', '.join(MODEL_REGISTRY[config.model_type])}."
        )
    with blame_file(CONFIG_NAME, name), torch.device("meta"), torch.no_grad():
        described = task, config.to_json_string(use_diff=False)
        model = MODEL_REGISTRY[config.model_type][task](config)
        if described not in _CALLED:
            _call_on_meta(model.eval())
            _CALLED.add(described)
    return model.train()


# task and config of models that _call_on_meta could call: a recipe builds its model twice, and the call takes longer
_CALLED: set[tuple[str, str]] = set()


def _call_on_meta(model: PreTrainedModel) -> None:
    side, ids = model.config.vision_config.image_size, torch.zeros(1, 2, dtype=torch.long)
    images = model.encode_images(torch.empty(1, 3, side, side, dtype=torch.uint8)).last_hidden_state
    if family_of(model.config).reads_prompts and not model.qformer_reads_prompts:  # a text mask fails on meta
        model.encode_queries(images, torch.zeros(1, dtype=torch.long))
    for part, module in model.named_children():
        if part in ("text_encoder", "text_decoder"):
            module(input_ids=ids, encoder_hidden_states=images)


def task_of_config(config: PreTrainedConfig) -> str:
    """The task of the config, else vqa with a warning."""
    task = task_of(config)
    if task is None:
        logger.warning(
            "The checkpoint's config does not name a BLIP architecture; using the task vqa. Set task to change it."
        )
    return task or "vqa"


def longest_text(config: PreTrainedConfig) -> int:
    """Number of tokens that a text of the model can have."""
    # T5 has relative positions; it was pretrained on 512 tokens
    positions = getattr(config.text_config, "max_position_embeddings", 512)
    return positions - (config.num_query_tokens if family_of(config).reads_prompts else 0)


def require_positions(config: PreTrainedConfig, *with_lengths: Any) -> None:
    """Raise ValueError if a max_..._tokens or generation_max_length exceeds the model's number of positions.

    with_lengths: dataclasses of arguments.
    """
    longest = longest_text(config)
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
        base_class = (config.get("auto_mapping") or {}).get("base_model_class")
        tasks = TASKS_OF_CLASS.get(base_class, [])
        if not isinstance(base or "", str):
            raise TypeError(f"base_model_name_or_path must be a Hub id or a folder, found {base!r}")
    if not base:
        raise ValueError(
            f"The adapter {name} does not name its base checkpoint. Set base_model_name_or_path in {ADAPTER_FILE}."
        )
    if wanted_task and tasks and wanted_task not in tasks:
        raise ValueError(f"{name} is an adapter for the task {tasks[0]} and cannot be used for {wanted_task}.")
    # the revision in kwargs is the adapter's; that of the base is in the adapter's config
    return base, {**kwargs, "revision": revision}, tasks[0] if len(tasks) == 1 else None


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
