"""Choose the rows to train, evaluate and test on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset

from blip_ft.arguments import DataArguments
from blip_ft.data.sources import METADATA_FILES, read_source
from blip_ft.data.tables import RowsOfFile, Table, encode_column

logger = logging.getLogger(__name__)


class SourceRows(NamedTuple):
    """The raw rows of one source.

    Args:
        source: its name among several, "" if it is the only one.
        folder: that its image paths are relative to.
    """

    source: str
    table: Table
    folder: Path | None


def read_splits(args: DataArguments) -> dict[str, list[SourceRows]]:
    """The raw rows of `train` and, if they are given, of `eval` and `test`, from each source that they are in."""
    _require_separate_rows(args)
    parts: dict[str, list[SourceRows]] = {}
    for source, own in args.sources().items():
        with naming(source):
            tables, folder = read_source(own)
            for part, table in _select_parts(tables, own).items():
                parts.setdefault(part, []).append(SourceRows(source, table, folder))
    others = {"eval": (args.eval_dataset_name, args.eval_split), "test": (args.test_dataset_name, args.test_split)}
    for part, (name, split) in others.items():
        if name:
            other = args.other_source(name)
            tables, folder = read_source(other)
            # all rows of the other source, unless it has splits
            chosen = replace(other, train_split=split or "train", eval_split=None, streaming=False)
            parts[part] = [SourceRows("", select_splits(tables, chosen)[0], folder)]
    return parts


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Put the name of the source before the message of a ValueError, unless it is ""."""
    try:
        yield
    except ValueError as error:
        if not source:
            raise
        raise ValueError(f"{source}: {error}") from error


def _select_parts(tables: dict[str, Table], args: DataArguments) -> dict[str, Table]:
    """The tables of `train` and, if they are in this source, of `eval` and `test`."""
    parts = {}
    if args.test_split and not args.test_dataset_name:
        chosen = replace(args, train_split=args.test_split, eval_split=None, streaming=False)
        parts["test"], _ = select_splits(tables, chosen)
    if args.eval_dataset_name:
        parts["train"], _ = select_splits(tables, replace(args, eval_split=None))
        return parts
    parts["train"], evaluation = select_splits(tables, args)
    if evaluation is None:
        _warn_of_unused_splits(tables, args)
        return parts
    return {**parts, "eval": evaluation}


def select_splits(tables: dict[str, Table], args: DataArguments) -> tuple[Table, Table | None]:
    """The tables of train_split and of eval_split; the second is None if no split is given to evaluate on."""
    return _select_by_column(tables[""], args) if list(tables) == [""] else _select_by_name(tables, args)


def hold_out_images(rows: Dataset, fraction: float, seed: int, identity: dict[str, int]) -> tuple[Dataset, Dataset]:
    """Split the rows into those to train on and those of randomly chosen images to evaluate on.

    Args:
        fraction: share of the images to evaluate on, 0 to 1.
        identity: image_id -> a number that is equal for two ids of the same image.
    """
    ids, numbers = encode_column(rows, "image_id"), {}
    number_of_id = [numbers.setdefault(identity[image_id], len(numbers)) for image_id in ids.dictionary.to_pylist()]
    images = np.array(number_of_id, int)[ids.indices.to_numpy()]
    total = int(images.max(initial=-1)) + 1
    if total < 2:
        raise ValueError(f"At least two images are needed to hold some out; found {total}. Set --eval_split.")
    number = min(max(1, round(fraction * total)), total - 1)
    held_out = np.isin(images, np.random.default_rng(seed).choice(total, number, replace=False))
    logger.info(
        "No eval_split is set: %d of %d images, with %d of %d rows, are held out to evaluate on.",
        *(number, total, held_out.sum(), len(rows)),
    )
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


def read_column_names(args: DataArguments) -> list[str]:
    """The columns of the rows to train on, as their sources name them."""
    columns: dict[str, None] = {}
    for source, own in args.sources().items():
        with naming(source):
            table, _ = select_splits(read_source(own)[0], replace(own, eval_split=None))
            columns |= dict.fromkeys(get_column_names(table))
    return list(columns)


def get_column_names(table: Table) -> list[str]:
    """The columns of a table. Reads the first row if a stream does not know its columns before (json and csv)."""
    return table.column_names or list(next(iter(table), {}))


def _require_separate_rows(args: DataArguments) -> None:
    """Raises: ValueError if the same rows are for two of training, evaluation and test, without allow_image_overlap."""
    sources = [own.dataset_name or own.questions_file for own in args.sources().values()]
    default_split = "validation" if args.dataset_name == "demo" else None
    # verb -> sources and split
    uses = {"train": (sources, args.train_split)}
    if args.eval_dataset_name:
        uses["evaluate"] = ([args.eval_dataset_name], args.eval_split or "train")
    elif args.eval_questions_file and args.eval_split != args.train_split:
        uses["evaluate"] = ([args.eval_questions_file], args.train_split)  # a VQA v2 file has no splits
    elif args.eval_split or default_split:
        uses["evaluate"] = (sources, args.eval_split or default_split)
    if args.test_dataset_name or args.test_split:
        uses["test"] = ([args.test_dataset_name] if args.test_dataset_name else sources, args.test_split or "train")
    for one, other in combinations(uses, 2):
        (names, split), (other_names, other_split) = uses[one], uses[other]
        same = [name for name, other_name in product(names, other_names) if _is_same_file(name, other_name)]
        if split == other_split and same and not args.allow_image_overlap:
            flags = "--test_split or --test_dataset_name"
            if other == "evaluate":
                flags = "--eval_split, --eval_dataset_name or --eval_questions_file (none: some images are held out)"
            raise ValueError(
                f"The same rows are used to {one} and to {other}: {same[0]}, split {split}. The scores would say "
                f"nothing about new images. Choose other rows with {flags}. To use the same rows, set "
                "--allow_image_overlap."
            )


def _is_same_file(one: str, other: str | None) -> bool:
    """Also True for a folder and its metadata file, and for equal ids on the Hub."""

    def resolve(name: str) -> Path:
        path = Path(name).expanduser().resolve()
        return next((path / file for file in METADATA_FILES if (path / file).is_file()), path)

    return other is not None and resolve(one) == resolve(other)


def _select_by_column(table: Table, args: DataArguments) -> tuple[Table, Table | None]:
    if "split" not in table.column_names:
        if args.eval_split or args.train_split != "train":
            raise ValueError(
                "train_split and eval_split need a column `split` or a source with named splits; this source has "
                "neither. Remove them to hold out some of the images."
            )
        return table, None
    values = [] if isinstance(table, RowsOfFile) else _split_values(table)
    found = table.split_sizes if isinstance(table, RowsOfFile) else dict.fromkeys(values)

    def select(split: str) -> Table:
        _require_split(split, found)
        if isinstance(table, RowsOfFile):
            return table.select_split(split)
        return table.select([position for position, value in enumerate(values) if value == split])

    return select(args.train_split), select(args.eval_split) if args.eval_split else None


def _select_by_name(tables: dict[str, Table], args: DataArguments) -> tuple[Table, Table | None]:
    _require_split(args.train_split, tables)
    eval_split = args.eval_split
    if eval_split is None and (args.eval_questions_file or args.dataset_name == "demo"):
        eval_split = "validation" if args.dataset_name == "demo" else "eval"
    if eval_split is not None:
        _require_split(eval_split, tables)
    return tables[args.train_split], tables[eval_split] if eval_split else None


def _require_split(split: str, found: Iterable[str]) -> None:
    if split not in found:
        raise ValueError(
            f"The split {split!r} does not exist; the data has {', '.join(found)}. Set --train_split and --eval_split."
        )


def _split_values(table: Dataset) -> list[str]:
    # without [:], datasets 5 reads a column row by row: a minute for a million rows
    return [str(value) for value in table["split"][:]]


def _warn_of_unused_splits(tables: dict[str, Table], args: DataArguments) -> None:
    if list(tables) == [""]:
        (table,) = tables.values()
        if "split" not in table.column_names:
            return
        counts = table.split_sizes if isinstance(table, RowsOfFile) else Counter(_split_values(table))
    else:
        counts = {name: None if isinstance(table, IterableDataset) else len(table) for name, table in tables.items()}
    test_split = None if args.test_dataset_name else args.test_split
    others = [name for name in counts if name not in (args.train_split, test_split)]
    if others:
        found = ", ".join(name if rows is None else f"{name} ({rows} rows)" for name, rows in counts.items())
        logger.warning(
            "The data has the splits %s. Only %s is used, and some of its images are held out to evaluate on. To "
            "evaluate on another split, use --eval_split %s",
            *(found, args.train_split + (f" (and {test_split} to test)" if test_split else ""), others[0]),
        )
