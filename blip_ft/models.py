"""Load, change and save BLIP models."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BatchEncoding,
    BlipConfig,
    BlipProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
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

from blip_ft.data import demo, small_model
from blip_ft.data.images import open_image
from blip_ft.modeling import inference
from blip_ft.modeling.adapters import count_parameters, freeze_model, save_for_stock, unfreeze_model, without_adapter
from blip_ft.modeling.blip import TASK_OF_CLASS, TASKS
from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering
from blip_ft.modeling.checkpoint_files import (
    ADAPTER_FILE,
    base_of_adapter,
    blame_file,
    build_on_meta,
    explain_loading,
    find_file,
    fit_processor,
    name_parts,
    read_config,
    read_processor,
    refuse_pickle,
    require_finite_weights,
    require_fitting_adapter,
    require_floats,
    task_of_config,
)
from blip_ft.modeling.placement import best_device, existing_device, quantization_config, to_dtype

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
    "load_processor",
    "move_model_to_device",
    "prepare_inputs_for_blip",
    "print_model_summary",
    "save_model",
    "unfreeze_model",
]

logger = logging.getLogger(__name__)


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
        self.device = existing_device(device or best_device())
        self.bits = 8 if load_in_8bit else 4 if load_in_4bit else None
        self.dtype = to_dtype(dtype or torch_dtype) if dtype or torch_dtype else None
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
            config = demo.build_demo_config() if name == "demo" else read_config(name, kwargs)
            self._change(config)
            if self.task is None:
                self.task = task_of_config(config)
            model = build_on_meta(self.task, copy.deepcopy(config), name)
            if load_processor:
                self.processor = demo.build_demo_processor() if name == "demo" else read_processor(name, kwargs)
                fit_processor(self.processor, config, name)
        if self.image_size:
            model.resize_position_embeddings(self.image_size)
            if load_processor:
                self.processor.image_processor.size = {"height": self.image_size, "width": self.image_size}
        if base:
            with explain_loading(self.model_name):
                require_fitting_adapter(copy.deepcopy(model), self.model_name, name, self.kwargs)
        return model, config, base

    def _apply_adapter_config(self, config: BlipConfig) -> None:
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
                refuse_pickle(name, (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), WEIGHTS_NAME, kwargs)
            settings = {"config": config, "dtype": dtype, **kwargs, "weights_only": True, "output_loading_info": True}
            settings["use_safetensors"] = not self.allow_pickle or None  # None: safetensors first
            if self.bits or self.device_map:
                settings["device_map"] = self.device_map or {"": self.device}
            if self.bits:
                settings["quantization_config"] = quantization_config(self.bits, self.device)
            with blame_file(f"{CONFIG_NAME} or {GENERATION_CONFIG_NAME}", name):
                model, info = TASKS[self.task].from_pretrained(name, **settings)
            self._require_own_weights(model, info, name)
            if not getattr(config, "quantization_config", None):
                require_floats(model, name, kwargs)
        if self.image_size and self.image_size != config.vision_config.image_size:
            model.resize_position_embeddings(self.image_size)
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
        lacking, surplus = (name_parts(info[key], known) for key in ("missing_keys", "unexpected_keys"))
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
    fit_processor(processor, model.config, "build_small_blip")
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


def get_model_size_mb(model: PreTrainedModel | PeftModel) -> float:
    """Memory of parameters and buffers in MiB; a tied one counts once."""
    return model.get_memory_footprint() / 2**20


def get_device(model: nn.Module) -> torch.device:
    """The device of the first parameter; a device_map may have put others elsewhere."""
    return next(model.parameters()).device


def move_model_to_device(model: nn.Module, device: str | torch.device) -> nn.Module:
    """The same model, moved. Raises: ValueError for a device that is not there."""
    return model.to(existing_device(device))


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
    """The answer to a question about an image; for lists a list, the same as one by one.

    Args:
        image: path, bytes or PIL image, or a list of these. One image goes with every question of a list, and one
            question with every image. An image that stands several times in a list is encoded once.
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
        raise ValueError(f"{len(images)} images and {len(questions)} questions: give equally many, or one of either.")
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
        texts: one for each image.
        device: None leaves the tensors on the CPU.
    Raises: ValueError for different numbers of images and texts.
    """
    images = images if isinstance(images, (list, tuple)) else [images]
    texts = [texts] if isinstance(texts, str) else list(texts)
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} texts: give one text for each image.")
    inputs = processor(
        images=[open_image(image) for image in images], text=texts, padding=True, truncation=True, return_tensors="pt"
    )
    return inputs if device is None else inputs.to(existing_device(device))


def get_model_info(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Class, task, numbers of parameters, size in MiB, device, dtype and image size of a model."""
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
