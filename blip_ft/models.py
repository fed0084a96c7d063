"""Load, change and save BLIP models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, BlipProcessor, PreTrainedModel
from transformers.models.blip import modeling_blip

from blip_ft import demo
from blip_ft.arguments import ModelArguments, PeftArguments
from blip_ft.modeling import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

logger = logging.getLogger(__name__)

TASKS: dict[str, type[PreTrainedModel]] = {
    "vqa": BlipForQuestionAnswering,
    "conditional_generation": BlipForConditionalGeneration,
    "image_text_retrieval": BlipForImageTextRetrieval,
}
# every linear layer of attention and feed-forward; the head is tied to the embeddings, and merging into it changes both
LORA_TARGETS = ("query", "key", "value", "dense", "qkv", "projection", "fc1", "fc2")
ADAPTER_FILE = "adapter_config.json"


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
        image_size, label_smoothing, dropout: change the checkpoint's own.
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
        image_size: int | None = None,
        label_smoothing: float | None = None,
        dropout: float | None = None,
        **kwargs: Any,
    ) -> None:
        if load_in_8bit and load_in_4bit:
            raise ValueError("Choose one width: load_in_8bit and load_in_4bit are both True.")
        if task is not None and task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, found {task!r}.")
        if model_type not in (None, "auto", *self.MODEL_REGISTRY):
            raise ValueError(f"model_type must be one of auto, {', '.join(self.MODEL_REGISTRY)}; found {model_type!r}.")
        self.model_name, self.task = model_name, task
        self.device = torch.device(device or _best_device())
        self.bits = 8 if load_in_8bit else 4 if load_in_4bit else None
        self.dtype = dtype or torch_dtype or torch.float32
        self.device_map, self.merge = device_map, merge
        self.image_size, self.label_smoothing, self.dropout = image_size, label_smoothing, dropout
        self.kwargs = {"trust_remote_code": trust_remote_code, **kwargs}
        self.model: PreTrainedModel | PeftModel | None = None
        self.processor: BlipProcessor | None = None

    def load(self, load_processor: bool = True) -> dict[str, Any]:
        """model, in evaluation mode, and where load_processor also processor, tokenizer and image_processor."""
        adapter = None
        name = self.model_name
        if name != "demo":
            base = _base_of_adapter(name, self.kwargs)
            name, adapter = base or name, name if base else None
        try:
            self.processor = (
                demo.build_demo_processor() if name == "demo" else BlipProcessor.from_pretrained(name, **self.kwargs)
            )
            self.model = self._load_model(name)
        except (OSError, HFValidationError) as error:
            raise ValueError(_what_to_check(name, error)) from error
        size = self.model.config.vision_config.image_size
        self.processor.image_processor.size = {"height": size, "width": size}
        vision = self.model.config.vision_config
        vision.image_mean = list(self.processor.image_processor.image_mean)
        vision.image_std = list(self.processor.image_processor.image_std)
        if adapter:
            self.model = PeftModel.from_pretrained(self.model, adapter)
            if self.merge:
                self.model = self.model.merge_and_unload()
        self.model.eval()
        result = {"model": self.model}
        if load_processor:
            result |= {
                "processor": self.processor,
                "tokenizer": self.processor.tokenizer,
                "image_processor": self.processor.image_processor,
            }
        return result

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
            raise ValueError("Nothing is loaded yet: call load() first.")
        return part

    def _load_model(self, name: str) -> PreTrainedModel:
        config = demo.build_demo_config() if name == "demo" else AutoConfig.from_pretrained(name, **self.kwargs)
        if config.model_type != "blip":
            raise ValueError(
                f"{name} is a checkpoint of type {config.model_type!r}; supported: blip (BLIP, not BLIP-2)."
            )
        if self.task is None:
            self.task = _task_of(config)
        text = config.text_config
        if self.label_smoothing is not None:
            # read when the decoder is built; config.label_smoothing never reaches it
            text.label_smoothing = self.label_smoothing
        if self.dropout is not None:
            text.hidden_dropout_prob = text.attention_probs_dropout_prob = self.dropout
        if name == "demo":
            model = TASKS[self.task](config)
            demo.set_apart_positions(model)
        else:
            settings = {"config": config, "dtype": self.dtype, **self.kwargs}
            if self.bits or self.device_map:
                settings["device_map"] = self.device_map or {"": self.device}
            if self.bits:
                settings["quantization_config"] = _quantization(self.bits, self.device)
            model = TASKS[self.task].from_pretrained(name, **settings)
        if self.image_size and self.image_size != config.vision_config.image_size:
            model.resize_images(self.image_size)
        if self.bits == 4 and self.device.type == "cpu":
            for module in model.modules():
                # with AVX512-BF16, bitsandbytes 0.50 repacks the weights in evaluation and then fails in training
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False
        return model if self.bits or self.device_map else model.to(self.device)


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


def load_for_training(
    task: str, model_args: ModelArguments, peft_args: PeftArguments, device: torch.device
) -> tuple[PreTrainedModel | PeftModel, BlipProcessor]:
    """Model and processor as the arguments say: resized, smoothed, frozen, in few bits, with an adapter."""
    loaded = load_model(
        model_args.model_name_or_path,
        task=task,
        device=device,
        load_in_8bit=peft_args.load_in_8bit,
        load_in_4bit=peft_args.load_in_4bit,
        image_size=model_args.image_size,
        label_smoothing=model_args.label_smoothing,
        dropout=model_args.dropout,
        revision=model_args.model_revision,
        # an adapter given to start from becomes part of the weights, and a new one is trained
        merge=True,
    )
    model = add_lora(loaded["model"], peft_args) if peft_args.use_peft else loaded["model"]
    frozen = model_args.frozen_parts
    unknown = unknown_layers(model, frozen)
    if unknown:
        raise ValueError(
            f"freeze names parts of the model; {', '.join(unknown)} is none. There are {', '.join(part_names(model))}, "
            "and their parts, e.g. vision_model.encoder.layers.0"
        )
    if frozen:
        freeze_model(model, frozen)
    counts = count_parameters(model)
    if not counts["trainable"]:
        raise ValueError("Everything is frozen, so nothing would be trained. Take something out of freeze.")
    logger.info(
        "%s: %.1f M parameters, %.1f M of them trained",
        type(loaded["model"]).__name__,
        *(counts["total_millions"], counts["trainable_millions"]),
    )
    return model, loaded["processor"]


def add_lora(model: PreTrainedModel, args: PeftArguments) -> PeftModel:
    """The model with a new trainable LoRA adapter, and all else frozen. It saves for stock PEFT and transformers."""
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(args.lora_target_modules or LORA_TARGETS),
        # the head's transform; its output layer is the embedding table
        exclude_modules=r".*\.cls\..*",
        task_type=None,  # every other one makes PEFT pass inputs_embeds, which BLIP has no place for
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"lora_target_modules must name linear layers of the model: {error}") from error
    # peft 0.21 saves the class's module as `parent_library`, and AutoPeftModel refuses all but those it knows: stock's
    # class of the same name has the same weights
    stock = getattr(modeling_blip, type(model).__name__)
    adapted._get_base_model_class = lambda is_prompt_tuning=False: stock
    return adapted


def freeze_model(model: nn.Module, freeze_layers: list[str] | None = None) -> None:
    """Stop training the named parts, or all. A name matches whole dotted parts of parameter names."""
    _set_requires_grad(model, freeze_layers, False)


def unfreeze_model(model: nn.Module, unfreeze_layers: list[str] | None = None) -> None:
    """Train the named parts, or all. A name matches whole dotted parts of parameter names."""
    _set_requires_grad(model, unfreeze_layers, True)


def unknown_layers(model: nn.Module, names: list[str]) -> list[str]:
    """Those names that match no parameter of the model."""
    parameters = [f".{name}." for name, _ in model.named_parameters()]
    return [name for name in names if not any(f".{name}." in parameter for parameter in parameters)]


def part_names(model: nn.Module) -> list[str]:
    """The model's largest named parts, e.g. vision_model, text_encoder, text_decoder."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
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


def _set_requires_grad(model: nn.Module, names: list[str] | None, value: bool) -> None:
    unknown = unknown_layers(model, names or [])
    if unknown:
        logger.warning("No parameter is named %s; the parts are %s.", ", ".join(unknown), ", ".join(part_names(model)))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and (not names or any(f".{part}." in f".{name}." for part in names)):
            parameter.requires_grad = value


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _quantization(bits: int, device: torch.device) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _task_of(config: Any) -> str:
    for task, cls in TASKS.items():
        if cls.__name__ in (config.architectures or ()):
            return task
    logger.warning("The checkpoint names no BLIP architecture; taking the task vqa. Set task to choose another.")
    return "vqa"


def _base_of_adapter(name: str, kwargs: dict[str, Any]) -> str | None:
    """The base checkpoint, where name is a folder or Hub id of a PEFT adapter."""
    path = Path(name) / ADAPTER_FILE
    if Path(name).exists():
        if not path.is_file():
            return None
    else:
        try:
            path = hf_hub_download(name, ADAPTER_FILE, revision=kwargs.get("revision"), token=kwargs.get("token"))
        except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError, OSError):
            return None  # no adapter; whatever else is wrong shows when the checkpoint itself is read
    return json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"]


def _what_to_check(name: str, error: Exception) -> str:
    path = Path(name)
    if path.exists():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:20]) if path.is_dir() else "a file"
        way_out = (
            f"{name} must be a folder with config.json, model.safetensors and the processor's files; found: {found}."
        )
    elif path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        way_out = f"There is no folder {name}. Check the path."
    else:
        way_out = (
            f"{name} is no folder here and could not be had from the Hub. Check the spelling (owner/name), the "
            "network, free disk space, and HF_TOKEN for a private or gated one."
        )
    return f"{way_out}\nThe loader said: {str(error).splitlines()[0]}"
