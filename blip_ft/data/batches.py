"""Batches of a data loader, matched with the rows that they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch

Batch = dict[str, torch.Tensor]

Key = TypeVar("Key")


def match_rows(batches: Iterable[Batch], keys: Iterable[Key]) -> Iterator[tuple[Batch, list[Key], list[bool]]]:
    """Each batch without `readable`, the keys of its rows, and for each row whether its image can be read.

    Args:
        batches: with `readable` (rows,), in the order of keys.
        keys: one for each row, e.g. its position in the data.
    """
    keys = iter(keys)
    for batch in batches:
        readable = batch.pop("readable").tolist()
        yield batch, list(islice(keys, len(readable))), readable
