"""Load, change and save BLIP models."""

from __future__ import annotations

import copy
import errno
import json
import logging
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import load_peft_weights
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    BatchEncoding,
    BitsAndBytesConfig,
    BlipConfig,
    BlipProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations import unset_hf_deepspeed_config
from transformers.models.blip import modeling_blip
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
)

from blip_ft import inference
from blip_ft.arguments import BlipTrainingArguments, ModelArguments, PeftArguments
from blip_ft.data import demo, small_model
from blip_ft.data.images import open_image
from blip_ft.data.secrets import hide_secrets
from blip_ft.modeling import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

logger = logging.getLogger(__name__)

TASKS: dict[str, type[PreTrainedModel]] = {
    "vqa": BlipForQuestionAnswering,
    "conditional_generation": BlipForConditionalGeneration,
    "image_text_retrieval": BlipForImageTextRetrieval,
}
TASK_OF_CLASS = {cls.__name__: task for task, cls in TASKS.items()}
# every linear layer of attention and feed-forward; the head is tied to the embeddings, and merging into it changes both
LORA_TARGETS = ("query", "key", "value", "dense", "qkv", "projection", "fc1", "fc2")
ADAPTER_FILE = "adapter_config.json"
PROCESSOR_FILES = f"{PROCESSOR_NAME}, tokenizer_config.json or tokenizer.json"


class ModelLoader:
    """A BLIP checkpoint, an adapter on one, or the small `demo` model, and its processor.

    Args:
        model_name: Hub id or folder of a checkpoint or a PEFT adapter, or `demo` for new weights.
        model_type: "blip"; None or "auto" reads it from the checkpoint.
        task: a key of MODEL_REGISTRY["blip"]; None reads it from the checkpoint's architecture.
        device: None is CUDA, else MPS, else CPU.
        load_in_8bit, load_in_4bit: weights in few bits by bitsandbytes.
        torch_dtype: of the weights, also as a string; `dtype` is its newer name. Default float32.
        merge: for an adapter, add it into the weights.
        trust_remote_code: has no effect. The code of a checkpoint is never run.
        allow_pickle: where there is no .safetensors, also take a .bin; it is read with weights_only.
        allow_new_weights: also take a checkpoint that lacks weights of the model, which then start from random numbers,
            or that has weights that the model does not use, e.g. one for another task.
        image_size, label_smoothing, dropout, question_start_token, itm_start_token: change the checkpoint's own.
        kwargs: for from_pretrained, e.g. revision, token, local_files_only.
    Raises: ValueError with what to check when loading fails.
    """

    MODEL_REGISTRY = {"blip": TASKS}

    def __init__(
        self,
        model_name: str,
        model_type: str | None = None,
        task: str | None = None,
        device: str | torch.device | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | dict | None = None,
        trust_remote_code: bool = False,
        dtype: torch.dtype | str | None = None,
        merge: bool = False,
        allow_pickle: bool = False,
        allow_new_weights: bool = False,
        image_size: int | None = None,
        label_smoothing: float | None = None,
        dropout: float | None = None,
        question_start_token: Literal["cls", "enc"] | None = None,
        itm_start_token: Literal["cls", "enc"] | None = None,
        **kwargs: Any,
    ) -> None:
        if load_in_8bit and load_in_4bit:
            raise ValueError("Choose one width: load_in_8bit and load_in_4bit are both True.")
        if task is not None and task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, found {task!r}.")
        if model_type not in (None, "auto", *self.MODEL_REGISTRY):
            raise ValueError(f"model_type must be one of auto, {', '.join(self.MODEL_REGISTRY)}; found {model_type!r}.")
        if str(model_name) == "demo" and (load_in_8bit or load_in_4bit):
            raise ValueError("The demo's new weights are trained from nothing; 8 and 4 bits are for a checkpoint.")
        self.model_name, self.task = str(model_name), task
        self.device = _existing_device(device or _best_device())
        self.bits = 8 if load_in_8bit else 4 if load_in_4bit else None
        self.dtype = _dtype(dtype or torch_dtype) if dtype or torch_dtype else None
        self.device_map, self.merge = device_map, merge
        self.allow_pickle, self.allow_new_weights = allow_pickle, allow_new_weights
        self.image_size, self.label_smoothing, self.dropout = image_size, label_smoothing, dropout
        self.start_tokens = {"question_start_token": question_start_token, "itm_start_token": itm_start_token}
        if trust_remote_code:
            logger.warning("trust_remote_code has no effect: BLIP needs no code of a checkpoint, and none is run.")
        self.kwargs = {**kwargs, "trust_remote_code": False}
        self.model: PreTrainedModel | PeftModel | None = None
        self.processor: BlipProcessor | None = None

    def load(self, load_processor: bool = True) -> dict[str, Any]:
        """model, in evaluation mode, and where load_processor also processor, tokenizer and image_processor."""
        _, config, base = self._prepare(load_processor)
        name, kwargs = base[:2] if base else (self.model_name, self.kwargs)
        with _explained(name, f"The base checkpoint of the adapter {self.model_name}: " if base else ""):
            self.model = self._load_model(name, kwargs, config)
        if base:
            with _explained(self.model_name), _blamed_on(ADAPTER_FILE, self.model_name):
                self.model = _save_for_stock(PeftModel.from_pretrained(self.model, self.model_name, **self.kwargs))
        _require_finite(self.model, self.model_name)
        if self.merge and base:
            self.model = self.model.merge_and_unload()
            unfreeze_model(self.model)  # PEFT leaves the base frozen
        self.model.eval()
        if not load_processor:
            return {"model": self.model}
        return {
            "model": self.model,
            "processor": self.processor,
            "tokenizer": self.processor.tokenizer,
            "image_processor": self.processor.image_processor,
        }

    def _prepare(self, load_processor: bool = True) -> tuple[PreTrainedModel, BlipConfig, tuple | None]:
        """The model without its weights, the config to load it with, and the base of an adapter.

        Raises: ValueError for all that can be refused without the weights.
        """
        name, kwargs = self.model_name, self.kwargs
        with _explained(name):
            base = None if name == "demo" else _base_of_adapter(name, kwargs, self.task)
            if base:
                name, kwargs, task = base
                self.task = self.task or task
                if _download(self.model_name, CONFIG_NAME, self.kwargs):
                    self._take_over(_read_config(self.model_name, self.kwargs))
                if not self.allow_pickle:
                    _refuse_pickle(self.model_name, (ADAPTER_SAFE_WEIGHTS_NAME,), ADAPTER_WEIGHTS_NAME, self.kwargs)
        with _explained(name, f"The base checkpoint of the adapter {self.model_name}: " if base else ""):
            config = demo.build_demo_config() if name == "demo" else _read_config(name, kwargs)
            self._change(config)
            if self.task is None:
                self.task = _task_of(config)
            model = _outline(self.task, copy.deepcopy(config), name)
            if load_processor:
                self.processor = demo.build_demo_processor() if name == "demo" else _read_processor(name, kwargs)
                _fit_processor(self.processor, config, name)
        if self.image_size:
            model.resize_images(self.image_size)
            if load_processor:
                self.processor.image_processor.size = {"height": self.image_size, "width": self.image_size}
        if base:
            with _explained(self.model_name):
                _require_fitting_adapter(copy.deepcopy(model), self.model_name, name, self.kwargs)
        return model, config, base

    def _take_over(self, config: BlipConfig) -> None:
        """Apply the image size and start tokens saved with an adapter; its base does not know them."""
        self.image_size = self.image_size or config.vision_config.image_size
        self.start_tokens = {name: token or getattr(config, name, None) for name, token in self.start_tokens.items()}

    def _change(self, config: BlipConfig) -> None:
        """Write what the caller asked for into the config."""
        text = config.text_config
        if self.label_smoothing is not None:
            # read when the decoder is built; config.label_smoothing never reaches it
            text.label_smoothing = float(self.label_smoothing)
        if self.dropout is not None:
            text.hidden_dropout_prob = text.attention_probs_dropout_prob = float(self.dropout)
        for key, token in self.start_tokens.items():
            if token is not None:
                setattr(config, key, token)

    def get_model(self) -> PreTrainedModel | PeftModel:
        return self._loaded(self.model)

    def get_processor(self) -> BlipProcessor:
        return self._loaded(self.processor)

    def get_tokenizer(self) -> Any:
        return self._loaded(self.processor).tokenizer

    def get_image_processor(self) -> Any:
        return self._loaded(self.processor).image_processor

    def _loaded(self, part: Any) -> Any:
        if part is None:
            raise ValueError("It is not loaded yet: call load() first, with load_processor=True for the processor.")
        return part

    def _load_model(self, name: str, kwargs: dict[str, Any], config: BlipConfig) -> PreTrainedModel:
        # weights stored in few bits go with the dtype that they were stored with
        dtype = self.dtype or ("auto" if getattr(config, "quantization_config", None) else torch.float32)
        if name == "demo":
            model = _new_model(self.task, config).to(self.device, None if dtype == "auto" else dtype)
        else:
            if not self.allow_pickle:
                _refuse_pickle(name, (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), WEIGHTS_NAME, kwargs)
            settings = {"config": config, "dtype": dtype, **kwargs, "weights_only": True, "output_loading_info": True}
            settings["use_safetensors"] = not self.allow_pickle or None  # None: safetensors first
            if self.bits or self.device_map:
                settings["device_map"] = self.device_map or {"": self.device}
            if self.bits:
                settings["quantization_config"] = _quantization(self.bits, self.device)
            with _blamed_on(f"{CONFIG_NAME} or {GENERATION_CONFIG_NAME}", name):
                model, info = TASKS[self.task].from_pretrained(name, **settings)
            self._require_own_weights(model, info, name)
            if not getattr(config, "quantization_config", None):
                _require_floats(model, name, kwargs)
        if self.image_size and self.image_size != config.vision_config.image_size:
            model.resize_images(self.image_size)
        if self.device.type == "cpu":
            for module in model.modules():
                # with AVX512-BF16, bitsandbytes 0.50 repacks the weights in evaluation and then fails in training
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False
        placed = self.bits or self.device_map or getattr(config, "quantization_config", None)
        return model if placed else model.to(self.device)

    def _require_own_weights(self, model: PreTrainedModel, info: dict[str, Any], name: str) -> None:
        """Raise ValueError, or warn if it is allowed, unless the checkpoint has the model's weights and no others."""
        known = model.state_dict()
        lacking, surplus = (_parts(info[key], known) for key in ("missing_keys", "unexpected_keys"))
        found = [
            *([f"it has no weights for {lacking}, which would start from random numbers"] if lacking else []),
            *([f"its weights of {surplus} would not be used"] if surplus else []),
        ]
        if not found:
            return
        message = (
            f"{name} does not fit {type(model).__name__} as its {CONFIG_NAME} describes it: {', and '.join(found)}."
        )
        if not self.allow_new_weights:
            raise ValueError(
                f"{message} Check that the folder is complete, that its files belong together, and that it was made "
                f"for the task {self.task}. To start from it nevertheless, add --allow_new_weights (load_model: "
                "allow_new_weights=True)."
            )
        logger.warning(message)


def load_model(
    model_name: str,
    model_type: str | None = None,
    task: str | None = None,
    device: str | torch.device | None = None,
    load_processor: bool = True,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    torch_dtype: torch.dtype | str | None = None,
    device_map: str | dict | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """ModelLoader(...).load(load_processor) in one call: a dict of model, processor, tokenizer and image_processor."""
    loader = ModelLoader(
        *(model_name, model_type, task, device, load_in_8bit, load_in_4bit, torch_dtype, device_map, trust_remote_code),
        **kwargs,
    )
    return loader.load(load_processor)


def build_small_blip(
    task: str,
    texts: Iterable[str],
    image_size: int = 64,
    patch_size: int = 8,
    width: int = 128,
    num_heads: int = 4,
    vision_layers: int = 3,
    text_layers: int = 2,
    max_tokens: int = 64,
    initializer_range: float = 0.08,
) -> tuple[PreTrainedModel, BlipProcessor]:
    """A BLIP of about 2 M parameters with new weights, and its processor; save_model makes a checkpoint of them.

    For small, plain images and few words: a test of data, a lesson, a program without the Hub. It knows nothing, so for
    photographs and free text start from a checkpoint of the Hub. `demo` is such a model with patches of 32 pixels, for
    the demo's images alone: other data need patches no larger than what is asked about.

    Args:
        task: a key of MODEL_REGISTRY["blip"].
        texts: questions, answers and captions of the training data. Their words become tokens; others are spelt.
        image_size, patch_size: pixels a side; the first is a multiple of the second.
        width, num_heads: of the states of both images and texts, and of their attention.
        max_tokens: the longest text; keep max_question_tokens and the like at or below it.
        initializer_range: standard deviation of new weights. At the usual 0.02 a model this small learns for long from
            the texts alone: on data that can be answered to 67 % without the images it was at 65.5 and 71.8 % after 300
            steps (two seeds), with 0.08 at 79.3 and 84.4 %.
    Raises: ValueError for an unknown task and for sizes that do not fit.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, found {task!r}.")
    processor = small_model.build_small_processor(texts, image_size)
    config = small_model.build_small_config(
        *(processor, patch_size, width, num_heads, vision_layers, text_layers, max_tokens, initializer_range)
    )
    model = _new_model(task, config)
    _fit_processor(processor, model.config, "build_small_blip")
    return model.eval(), processor


def _new_model(task: str, config: BlipConfig) -> PreTrainedModel:
    model = TASKS[task](config)
    small_model.init_position_embeddings(model)
    return model


def load_processor(model_name: str, image_size: int | None = None, **kwargs: Any) -> BlipProcessor:
    """The processor that load_model gives, without loading weights. Arguments and errors as of ModelLoader."""
    loader = ModelLoader(model_name, device="cpu", image_size=image_size, **kwargs)
    loader._prepare()
    return loader.get_processor()


def outline(
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


def load_for_training(
    task: str, model_args: ModelArguments, peft_args: PeftArguments, training_args: BlipTrainingArguments
) -> tuple[PreTrainedModel | PeftModel, BlipProcessor]:
    """Model and processor as the arguments say: resized, smoothed, frozen, in few bits, with an adapter.

    What outline would refuse is not looked for again.
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
    return _save_for_stock(adapted)


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


def get_model_size_mb(model: PreTrainedModel | PeftModel) -> float:
    """Memory of parameters and buffers in MiB; a tied one counts once."""
    return model.get_memory_footprint() / 2**20


def get_device(model: nn.Module) -> torch.device:
    """The device of the first parameter; a device_map may have put others elsewhere."""
    return next(model.parameters()).device


def move_model_to_device(model: nn.Module, device: str | torch.device) -> nn.Module:
    """The same model, moved. Raises: ValueError for a device that is not there."""
    return model.to(_existing_device(device))


def save_model(
    model: PreTrainedModel | PeftModel,
    save_path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: BlipProcessor | None = None,
) -> None:
    """Weights (safetensors) or adapter, config, and the files of processor and tokenizer; stock loads them."""
    for part in (model, processor, tokenizer):
        if part is not None:
            part.save_pretrained(str(save_path))


def load_model_from_path(
    model_path: str | Path, model_class: type[PreTrainedModel], device: str | torch.device | None = None
) -> PreTrainedModel | PeftModel:
    """The model of a folder, in evaluation mode.

    Args:
        model_class: one of the three BLIP classes, ours or transformers'. Either gives ours: it is a subclass of
            transformers' class of that name, and transformers 5.23's own ignores the padding of questions.
        device: None is CUDA, else MPS, else CPU.
    Raises: ValueError for another class, and with what to check when loading fails.
    """
    if model_class.__name__ not in TASK_OF_CLASS:
        raise ValueError(f"model_class must be one of {', '.join(TASK_OF_CLASS)}, found {model_class.__name__}.")
    task = TASK_OF_CLASS[model_class.__name__]
    return load_model(str(model_path), task=task, device=device, load_processor=False)["model"]


def generate_answer_blip(
    model: PreTrainedModel | PeftModel,
    processor: BlipProcessor,
    image: Any,
    question: str | Sequence[str],
    max_length: int = 20,
    num_beams: int = 3,
) -> str | list[str]:
    """The answer to a question about a picture; for lists a list, the same as one by one.

    Args:
        image: path, bytes or PIL image, or a list of these. One picture goes with every question of a list, and one
            question with every picture. A picture that stands several times in a list is encoded once.
        max_length: tokens of an answer, [DEC] and [SEP] among them.
    Raises: ValueError for lists of different lengths, and for a model that answers no questions.
    """
    blip = without_adapter(model)
    if not isinstance(blip, BlipForQuestionAnswering):
        raise ValueError(
            f"Answering needs blip_ft's BlipForQuestionAnswering, found {type(blip).__module__}.{type(blip).__name__}. "
            'Load it with load_model(..., task="vqa").'
        )
    questions = [question] if isinstance(question, str) else list(question)
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(images) == 1:
        images *= len(questions)
    elif len(questions) == 1:
        questions *= len(images)
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} pictures and {len(questions)} questions: give equally many, or one of either.")
    training = model.training
    model.eval()
    try:
        answers = inference.answer_questions(blip, processor, images, questions, max_length, num_beams)
    finally:
        model.train(training)
    return answers[0] if isinstance(question, str) and not isinstance(image, (list, tuple)) else answers


def prepare_inputs_for_blip(
    processor: BlipProcessor, images: Any, texts: str | Sequence[str], device: str | torch.device | None = None
) -> BatchEncoding:
    """What forward and generate take: pixel_values (rows, 3, height, width), input_ids, attention_mask (rows, length).

    Args:
        images: path, bytes or PIL image, or a list of these; any mode, turned upright.
        texts: one for each picture.
        device: None leaves the tensors on the CPU.
    Raises: ValueError for different numbers of pictures and texts.
    """
    images = images if isinstance(images, (list, tuple)) else [images]
    texts = [texts] if isinstance(texts, str) else list(texts)
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} pictures and {len(texts)} texts: give one text for each picture.")
    inputs = processor(
        images=[open_image(image) for image in images], text=texts, padding=True, truncation=True, return_tensors="pt"
    )
    return inputs if device is None else inputs.to(_existing_device(device))


def get_model_info(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Class, task, numbers of parameters, size in MiB, device, dtype and picture size of a model."""
    blip = without_adapter(model)
    counts = count_parameters(model)
    return {
        "model_class": type(blip).__name__,
        "task": TASK_OF_CLASS.get(type(blip).__name__),
        "total_parameters": counts["total"],
        "total_parameters_millions": counts["total_millions"],
        "trainable_parameters": counts["trainable"],
        "trainable_parameters_millions": counts["trainable_millions"],
        "size_mb": get_model_size_mb(model),
        "device": str(get_device(model)),
        "dtype": str(blip.dtype).removeprefix("torch."),
        "image_size": blip.config.vision_config.image_size,
        "is_adapter": isinstance(model, PeftModel),
    }


def print_model_summary(model: PreTrainedModel | PeftModel, detailed: bool = False) -> None:
    """Print a table of the model's parts; detailed also shows what each part is made of."""
    blip = without_adapter(model)
    parts = dict(blip.named_children())
    if detailed:
        parts = {
            path: inner
            for name, part in parts.items()
            for path, inner in ((name, part), *((f"  {name}.{child}", inner) for child, inner in part.named_children()))
        }
    rows = [("part", "parameters", "trainable", "size", "dtype", "device")]
    for name, part in {**parts, type(blip).__name__: blip}.items():
        tensors = list(part.parameters())
        if tensors:  # not dropout and activations
            counts = count_parameters(part)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
            rows.append(
                (
                    *(name, f"{counts['total']:,}", f"{counts['trainable']:,}", f"{size:.1f} MiB"),
                    ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
                    ", ".join(sorted({str(tensor.device) for tensor in tensors})),
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        name, *numbers, dtype, device = (
            cell.ljust(width) if column in (0, 4, 5) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([name, *numbers, dtype, device]).rstrip())  # noqa: T201 (the one function that prints)


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


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _existing_device(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"There is no device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices. "
            "device=None takes the best there is."
        )
    return device


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    named = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(named, torch.dtype):
        raise ValueError(f"dtype is a torch dtype or its name, e.g. bfloat16, or auto; found {dtype!r}.")
    return named


def _quantization(bits: int, device: torch.device) -> BitsAndBytesConfig:
    if bits == 8:
        # bitsandbytes 0.50 says at every call of every layer that it casts to float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _task_of(config: BlipConfig) -> str:
    for name in config.architectures or ():
        if name in TASK_OF_CLASS:
            return TASK_OF_CLASS[name]
    logger.warning("The checkpoint names no BLIP architecture; taking the task vqa. Set task to choose another.")
    return "vqa"


@contextmanager
def _explained(name: str, of: str = "") -> Iterator[None]:
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
        raise ValueError(of + _what_to_check(name, error)) from error


@contextmanager
def _blamed_on(file: str, name: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into a ValueError that names the config file: only its values can be the cause.

    Not what _explained tells apart: a file that cannot be had or read, and weights of other shapes.
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


def _read_config(name: str, kwargs: dict[str, Any]) -> BlipConfig:
    with _blamed_on(CONFIG_NAME, name):
        content, _ = BlipConfig.get_config_dict(name, **kwargs)
        json.dumps(content, allow_nan=False)
    if "model_type" not in content:
        raise EntryNotFoundError(f"there is no {CONFIG_NAME} with a model_type")
    found = content["model_type"]
    if found != BlipConfig.model_type:
        own_code = " It brings code of its own, which is never run here." if "auto_map" in content else ""
        raise ValueError(
            f"{name} is a checkpoint of type {found!r}; supported: {', '.join(ModelLoader.MODEL_REGISTRY)} (BLIP of "
            f"2022, not BLIP-2 or InstructBLIP) with the tasks {', '.join(TASKS)}.{own_code}"
        )
    with _blamed_on(CONFIG_NAME, name):
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


def _outline(task: str, config: BlipConfig, name: str) -> PreTrainedModel:
    """The model without weights and memory, after it has read an image and a text of no content.

    Raises: ValueError if the config does not describe a model that can be built and called.
    """
    with _blamed_on(CONFIG_NAME, name), torch.device("meta"), torch.no_grad():
        model = TASKS[task](config).eval()
        side = config.vision_config.image_size
        images = model.encode_images(torch.empty(1, 3, side, side, dtype=torch.uint8)).last_hidden_state
        for part, module in model.named_children():
            if part in ("text_encoder", "text_decoder"):
                module(input_ids=torch.zeros(1, 2, dtype=torch.long), encoder_hidden_states=images)
    return model.train()


def _read_processor(name: str, kwargs: dict[str, Any]) -> BlipProcessor:
    # with trust_remote_code left out, transformers asks on stdin whether to run a checkpoint's code
    with _blamed_on(PROCESSOR_FILES, name):
        return BlipProcessor.from_pretrained(name, **{**kwargs, "trust_remote_code": False})


def _fit_processor(processor: BlipProcessor, config: BlipConfig, name: str) -> None:
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
    with _blamed_on(PROCESSOR_FILES, name):
        # the loss and the first token, [DEC], are read from the left
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
        images.size = {"height": vision.image_size, "width": vision.image_size}
        vision.image_mean, vision.image_std = list(images.image_mean), list(images.image_std)
        pixels = images(Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
        if not pixels.isfinite().all():
            raise ValueError("image_mean and image_std turn a black image into numbers that are not finite")


def _require_fitting_adapter(model: PreTrainedModel, name: str, base: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError unless the adapter's weights are those that its config asks for on this model.

    model: without weights, as _outline gives it.
    """
    known = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    with _blamed_on(ADAPTER_FILE, name), torch.device("meta"):
        config = PeftConfig.from_pretrained(name, **known)
        config.init_lora_weights = False  # some ways compute with the base's weights
        wanted = get_peft_model_state_dict(PeftModel(model, config), save_embedding_layers=False)
    saved = load_peft_weights(name, device="cpu", **known)
    found = [
        *([f"it has no weights for {parts}"] if (parts := _parts(wanted.keys() - saved.keys(), wanted)) else []),
        *([f"its weights of {parts} have no place"] if (parts := _parts(saved.keys() - wanted.keys(), wanted)) else []),
    ]
    shapes = [key for key in wanted.keys() & saved.keys() if wanted[key].shape != saved[key].shape]
    if shapes:
        found.append(f"its weights of {_parts(shapes, wanted)} have other shapes")
    if found:
        raise ValueError(
            f"The adapter {name} does not fit its base {base} ({type(model).__name__}): {', and '.join(found)}. Let "
            f"base_model_name_or_path in {ADAPTER_FILE} name the checkpoint that it was trained on."
        )


def _require_floats(model: nn.Module, name: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for weights saved as whole numbers, which transformers would take as they are, rounded."""
    if not (file := _download(name, SAFE_WEIGHTS_NAME, kwargs)):
        return  # in several files, or a pickle
    with safe_open(file, "pt") as weights:
        saved = set(weights.keys()) & {key for key, _ in model.named_parameters(remove_duplicate=False)}
        whole = [key for key in saved if "F" not in weights.get_slice(key).get_dtype()]  # F32, BF16, ...
    if whole:
        raise ValueError(f"{name} has its weights of {_listed(sorted(whole))} as whole numbers. Save it as floats.")


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """(), True if no number of a tensor is NaN or infinite; on its device, so that asking does not wait for it."""
    if not tensor.numel():
        return torch.tensor(True, device=tensor.device)
    # the least and the greatest number are NaN if any is; twelve times as fast as isfinite on every number
    return torch.stack(tensor.aminmax()).isfinite().all()


def _require_finite(model: nn.Module, name: str) -> None:
    """Raise ValueError for weights that are NaN or infinite: every answer would be empty or wrong."""
    broken = [
        key
        for key, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not tensor.is_meta and not is_finite(tensor)
    ]
    if broken:
        raise ValueError(
            f"{name} has weights that are NaN or infinite, in {_listed(broken)}. Take an earlier checkpoint, or save "
            "or download it anew. If it was loaded in float16, try float32 or bfloat16."
        )


def _parts(keys: Iterable[str], known: Iterable[str]) -> str:
    """The fewest dotted names that stand for keys and for no other of the known ones, in words."""
    keys = set(keys)
    prefixes_of_others = {prefix for key in set(known) - keys for prefix in _prefixes(key)}
    return _listed({next(prefix for prefix in _prefixes(key) if prefix not in prefixes_of_others) for key in keys})


def _prefixes(key: str) -> list[str]:
    """a, a.b, a.b.c of a.b.c."""
    names = key.split(".")
    return [".".join(names[:length]) for length in range(1, len(names) + 1)]


def _listed(names: Iterable[str], most: int = 10) -> str:
    first, more = sorted(names)[:most], len(set(names)) - most
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _tied_names(model: nn.Module) -> set[str]:
    """The names of parameters that stand in the model at several places."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _stock_class(stock: type, is_prompt_tuning: bool = False) -> type:
    return stock


def _save_for_stock(adapted: PeftModel) -> PeftModel:
    # peft 0.21 saves the class's module as `parent_library`, and AutoPeftModel refuses all but those it knows: stock's
    # class of the same name has the same weights
    stock = getattr(modeling_blip, type(adapted.get_base_model()).__name__)
    adapted._get_base_model_class = partial(_stock_class, stock)
    return adapted


def _base_of_adapter(
    name: str, kwargs: dict[str, Any], wanted_task: str | None
) -> tuple[str, dict[str, Any], str | None] | None:
    """If name is a folder or Hub id of a PEFT adapter: its base checkpoint, the arguments to load that with, and the
    task that the adapter was trained for, which its base need not have; None if it does not say.

    Raises: ValueError for an adapter of another task than the wanted one.
    """
    file = _download(name, ADAPTER_FILE, kwargs)
    if file is None:
        return None
    with _blamed_on(ADAPTER_FILE, name):
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


def _refuse_pickle(name: str, safe: Sequence[str], pickled: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError where name has its weights as the pickled file and none of the safe ones."""
    if not any(_download(name, file, kwargs) for file in safe) and _download(name, pickled, kwargs):
        raise ValueError(
            f"{name} has its weights as {pickled} only, a pickle, which can run any code when it is read. Ask for "
            f"{safe[0]}; or, if you trust where it comes from, add --allow_pickle (load_model: allow_pickle=True)."
        )


def _download(name: str, file: str, kwargs: dict[str, Any]) -> Path | None:
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


def _what_to_check(name: str, error: Exception) -> str:
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
