"""Fine-tuning BLIP, BLIP-2 and InstructBLIP: the original's loss, each image encoded once, recipes of one page."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip_ft.data_pipeline import DataPipeline
    from blip_ft.metrics.vqa import VqaAccuracy, vqa_accuracy
    from blip_ft.modeling.blip import (
        BlipForConditionalGeneration,
        BlipForImageTextRetrieval,
        BlipForQuestionAnswering,
    )
    from blip_ft.modeling.blip2 import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration
    from blip_ft.models import (
        ModelLoader,
        build_small_blip,
        count_parameters,
        freeze_model,
        generate_answer_blip,
        get_device,
        get_model_info,
        get_model_size_mb,
        load_model,
        load_model_from_path,
        move_model_to_device,
        prepare_inputs_for_blip,
        print_model_summary,
        save_model,
        unfreeze_model,
    )

__all__ = [
    "Blip2ForConditionalGeneration",
    "BlipForConditionalGeneration",
    "BlipForImageTextRetrieval",
    "BlipForQuestionAnswering",
    "DataPipeline",
    "InstructBlipForConditionalGeneration",
    "ModelLoader",
    "VqaAccuracy",
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
    "vqa_accuracy",
]

_MODULES = {
    "blip_ft.data_pipeline": ("DataPipeline",),
    "blip_ft.metrics.vqa": ("VqaAccuracy", "vqa_accuracy"),
    "blip_ft.modeling.blip": ("BlipForConditionalGeneration", "BlipForImageTextRetrieval", "BlipForQuestionAnswering"),
    "blip_ft.modeling.blip2": ("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration"),
}
_MODULE_OF_NAME = dict.fromkeys(__all__, "blip_ft.models")
_MODULE_OF_NAME |= {name: module for module, names in _MODULES.items() for name in names}

# libraries log these while they are imported; a user needs neither
# logger -> words of its message
_NOTICES = {
    # transformers 5.23: without torchvision, images are resized with Pillow, as the original did
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back",
    # bitsandbytes 0.50, which transformers imports by way of peft: a faster kernel for 4 bits on the CPU
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def _hide_notice(logger: str, words: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: words not in record.getMessage())


for _logger, _words in _NOTICES.items():
    _hide_notice(_logger, _words)


# a name is imported when it is first used: importing all of them takes five seconds
def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF_NAME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
