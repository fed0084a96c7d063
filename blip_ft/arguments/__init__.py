"""The dataclasses of settings that the recipes share."""

from blip_ft.arguments.data import DataArguments
from blip_ft.arguments.model import ModelArguments, PeftArguments
from blip_ft.arguments.settings import Settings, changed_settings
from blip_ft.arguments.tasks import CaptioningArguments, RetrievalArguments, VqaArguments
from blip_ft.arguments.training import WITHOUT_EFFECT, BlipTrainingArguments

__all__ = [
    "WITHOUT_EFFECT",
    "BlipTrainingArguments",
    "CaptioningArguments",
    "DataArguments",
    "ModelArguments",
    "PeftArguments",
    "RetrievalArguments",
    "Settings",
    "VqaArguments",
    "changed_settings",
]
