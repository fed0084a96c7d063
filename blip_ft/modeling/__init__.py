"""Models: their classes, checkpoint files, adapters and inference."""

from blip_ft.modeling.blip import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

__all__ = ["BlipForConditionalGeneration", "BlipForImageTextRetrieval", "BlipForQuestionAnswering"]
