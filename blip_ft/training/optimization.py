"""Optimizer and learning rate as in the originals, and the check that loss and weights are finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from blip_ft.arguments.families import family_of
from blip_ft.modeling.adapters import without_adapter
from blip_ft.modeling.weight_checks import is_finite
from blip_ft.training.checkpoints import newest_checkpoint
from blip_ft.training.engines import local_part
from blip_ft.training.hub import PushingTrainer

NEVER = torch.iinfo(torch.long).max  # a step that no run reaches


class OptimizingTrainer(PushingTrainer):
    """Weight decay of the originals, the temperature of retrieval among the trained parameters, finite numbers."""

    first_bad_step = torch.tensor(NEVER)  # first step of this process with a loss that is not finite

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

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # kept on the device: reading the value here would wait for the device in each step
        self.first_bad_step = self.first_bad_step.to(loss.device)
        step = torch.full_like(self.first_bad_step, self.state.global_step + 1)
        self.first_bad_step = torch.where(loss.isfinite(), self.first_bad_step, self.first_bad_step.minimum(step))
        return loss

    def require_finite(self, weights: bool) -> None:
        """Stop all processes together if a loss since the start, or a trained weight now, is NaN or infinite.

        A collective, which waits for the device once. It is called when the loss is logged, and with weights, which
        reads each trained weight, before an evaluation, a checkpoint and the final save.
        Raises: ValueError with the step, the last complete checkpoint, and what to try.
        """
        step, device = self.state.global_step, self.args.device
        with self._temperature_in_model():
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad and weights]
        finite = [is_finite(local_part(parameter)).to(device) for parameter in trained]
        is_good = torch.stack(finite).all() if finite else torch.tensor(True, device=device)
        found = torch.stack([self.first_bad_step.to(device), torch.where(is_good, NEVER, step)])
        # (processes, 2)
        loss_step, weights_step = self.accelerator.gather(found[None]).amin(0).tolist()
        if loss_step == weights_step == NEVER:
            return
        args, last = self.args, newest_checkpoint(Path(self.args.output_dir))
        is_loss = loss_step <= weights_step
        raise ValueError(
            f"Training stopped: the {'loss' if is_loss else 'weights'} of step {min(loss_step, weights_step)} "
            f"{'is' if is_loss else 'are'} not finite (NaN or infinity). That state is not saved; "
            f"{f'{last} is the last complete checkpoint' if last else 'no checkpoint had been written'}. "
            f"Start again with a lower --learning_rate (now {args.learning_rate:g})"
            + ("" if args.max_grad_norm else ", or with --max_grad_norm 1")
            + (", or with --bf16 instead of --fp16" if args.fp16 else "")
            + "."
        )


def cosine_per_epoch(optimizer: torch.optim.Optimizer, num_steps: int, steps_per_epoch: int) -> LambdaLR:
    """A learning rate that falls along a cosine after each epoch, and does not change within an epoch.

    Its mean is (1 + 1 / epochs) / 2 of the peak. That of a cosine in each step is 1 / 2.
    Source: BLIP utils.py cosine_lr_schedule with min_lr 0, called at the start of each epoch.
    """
    num_epochs = math.ceil(num_steps / steps_per_epoch)
    return LambdaLR(optimizer, partial(_share_of_peak, steps_per_epoch=steps_per_epoch, num_epochs=num_epochs))


def _share_of_peak(step: int, steps_per_epoch: int, num_epochs: int) -> float:
    return (1 + math.cos(math.pi * (step // steps_per_epoch) / num_epochs)) / 2
