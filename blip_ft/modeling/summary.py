"""What a model consists of: size, device, and a table of its parts."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from blip_ft.modeling.adapters import count_parameters, without_adapter
from blip_ft.modeling.registry import task_of_model


def get_model_size_mb(model: PreTrainedModel | PeftModel) -> float:
    """Memory of parameters and buffers in MiB. Tied weights count once."""
    return model.get_memory_footprint() / 2**20


def get_device(model: nn.Module) -> torch.device:
    """The device of the first parameter. With a device_map, other parameters can be on other devices."""
    return next(model.parameters()).device


def get_model_info(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Class, task, parameter counts, size in MiB, device, dtype and image size of a model."""
    blip = without_adapter(model)
    counts = count_parameters(model)
    return {
        "model_class": type(blip).__name__,
        "task": task_of_model(blip),
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
    """Print a table of the model's parts. With detailed, also print the modules of each part."""
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
        if tensors:  # dropout and activations have none
            counts = count_parameters(part)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
            rows.append(
                (
                    *(name, f"{counts['total']:,}", f"{counts['trainable']:,}", f"{size:.1f} MiB"),
                    ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
                    ", ".join(sorted({str(tensor.device) for tensor in tensors})),
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, "<>>><<", widths, strict=True)]
        print("  ".join(cells).rstrip())  # noqa: T201 (the only function that prints)
