"""BLIP with the losses and attention masks of the original code. The classes have the same names as in transformers."""

from transformers import PreTrainedModel

from blip_ft.modeling.blip.captioning import BlipForConditionalGeneration
from blip_ft.modeling.blip.retrieval import BlipForImageTextRetrieval
from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering

TASKS: dict[str, type[PreTrainedModel]] = {
    "vqa": BlipForQuestionAnswering,
    "conditional_generation": BlipForConditionalGeneration,
    "image_text_retrieval": BlipForImageTextRetrieval,
}
TASK_OF_CLASS = {cls.__name__: task for task, cls in TASKS.items()}

__all__ = [
    "TASKS",
    "TASK_OF_CLASS",
    "BlipForConditionalGeneration",
    "BlipForImageTextRetrieval",
    "BlipForQuestionAnswering",
]
