"""Load, inspect, use and save models of the BLIP family."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BatchEncoding,
    BlipProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
)

from blip_ft.arguments.families import RECIPES, family_of
from blip_ft.data.images import open_image
from blip_ft.data.text_formats import encode_prompts
from blip_ft.modeling import inference
from blip_ft.modeling.adapters import count_parameters, freeze_model, save_for_stock, unfreeze_model, without_adapter
from blip_ft.modeling.checkpoint_files import (
    ADAPTER_FILE,
    OWN_ENTRIES,
    base_of_adapter,
    build_on_meta,
    find_file,
    fit_processor,
    read_config,
    read_processor,
    refuse_pickle,
    task_of_config,
)
from blip_ft.modeling.loading_errors import blame_file, explain_loading
from blip_ft.modeling.placement import (
    best_device,
    existing_device,
    keep_quantized_layout,
    quantization_config,
    to_dtype,
)
from blip_ft.modeling.registry import MODEL_REGISTRY, TASKS_OF_CLASS, task_of
from blip_ft.modeling.small_blip import build_demo_config, build_demo_processor, build_new_model, build_small_blip
from blip_ft.modeling.summary import get_device, get_model_info, get_model_size_mb, print_model_summary
from blip_ft.modeling.weight_checks import (
    require_finite_weights,
    require_fitting_adapter,
    require_floats,
    require_matching_weights,
)

__all__ = [
    "ModelLoader",
    "build_small_blip",
    "count_parameters",
    "freeze_model",
    "generate_answer_blip",
    "get_device",
    "get_model_info",
    "get_model_size_mb",
    "load_model",
    "load_model_from_path",
    "move_model_to_device",
    "prepare_inputs_for_blip",
    "print_model_summary",
    "save_model",
    "unfreeze_model",
]

logger = logging.getLogger(__name__)


class ModelLoader:
    """Load a checkpoint of the BLIP family, a PEFT adapter with its base, or the small `demo` model, and the processor.

    Args:
        model_name: Hub id or folder of a checkpoint or a PEFT adapter, or `demo` for a small model with new weights.
        model_type: a key of MODEL_REGISTRY. None or "auto" reads it from the checkpoint.
        task: a key of MODEL_REGISTRY[model_type]. None reads it from the checkpoint.
        device: None uses the accelerator (CUDA, MPS, ...) if there is one, else the CPU.
        load_in_8bit, load_in_4bit: quantize the weights with bitsandbytes.
        torch_dtype: dtype of the weights, or its name. `dtype` is the newer name of this argument. Default: float32.
        device_map: passed to from_pretrained, e.g. "auto".
        merge: merge an adapter into the weights of its base.
        trust_remote_code: has no effect. Code of a checkpoint is never run.
        allow_pickle: load a .bin file if there is no .safetensors file. It is loaded with weights_only.
        allow_new_weights: accept a checkpoint without some of the model's weights, which are then randomly initialized,
            or with weights that the model does not use, e.g. a checkpoint for another task.
        image_size: replaces that of the checkpoint, whose position embeddings are resized.
        label_smoothing, dropout, drop_path: replace the values of the checkpoint's config. BLIP only. drop_path is the
            stochastic depth of the vision model in training, the rate of its last layer.
        kwargs: passed to from_pretrained, e.g. revision, token, local_files_only.
    Raises: ValueError, which says what to check if loading fails.
    """

    MODEL_REGISTRY = MODEL_REGISTRY

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
        drop_path: float | None = None,
        **kwargs: Any,
    ) -> None:
        if load_in_8bit and load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit are mutually exclusive.")
        if task is not None and task not in RECIPES:
            raise ValueError(f"task must be one of {', '.join(RECIPES)}, found {task!r}.")
        if model_type not in (None, "auto", *self.MODEL_REGISTRY):
            raise ValueError(f"model_type must be one of auto, {', '.join(self.MODEL_REGISTRY)}; found {model_type!r}.")
        if str(model_name) == "demo" and (load_in_8bit or load_in_4bit):
            raise ValueError("The demo model is randomly initialized; quantization needs a pretrained checkpoint.")
        self.model_name, self.task = str(model_name), task
        self.model_type = None if model_type == "auto" else model_type
        self.device = existing_device(device or best_device())
        self.bits = 8 if load_in_8bit else 4 if load_in_4bit else None
        self.dtype = to_dtype(dtype or torch_dtype) if dtype or torch_dtype else None
        self.device_map, self.merge = device_map, merge
        self.allow_pickle, self.allow_new_weights = allow_pickle, allow_new_weights
        self.image_size, self.label_smoothing = image_size, label_smoothing
        self.dropout, self.drop_path = dropout, drop_path
        if trust_remote_code:
            logger.warning("trust_remote_code has no effect: code of a checkpoint is never run.")
        self.kwargs = {**kwargs, "trust_remote_code": False}
        self.own_entries: dict[str, str] = {}  # OWN_ENTRIES saved with an adapter
        self.model: PreTrainedModel | PeftModel | None = None
        self.processor: ProcessorMixin | None = None

    def load(self, load_processor: bool = True) -> dict[str, Any]:
        """Load the model in evaluation mode, and the processor if load_processor is True.

        Returns: dict with model and, if load_processor is True, processor, tokenizer and image_processor.
        """
        _, config, base = self._prepare(load_processor)
        name, kwargs = base[:2] if base else (self.model_name, self.kwargs)
        with explain_loading(name, f"The base checkpoint of the adapter {self.model_name}: " if base else ""):
            self.model = self._load_model(name, kwargs, config)
        if base:
            with explain_loading(self.model_name), blame_file(ADAPTER_FILE, self.model_name):
                self.model = save_for_stock(PeftModel.from_pretrained(self.model, self.model_name, **self.kwargs))
        require_finite_weights(self.model, self.model_name)
        if self.merge and base:
            self.model = self.model.merge_and_unload()
            unfreeze_model(self.model)  # PEFT leaves the base frozen
        self.model.eval()
        if not load_processor:
            return {"model": self.model}
        parts = {"tokenizer": self.get_tokenizer(), "image_processor": self.get_image_processor()}
        return {"model": self.model, "processor": self.processor, **parts}

    def _prepare(self, load_processor: bool = True) -> tuple[PreTrainedModel, PreTrainedConfig, tuple | None]:
        """Read everything except the weights, and check it. The processor is stored in self.processor.

        Returns: the model on the meta device, the config to load it with, and the base of an adapter, see
            base_of_adapter.
        Raises: ValueError for every problem that can be found without the weights.
        """
        name, kwargs = self.model_name, self.kwargs
        with explain_loading(name):
            base = None if name == "demo" else base_of_adapter(name, kwargs, self.task)
            if base:
                name, kwargs, task = base
                self.task = self.task or task
                if find_file(self.model_name, CONFIG_NAME, self.kwargs):
                    self._apply_adapter_config(read_config(self.model_name, self.kwargs))
                if not self.allow_pickle:
                    refuse_pickle(self.model_name, (ADAPTER_SAFE_WEIGHTS_NAME,), ADAPTER_WEIGHTS_NAME, self.kwargs)
        with explain_loading(name, f"The base checkpoint of the adapter {self.model_name}: " if base else ""):
            config = build_demo_config() if name == "demo" else read_config(name, kwargs)
            if self.model_type not in (None, config.model_type):
                raise ValueError(f"{name} has the model_type {config.model_type}, and {self.model_type} was asked for.")
            self._update(config)
            if self.task is None:
                self.task = task_of_config(config)
            elif self.task != task_of(config) and hasattr(config, "prompt"):
                del config.prompt  # it was trained for the other task
            config.task = self.task
            model = build_on_meta(self.task, copy.deepcopy(config), name)
            if load_processor:
                self.processor = build_demo_processor() if name == "demo" else read_processor(name, config, kwargs)
                fit_processor(self.processor, config, name)
        if self.image_size:
            model.resize_position_embeddings(self.image_size)
            if load_processor:
                self.processor.image_processor.size = {"height": self.image_size, "width": self.image_size}
        if base:
            with explain_loading(self.model_name):
                require_fitting_adapter(copy.deepcopy(model), self.model_name, name, self.kwargs)
        return model, config, base

    def _apply_adapter_config(self, config: PreTrainedConfig) -> None:
        """Apply image size and entries saved with the adapter, which the config of its base does not have."""
        self.image_size = self.image_size or config.vision_config.image_size
        self.own_entries = {key: getattr(config, key) for key in OWN_ENTRIES if hasattr(config, key)}

    def _update(self, config: PreTrainedConfig) -> None:
        """Write the values that the caller or the adapter set into the config."""
        text, family = config.text_config, family_of(config)
        if family.reads_prompts and (self.label_smoothing or (self.dropout, self.drop_path) != (None, None)):
            raise ValueError(f"label_smoothing, dropout and drop_path are for BLIP; leave them out for {family.name}.")
        if self.label_smoothing is not None and not family.reads_prompts:
            # the decoder reads it from text_config when it is built; config.label_smoothing has no effect
            text.label_smoothing = float(self.label_smoothing)
        if self.dropout is not None and not family.reads_prompts:
            text.hidden_dropout_prob = text.attention_probs_dropout_prob = float(self.dropout)
        if self.drop_path is not None:
            config.vision_config.drop_path = float(self.drop_path)
        for key, value in self.own_entries.items():
            setattr(config, key, value)

    def get_model(self) -> PreTrainedModel | PeftModel:
        return self._loaded(self.model)

    def get_processor(self) -> ProcessorMixin:
        return self._loaded(self.processor)

    def get_tokenizer(self) -> Any:
        return self._loaded(self.processor).tokenizer

    def get_image_processor(self) -> Any:
        return self._loaded(self.processor).image_processor

    def _loaded(self, part: Any) -> Any:
        if part is None:
            raise ValueError("Nothing is loaded yet: call load() first, with load_processor=True for the processor.")
        return part

    def _load_model(self, name: str, kwargs: dict[str, Any], config: PreTrainedConfig) -> PreTrainedModel:
        # quantized weights keep the dtype that they were saved with
        dtype = self.dtype or ("auto" if getattr(config, "quantization_config", None) else torch.float32)
        if name == "demo":
            model = build_new_model(self.task, config).to(self.device, None if dtype == "auto" else dtype)
        else:
            if not self.allow_pickle:
                refuse_pickle(name, (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), WEIGHTS_NAME, kwargs)
            settings = {"config": config, "dtype": dtype, **kwargs, "weights_only": True, "output_loading_info": True}
            settings["use_safetensors"] = not self.allow_pickle or None  # None: safetensors first
            if self.bits or self.device_map:
                settings["device_map"] = self.device_map or {"": self.device}
            if self.bits:
                skipped = family_of(config).unquantized
                settings["quantization_config"] = quantization_config(self.bits, self.device, skipped)
            with blame_file(f"{CONFIG_NAME} or {GENERATION_CONFIG_NAME}", name):
                model, info = MODEL_REGISTRY[config.model_type][self.task].from_pretrained(name, **settings)
            require_matching_weights(model, info, name, self.task, self.allow_new_weights)
            if not getattr(config, "quantization_config", None):
                require_floats(model, name, kwargs)
        if self.image_size and self.image_size != config.vision_config.image_size:
            model.resize_position_embeddings(self.image_size)
        if self.device.type == "cpu":
            keep_quantized_layout(model)
        placed = self.bits or self.device_map or getattr(config, "quantization_config", None)
        return model if placed else model.to(self.device)


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
    """Load a model and its processor in one call: ModelLoader(...).load(load_processor).

    Arguments and errors as in ModelLoader; kwargs are its further arguments, e.g. dtype, merge or image_size.

    Returns: dict with model and, if load_processor is True, processor, tokenizer and image_processor.
    """
    loader = ModelLoader(
        *(model_name, model_type, task, device, load_in_8bit, load_in_4bit, torch_dtype, device_map, trust_remote_code),
        **kwargs,
    )
    return loader.load(load_processor)


def move_model_to_device(model: nn.Module, device: str | torch.device) -> nn.Module:
    """Move the model in place and return it. Raises: ValueError if the device does not exist."""
    return model.to(existing_device(device))


def save_model(
    model: PreTrainedModel | PeftModel,
    save_path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: ProcessorMixin | None = None,
) -> None:
    """Save weights (safetensors) or adapter, config, processor and tokenizer; stock transformers and PEFT load them."""
    for part in (model, processor, tokenizer):
        if part is not None:
            part.save_pretrained(str(save_path))


def load_model_from_path(
    model_path: str | Path, model_class: type[PreTrainedModel], device: str | torch.device | None = None
) -> PreTrainedModel | PeftModel:
    """Load the model of a folder, in evaluation mode.

    Args:
        model_class: a class of MODEL_REGISTRY, or the one in transformers of the same name. The result is always the
            class of blip_ft, a subclass that repairs faults of transformers 5.23.
        device: None uses the accelerator (CUDA, MPS, ...) if there is one, else the CPU.
    Raises: ValueError for any other class, for a checkpoint of another family, or if loading fails.
    """
    name = model_class.__name__
    if name not in TASKS_OF_CLASS:
        raise ValueError(f"model_class must be one of {', '.join(TASKS_OF_CLASS)}, found {name}.")
    tasks = TASKS_OF_CLASS[name]
    model_type = next(kind for kind, classes in MODEL_REGISTRY.items() if classes[tasks[0]].__name__ == name)
    task = tasks[0] if len(tasks) == 1 else None  # BLIP-2 and InstructBLIP: the config knows
    return load_model(str(model_path), model_type, task, device, load_processor=False)["model"]


def generate_answer_blip(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    image: Any,
    question: str | Sequence[str],
    max_length: int = 20,
    num_beams: int = 3,
) -> str | list[str]:
    """Answer a question about an image. Lists give a list of answers, the same as one call for each pair.

    BLIP-2 and InstructBLIP read each question in the prompt that they were trained with.

    Args:
        image: path, bytes, PIL image or array, or a list of these. One image is used for all questions of a list, and
            one question for all images of a list. An image that is in the list several times is encoded once.
        max_length: maximum number of tokens of an answer; for BLIP including [DEC] and [SEP].
    Raises: ValueError if the lists have different lengths, or the model is not for visual question answering.
    """
    blip = without_adapter(model)
    if not isinstance(blip, tuple(classes["vqa"] for classes in MODEL_REGISTRY.values())):
        raise ValueError(
            "generate_answer_blip needs a class of blip_ft for questions, e.g. its BlipForQuestionAnswering; found "
            f"{type(blip).__module__}.{type(blip).__name__}. "
            'Load it with load_model(..., task="vqa").'
        )
    questions = [question] if isinstance(question, str) else list(question)
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(images) == 1:
        images *= len(questions)
    elif len(questions) == 1:
        questions *= len(images)
    if len(images) != len(questions):
        raise ValueError(
            f"Found {len(images)} images and {len(questions)} questions: pass the same number, or one of either."
        )
    training = model.training
    model.eval()
    try:
        answers = inference.answer_questions(blip, processor, images, questions, max_length, num_beams)
    finally:
        model.train(training)
    return answers[0] if isinstance(question, str) and not isinstance(image, (list, tuple)) else answers


def prepare_inputs_for_blip(
    processor: ProcessorMixin, images: Any, texts: str | Sequence[str], device: str | torch.device | None = None
) -> BatchEncoding:
    """Prepare the inputs of forward and generate.

    Args:
        images: path, bytes, PIL image or array, or a list of these. Images are converted to RGB and rotated upright.
        texts: one text for each image.
        device: None leaves the tensors on the CPU.
    Returns: pixel_values (rows, 3, height, width), input_ids and attention_mask (rows, length). For InstructBLIP also
        qformer_input_ids and qformer_attention_mask.
    Raises: ValueError if the numbers of images and texts differ.
    """
    images = images if isinstance(images, (list, tuple)) else [images]
    texts = [texts] if isinstance(texts, str) else list(texts)
    if len(images) != len(texts):
        raise ValueError(f"Found {len(images)} images and {len(texts)} texts: pass one text for each image.")
    opened = [open_image(image) for image in images]
    if isinstance(processor, BlipProcessor):
        inputs = processor(images=opened, text=texts, padding=True, truncation=True, return_tensors="pt")
    else:
        pixels = processor.image_processor(images=opened, return_tensors="pt")
        prompts = encode_prompts(processor, texts, processor.tokenizer.model_max_length)
        inputs = BatchEncoding({**pixels, **prompts})
    return inputs if device is None else inputs.to(existing_device(device))
