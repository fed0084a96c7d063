"""Keep parts of the model that training does not use off the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback


class IdleParts(TrainerCallback):
    """Moves frozen parts to the CPU before each training step. A part that is called, in an evaluation, moves back.

    Checkpoints need no move, because weights are saved and loaded wherever they are. DDP and the optimizer refer to
    trained weights only. FSDP and DeepSpeed also manage frozen weights, so this is not for them.

    Args:
        names: of parts that no training step calls. All of their weights are frozen. Quantized parts stay.
        device: of the model.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], device: torch.device) -> None:
        self.device = device
        parts = [model.get_submodule(name) for name in names]
        # bitsandbytes keeps scales beside the weights, and those of 8 bits do not move with them
        self.parts = [part for part in parts if all(type(weight) is nn.Parameter for weight in part.parameters())]
        self.on_device = set(self.parts)

    @property
    def num_bytes(self) -> int:
        """Memory of the parts that move."""
        return sum(weight.nbytes for part in self.parts for weight in part.parameters())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hooks = [part.register_forward_pre_hook(self._move_back) for part in self.parts]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # in each step, because an evaluation moves them back
        for part in self.on_device:
            part.to("cpu")
        self.on_device.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for part in self.parts:
            self._move_back(part)
        for hook in self.hooks:
            hook.remove()

    def _move_back(self, part: nn.Module, *inputs: Any) -> None:
        if part not in self.on_device:
            part.to(self.device)
            self.on_device.add(part)
