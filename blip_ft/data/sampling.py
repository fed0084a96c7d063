"""The order of the rows in each training epoch, and the rows that each process evaluates."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from torch.utils.data import Sampler


def share_of_process(images: np.ndarray, process: int, num_processes: int, done: Collection[int] = ()) -> list[int]:
    """Row positions that one process evaluates. Each row belongs to one process; rows of an image are adjacent.

    Args:
        images: (rows,), the number of each row's image, as number_images returns it.
        done: positions of rows to leave out.
    """
    order = np.argsort(images, kind="stable")
    order = order[~np.isin(order, list(done))]
    return np.array_split(order, num_processes)[process].tolist()


class GroupedSampler(Sampler[int]):
    """Row positions of one epoch in random order, with the rows of an image together, cut to whole global batches.

    Args:
        images: (rows,), the number of each row's image, from number_images.
        global_batch_size: rows per optimizer step: per device x processes x accumulation.
        group: False shuffles single rows, regardless of their image.
    Source: the original drops the last batch (utils.py create_loader, drop_last). Each epoch drops different rows.
    """

    def __init__(self, images: np.ndarray, global_batch_size: int, seed: int, group: bool = True) -> None:
        require_whole_batch(len(images), global_batch_size)
        self.images = images if group else np.arange(len(images))
        self.length = len(images) // global_batch_size * global_batch_size
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        rank = generator.permutation(int(self.images.max()) + 1)[self.images]  # (rows,)
        order = np.lexsort((generator.random(len(rank)), rank))
        # in chunks: a list of all positions as Python integers would take more memory than the arrays
        for start in range(0, self.length, 1 << 16):
            yield from order[start : min(start + (1 << 16), self.length)].tolist()


def require_whole_batch(num_rows: int, global_batch_size: int) -> None:
    """Raises: ValueError if there are fewer rows than one optimizer step uses."""
    if num_rows < global_batch_size:
        raise ValueError(
            f"One optimizer step uses {global_batch_size} rows (per_device_train_batch_size x processes x "
            f"gradient_accumulation_steps), but there are only {num_rows}. Choose at most {num_rows}, e.g. "
            f"--per_device_train_batch_size {num_rows} --gradient_accumulation_steps 1 on one process."
        )
