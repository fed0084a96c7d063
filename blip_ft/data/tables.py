"""Rows in files on disk, too many for memory, and JSON lines."""

from __future__ import annotations

import json
import math
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import (
    Dataset,
    Features,
    IterableDataset,
)

Row = dict[str, Any]


class RowsOfFile:
    """Rows of a file, which is parsed again at each pass: as Python objects, a million with ten answers take 3 GB.

    Args:
        read: gives the rows from the beginning.
    """

    def __init__(self, read: Callable[[], Iterable[Row]]) -> None:
        self.read, self.split = read, None
        # value of the column `split` -> its rows and columns; found in the one pass that also counts all rows
        self.split_sizes: Counter[str] = Counter()
        self._split_columns: dict[str, dict[str, None]] = {}
        columns: dict[str, None] = {}
        for row in self:
            columns |= dict.fromkeys(row)
            split = str(row.get("split"))
            self.split_sizes[split] += 1
            self._split_columns.setdefault(split, {}).update(dict.fromkeys(row))
        self.length, self.column_names = self.split_sizes.total(), list(columns)

    def select_split(self, split: str) -> RowsOfFile:
        """Only the rows with this value of the column `split`. Does not read the file."""
        selected = copy(self)
        selected.split, selected.length = split, self.split_sizes[split]
        selected.column_names = list(self._split_columns[split])
        return selected

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Row]:
        for row in self.read():
            if self.split is None or str(row.get("split")) == self.split:
                yield row


Table = Dataset | RowsOfFile | IterableDataset


def values_of(rows: Dataset, column: str) -> Iterator[Any]:
    """The values of a column, a portion at a time: as Python objects, a million with ten answers take 3 GB."""
    for portion in rows.select_columns([column]).iter(10_000):
        yield from portion[column]


class CaptionRows(torch.utils.data.Dataset):
    """One caption a row, over images that hold several: an image's bytes are stored once.

    Args:
        images: columns image, image_id and captions.
        limit: use the first rows only.
    """

    def __init__(self, images: Dataset, limit: int | None = None) -> None:
        self.images = images
        counts = [len(captions) for captions in images["captions"][:]]
        self.image = np.repeat(np.arange(len(counts)), counts)[:limit]
        self.place = np.concatenate([np.arange(count) for count in counts])[:limit]  # among its image's captions

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, position: int) -> Row:
        row = self.images[int(self.image[position])]
        return {"image": row["image"], "image_id": row["image_id"], "caption": row["captions"][self.place[position]]}

    def captions(self) -> list[str]:
        """Of all rows, without reading an image."""
        of_image = self.images["captions"][:]
        return [of_image[image][place] for image, place in zip(self.image, self.place, strict=True)]


def number_images(rows: Dataset | CaptionRows) -> np.ndarray:
    """(rows,) from 0 in order of first appearance, equal where the image_id is."""
    if isinstance(rows, CaptionRows):
        return number_images(rows.images)[rows.image]
    return dictionary_of(rows, "image_id").indices.to_numpy()


def dictionary_of(rows: Dataset, column: str) -> pa.DictionaryArray:
    """The column's different strings in order of first appearance, and of each row which."""
    # as Arrow and in portions: as Python's strings the ids of a million rows are the larger part of all memory
    portions = rows.select_columns(column).with_format("arrow").iter(10_000)
    ids = pa.chunked_array([table[column].combine_chunks() for table in portions], pa.string())
    return ids.combine_chunks().dictionary_encode()


@lru_cache(maxsize=1)
def _temporary_folder() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="blip_ft-")


def rows_on_disk(rows: Iterable[Row], features: Features) -> Dataset:
    """The rows in a memory-mapped temporary file: held as Python objects, a million with ten answers take 3 GB."""
    file, rows = Path(_temporary_folder().name) / f"{uuid.uuid4().hex}.arrow", iter(rows)
    with pa.ipc.new_stream(file, features.arrow_schema) as stream:
        portion = 100
        while chunk := list(islice(rows, portion)):
            stream.write_table(pa.Table.from_pylist(chunk, schema=features.arrow_schema))
            # a million rows in portions of 1,000 take 100 MB more; an image in its row may have megabytes
            holds_images = any("image" in row and row["image"]["bytes"] for row in chunk)
            portion = 100 if holds_images else 10_000
    return Dataset.from_file(str(file))


def iterate(table: Table) -> Iterator[Row]:
    if isinstance(table, RowsOfFile):
        yield from table
        return
    # datasets makes Python objects of a batch several times faster than of its rows
    for batch in table.iter(100):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def any_bytes(table: Dataset, column: str) -> bool:
    images = (image for batch in table.select_columns(column).iter(100) for image in batch[column])
    return any(image and image["bytes"] is not None for image in images)


def to_json(value: Any, **options: Any) -> str:
    """json.dumps in which a number that is not finite is null: JSON has neither NaN nor Infinity."""
    return json.dumps(_without_nan(value), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """JSON lines: all of them or no file."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(to_json(line, ensure_ascii=False) + "\n")
    unfinished.replace(path)
