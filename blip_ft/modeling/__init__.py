"""Models: their classes, checkpoint files, adapters and inference."""

from blip_ft.modeling.blip import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
from blip_ft.modeling.blip2 import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration

__all__ = [
    "Blip2ForConditionalGeneration",
    "BlipForConditionalGeneration",
    "BlipForImageTextRetrieval",
    "BlipForQuestionAnswering",
    "InstructBlipForConditionalGeneration",
]
