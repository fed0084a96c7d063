"""Which classes a checkpoint needs."""

from __future__ import annotations

from typing import Any

from transformers import (
    Blip2Config,
    Blip2Processor,
    BlipConfig,
    BlipProcessor,
    InstructBlipConfig,
    InstructBlipProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from blip_ft.arguments.families import RECIPES
from blip_ft.modeling.blip import TASKS
from blip_ft.modeling.blip2 import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration

# model_type of config.json -> task -> class
MODEL_REGISTRY: dict[str, dict[str, type[PreTrainedModel]]] = {
    "blip": TASKS,
    "blip-2": dict.fromkeys(("vqa", "conditional_generation"), Blip2ForConditionalGeneration),
    "instructblip": dict.fromkeys(("vqa", "conditional_generation"), InstructBlipForConditionalGeneration),
}

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "blip": BlipConfig,
    "blip-2": Blip2Config,
    "instructblip": InstructBlipConfig,
}

PROCESSORS: dict[str, type[ProcessorMixin]] = {
    "blip": BlipProcessor,
    "blip-2": Blip2Processor,
    "instructblip": InstructBlipProcessor,
}

# name of a class -> its tasks, the most usual first
TASKS_OF_CLASS: dict[str, list[str]] = {}
for _classes in MODEL_REGISTRY.values():
    for _task, _class in _classes.items():
        TASKS_OF_CLASS.setdefault(_class.__name__, []).append(_task)


def task_of(config: Any) -> str | None:
    """The task that a recipe wrote into the config, else that of its architecture; None if it names none of ours.

    The classes of BLIP-2 and InstructBLIP are for questions and captions; without a task in the config it is vqa.
    """
    if getattr(config, "task", None) in RECIPES:
        return config.task
    known = [name for name in config.architectures or () if name in TASKS_OF_CLASS]
    return TASKS_OF_CLASS[known[0]][0] if known else None


def task_of_model(model: PreTrainedModel) -> str | None:
    """The task of a model's class, or for a class with several the task of its config; None for another class."""
    tasks = TASKS_OF_CLASS.get(type(model).__name__, [])
    return tasks[0] if len(tasks) == 1 else task_of(model.config) or next(iter(tasks), None)
