"""State and functions of BLIP's contrastive loss: momentum weights, queue and temperature.

The state is not in the model's state_dict. The trainer creates it, updates it once per optimizer step, saves it with
each checkpoint and loads it on resume.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

# features of images and texts do not depend on these parts, so they need no momentum weights
_MATCHING_ONLY = ("crossattention", "itm_head")


class Contrastive:
    """Momentum weights, queue and temperature of `model`, which reads them as `model.contrastive`.

    This is a plain object, not a module, so it adds no key to the model's state_dict and no parameter to DDP.

    Args:
        model: a BlipForImageTextRetrieval on its device, with its adapters added and its parts frozen.
        queue_size: number of image-text pairs in the queue. With 0, only the pairs of the batch are compared.
        momentum: share of the old momentum weights in each update, 0-1.
        alpha: weight of the soft targets after the first epoch, 0-1.
        temperature: initial value of the learned temperature.

    Attributes:
        temperature: parameter for the optimizer. Its gradient is averaged over the processes.
        momentum_weights: by the names of the model's trainable parameters. The momentum encoder is the model with
            these weights; frozen weights are shared.
        image_queue, text_queue, id_queue: ring buffers, (queue_size, width), (queue_size, width) and (queue_size,).
        num_queued: number of pairs ever added. The next pair is written to row num_queued modulo queue_size.
    Source: BLIP models/blip_retrieval.py. Two differences: rows of the queue that are not yet written are left out
    instead of being random, and the sizes of queue and batch are independent of each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        queue_size: int = 57600,
        momentum: float = 0.995,
        alpha: float = 0.4,
        temperature: float = 0.07,
    ) -> None:
        self.queue_size, self.momentum, self.full_alpha = queue_size, momentum, alpha
        self.alpha = 0.0
        self._online = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not any(part in name for part in _MATCHING_ONLY)
        }
        self.momentum_weights = {name: parameter.detach().clone() for name, parameter in self._online.items()}
        # at least float32: in bfloat16 small updates of a temperature of 0.07 would be lost
        options = {"device": model.device, "dtype": torch.promote_types(model.dtype, torch.float32)}
        # shape (1,), because DeepSpeed 0.19 cannot flatten a tensor without dimensions
        self.temperature = nn.Parameter(torch.tensor([temperature], **options))
        # DDP averages only the gradients of its own module's parameters
        self.temperature.register_hook(_mean_over_processes)
        self.image_queue = torch.zeros(queue_size, model.config.image_text_hidden_size, **options)
        self.text_queue = torch.zeros_like(self.image_queue)
        self.id_queue = torch.zeros(queue_size, dtype=torch.long, device=model.device)
        self.num_queued = torch.tensor(0)

    @torch.no_grad()
    def begin_step(self, epochs_done: float) -> None:
        """Update the momentum weights and alpha, and clamp the temperature.

        Call it once per optimizer step, before the first forward of the step.

        epochs_done: e.g. 0.5 in the middle of the first epoch. During the first epoch, alpha rises from 0.
        """
        self.alpha = self.full_alpha * min(1.0, epochs_done)
        self.temperature.clamp_(0.001, 0.5)
        self.temperature.grad = None  # the Trainer only resets the gradients of its model
        for name, weight in self.momentum_weights.items():
            # DeepSpeed's bf16 mode casts the model; momentum weights keep their dtype, so small updates are not lost
            weight.lerp_(self._online[name].to(weight.dtype), 1 - self.momentum)

    def loss(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        image_keys: torch.Tensor,
        text_keys: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """Contrastive loss over batch and queue: the mean of image-to-text and text-to-image cross-entropy.

        Args:
            image_features, text_features: (num_pairs, width) of length 1, from the model.
            image_keys, text_keys: (num_pairs, width) of length 1, from the momentum encoder.
            ids: (num_pairs,), the image id of each pair. Pairs with the same id are positives of each other.
        """
        filled = min(int(self.num_queued), self.queue_size)
        all_images = torch.cat([image_keys, self.image_queue[:filled]])  # (num_pairs + filled, width)
        all_texts = torch.cat([text_keys, self.text_queue[:filled]])
        same = (ids[:, None] == torch.cat([ids, self.id_queue[:filled]])).to(image_keys.dtype)
        hard_targets = same / same.sum(1, keepdim=True)

        def one_way(features: torch.Tensor, own_keys: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                soft_targets = (own_keys @ keys.T / self.temperature).softmax(1)
                targets = torch.lerp(hard_targets, soft_targets, self.alpha)
            return F.cross_entropy(features @ keys.T / self.temperature, targets)

        return (one_way(image_features, image_keys, all_texts) + one_way(text_features, text_keys, all_images)) / 2

    @torch.no_grad()
    def enqueue(self, image_keys: torch.Tensor, text_keys: torch.Tensor, ids: torch.Tensor) -> None:
        """Replace the oldest pairs of the queue. If there are too many new pairs, keep the last. Shapes as in loss."""
        num_pairs = len(ids)
        first = max(0, num_pairs - self.queue_size)
        rows = (torch.arange(first, num_pairs, device=ids.device) + int(self.num_queued)) % max(1, self.queue_size)
        self.image_queue[rows], self.text_queue[rows] = image_keys[first:], text_keys[first:]
        self.id_queue[rows] = ids[first:]
        self.num_queued += num_pairs

    def save(self, path: str | os.PathLike) -> None:
        """Write the state to a safetensors file. Call it on one process; the state is the same on all."""
        save_file(self._state(), path)

    @torch.no_grad()
    def load(self, path: str | os.PathLike) -> None:
        """Load the state that save wrote, in place.

        Raises: ValueError if the queue or the set of trained weights is different.
        """
        state, stored = self._state(), load_file(path)
        shapes, found = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (state, stored))
        if shapes != found:
            name = min(shapes.items() ^ found.items())[0]
            raise ValueError(
                f"{path} belongs to a different run: {name} should have the shape {shapes.get(name)}, found "
                f"{found.get(name)}. Resume with that run's queue_size, adapters and frozen parts."
            )
        for name, tensor in state.items():
            tensor.copy_(stored[name])

    def _state(self) -> dict[str, torch.Tensor]:
        names = ("image_queue", "text_queue", "id_queue", "num_queued")
        weights = {f"momentum.{name}": weight for name, weight in self.momentum_weights.items()}
        return {name: getattr(self, name) for name in names} | {"temperature": self.temperature.detach()} | weights


def require_memory_for_queue(queue_size: int, width: int, device: torch.device) -> None:
    """Raise ValueError if a queue of features of this width needs more than the total memory of the device."""
    needed = queue_size * (2 * width * 4 + 8)  # image and text in float32, and an id
    if device.type == "cuda":
        name, has = str(device), torch.cuda.get_device_properties(device).total_memory
    else:
        name, has = "this machine", psutil.virtual_memory().total
    if needed > has:
        raise ValueError(
            f"queue_size {queue_size:,} needs {needed / 1e9:,.1f} GB of memory, and {name} has {has / 1e9:,.1f} GB. "
            "Lower --queue_size; the paper uses 57600."
        )


def draw_negatives(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Draw one column for each row, with probability softmax(logits), among the columns where `same` is False.

    Args:
        logits, same: (rows, columns).
    Returns: (rows,), -1 for a row in which `same` is True everywhere.
    Source: BLIP models/blip_retrieval.py, which applies the softmax before the mask. The probabilities are the same,
    but there all weights can round to 0, and then torch.multinomial raises.
    """
    # a row without candidates is NaN here, and so is every row if the model has diverged. multinomial would raise, and
    # on a GPU the process could not continue; without the error, the trainer stops because of the loss
    weights = logits.masked_fill(same, -torch.inf).softmax(1).nan_to_num(1.0)
    return weights.multinomial(1).squeeze(1).masked_fill(same.all(1), -1)


def nearest_is_right(similarities: Sequence[torch.Tensor], same: torch.Tensor) -> torch.Tensor:
    """Percentage of rows whose most similar column is a positive, averaged over both directions.

    Unlike the loss, it does not depend on the queue.

    Args:
        similarities: two tensors (rows, columns), one for each direction.
        same: (rows, columns), True if row and column belong together.
    """
    nearest = torch.stack([similarity.argmax(1) for similarity in similarities])  # (2, rows)
    return 100 * same.expand(len(nearest), -1, -1).gather(2, nearest[..., None]).float().mean()


def gather(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Collect the rows of all processes in rank order. Gradients flow back to the process that a row came from.

    Args:
        rows: (num_rows, ...). All sizes may differ between processes; those other than num_rows are padded with 0.
    Returns: the rows of all processes, and the position of this process's first row.
    """
    if _num_processes() == 1:
        return rows, 0
    own_shape = torch.tensor(rows.shape, device=rows.device)
    shapes = [torch.empty_like(own_shape) for _ in range(_num_processes())]
    distributed.all_gather(shapes, own_shape)
    shapes = torch.stack(shapes).tolist()
    widest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padding = [size for own, wanted in zip(rows.shape, widest, strict=True) for size in (wanted - own, 0)]
    parts = _AllGather.apply(F.pad(rows, padding[::-1]))  # F.pad begins with the last dimension
    counts = [shape[0] for shape in shapes]
    gathered = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return gathered, sum(counts[: distributed.get_rank()])


class _AllGather(torch.autograd.Function):
    """all_gather with gradient, for equal shapes. The one in torch.distributed.nn is deprecated since torch 2.13."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return tuple(parts)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor) -> torch.Tensor:
        summed = torch.stack(grads)
        distributed.all_reduce(summed)  # gloo has no reduce_scatter of lists
        return summed[distributed.get_rank()]


def _num_processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _mean_over_processes(grad: torch.Tensor) -> torch.Tensor:
    if _num_processes() == 1:
        return grad
    grad = grad / _num_processes()
    distributed.all_reduce(grad)
    return grad
