"""Optimizer and learning rate: what decays, and how they follow the originals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from blip_ft.arguments.families import family_of
from blip_ft.modeling.adapters import without_adapter
from blip_ft.training.hub import PushingTrainer


class OptimizingTrainer(PushingTrainer):
    """Weight decay of the originals, and the temperature of retrieval among the trained parameters."""

    @property
    def blip(self) -> torch.nn.Module:
        """The BLIP model without the wrappers of DDP and PEFT; it includes the layers of an adapter."""
        return without_adapter(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """As the originals: all parameters of BLIP (train_vqa.py), no biases and norms in LAVIS (blip2.py)."""
        names = [name for name, _ in model.named_parameters()]
        if not family_of(self.blip.config).reads_prompts:
            return names
        return [name for name in names if model.get_parameter(name).dim() > 1 and not name.endswith(".bias")]

    @contextmanager
    def _temperature_in_model(self) -> Iterator[None]:
        """Register the temperature of retrieval as a parameter. It is trained, but is not part of the model."""
        blip = self.blip
        if blip.contrastive is None or "temperature" in blip._parameters:
            yield
            return
        blip.register_parameter("temperature", blip.contrastive.temperature)
        yield
        del blip.temperature

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        with self._temperature_in_model():
            return super().create_optimizer(*args, **kwargs)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        with self._temperature_in_model():
            return super()._clip_grad_norm(model)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float:
        with self._temperature_in_model():
            return super()._get_grad_norm(*args, **kwargs)


def cosine_per_epoch(optimizer: torch.optim.Optimizer, num_steps: int, steps_per_epoch: int) -> LambdaLR:
    """A learning rate that falls along a cosine after each epoch, and does not change within an epoch.

    Its mean is (1 + 1 / epochs) / 2 of the peak. That of a cosine in each step is 1 / 2.
    Source: BLIP utils.py cosine_lr_schedule with min_lr 0, called at the start of each epoch.
    """
    num_epochs = math.ceil(num_steps / steps_per_epoch)
    return LambdaLR(optimizer, partial(_share_of_peak, steps_per_epoch=steps_per_epoch, num_epochs=num_epochs))


def _share_of_peak(step: int, steps_per_epoch: int, num_epochs: int) -> float:
    return (1 + math.cos(math.pi * (step // steps_per_epoch) / num_epochs)) / 2
