"""Rows that stay in files on disk because they may not fit in memory, and JSON lines."""

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
from datasets import Dataset, Features, IterableDataset

Row = dict[str, Any]


class RowsOfFile:
    """Rows of a file that is parsed again in each pass.

    A million rows with ten answers each would take 3 GB as Python objects.

    Args:
        read: returns the rows, starting from the first one.
    """

    def __init__(self, read: Callable[[], Iterable[Row]]) -> None:
        self.read, self.split = read, None
        # value of the column `split` -> number of rows, and their columns; counted in this one pass
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
        """Keep only the rows with this value in the column `split`. Does not read the file."""
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


class CaptionRows(torch.utils.data.Dataset):
    """One row per caption, over a table with one row per image, so that the bytes of an image are stored once.

    Args:
        images: columns image, image_id and captions.
        limit: use only the first rows.
    """

    def __init__(self, images: Dataset, limit: int | None = None) -> None:
        self.images = images
        counts = [len(captions) for captions in images["captions"][:]]
        self.image_index = np.repeat(np.arange(len(counts)), counts)[:limit]
        # position among the captions of the row's image
        self.caption_index = np.concatenate([np.arange(count) for count in counts])[:limit]

    def __len__(self) -> int:
        return len(self.image_index)

    def __getitem__(self, position: int) -> Row:
        row = self.images[int(self.image_index[position])]
        caption = row["captions"][self.caption_index[position]]
        return {"image": row["image"], "image_id": row["image_id"], "caption": caption}

    def captions(self) -> list[str]:
        """The captions of all rows. No image is read."""
        of_image = self.images["captions"][:]
        return [of_image[image][caption] for image, caption in zip(self.image_index, self.caption_index, strict=True)]


def iterate_rows(table: Table) -> Iterator[Row]:
    """The rows of a table as Python objects, one after another."""
    if isinstance(table, RowsOfFile):
        yield from table
        return
    # datasets converts a batch to Python objects several times faster than it converts single rows
    for batch in table.iter(100):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def values_of(rows: Dataset, column: str) -> Iterator[Any]:
    """The values of a column, read in chunks: a million rows with ten answers take 3 GB as Python objects."""
    for chunk in rows.select_columns([column]).iter(10_000):
        yield from chunk[column]


def number_images(rows: Dataset | CaptionRows) -> np.ndarray:
    """(rows,) image numbers from 0 in order of first appearance; rows with the same image_id have the same number."""
    if isinstance(rows, CaptionRows):
        return number_images(rows.images)[rows.image_index]
    return encode_column(rows, "image_id").indices.to_numpy()


def encode_column(rows: Dataset, column: str) -> pa.DictionaryArray:
    """A column of strings as Arrow's dictionary array.

    `dictionary` has the distinct strings in order of first appearance, `indices` (rows,) the position of each row's
    string in it.
    """
    # in chunks of Arrow data: as Python strings, the ids of a million rows take up most of the memory
    chunks = rows.select_columns(column).with_format("arrow").iter(10_000)
    values = pa.chunked_array([table[column].combine_chunks() for table in chunks], pa.string())
    return values.combine_chunks().dictionary_encode()


def contains_bytes(table: Dataset, column: str) -> bool:
    """Whether any image of the column is stored as bytes, not only as a path."""
    images = (image for batch in table.select_columns(column).iter(100) for image in batch[column])
    return any(image and image["bytes"] is not None for image in images)


def store_on_disk(rows: Iterable[Row], features: Features) -> Dataset:
    """Write the rows to a temporary file and return them as a memory-mapped data set.

    A million rows with ten answers each would take 3 GB as Python objects.
    """
    file, rows = Path(_temporary_folder().name) / f"{uuid.uuid4().hex}.arrow", iter(rows)
    with pa.ipc.new_stream(file, features.arrow_schema) as stream:
        chunk_size = 100
        while chunk := list(islice(rows, chunk_size)):
            stream.write_table(pa.Table.from_pylist(chunk, schema=features.arrow_schema))
            # a million rows in chunks of 1,000 take 100 MB more; but an image stored in its row may have megabytes
            has_bytes = any("image" in row and row["image"]["bytes"] for row in chunk)
            chunk_size = 100 if has_bytes else 10_000
    return Dataset.from_file(str(file))


@lru_cache(maxsize=1)
def _temporary_folder() -> tempfile.TemporaryDirectory:
    """The folder is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="blip_ft-")


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines. If writing fails, `path` is not created."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(to_json(line, ensure_ascii=False) + "\n")
    unfinished.replace(path)


def to_json(value: Any, **options: Any) -> str:
    """json.dumps that writes null for NaN and infinities: JSON has no such numbers."""
    return json.dumps(_without_nan(value), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
