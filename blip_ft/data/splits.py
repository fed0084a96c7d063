"""Choose the rows to train, evaluate and test on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
from datasets import (
    Dataset,
    IterableDataset,
)

from blip_ft.arguments import DataArguments
from blip_ft.data.sources import METADATA_FILES, read_source
from blip_ft.data.tables import RowsOfFile, Table, dictionary_of

logger = logging.getLogger(__name__)


def column_names(args: DataArguments) -> list[str]:
    """Of the rows to train on, as the source calls them."""
    return columns_of(select_splits(read_source(args)[0], replace(args, eval_split=None))[0])


def read_splits(args: DataArguments) -> dict[str, tuple[Table, Path | None]]:
    """Raw rows of `train` and, where they are named, of `eval` and `test`, with the folder that their image paths
    start from."""
    _require_separate_rows(args)
    tables, folder = read_source(args)
    test = {}
    if args.test_dataset_name or args.test_split:
        sources = (tables, folder)
        if args.test_dataset_name:
            sources = read_source(replace(args, dataset_name=args.test_dataset_name))
        named = replace(args, train_split=args.test_split or "train", eval_split=None, streaming=False)
        table, _ = select_splits(sources[0], named)
        test = {"test": (table, sources[1])}
    if args.eval_dataset_name:
        other, other_folder = read_source(replace(args, dataset_name=args.eval_dataset_name))
        train, _ = select_splits(tables, replace(args, eval_split=None))
        # all of the other source, unless it has splits
        evaluation, _ = select_splits(other, replace(args, train_split=args.eval_split or "train", eval_split=None))
        return {"train": (train, folder), "eval": (evaluation, other_folder), **test}
    train, evaluation = select_splits(tables, args)
    if evaluation is None:
        _warn_of_unused_splits(tables, args)
    return {"train": (train, folder), **({} if evaluation is None else {"eval": (evaluation, folder)}), **test}


def _require_separate_rows(args: DataArguments) -> None:
    """Raises: ValueError if the same rows are to be trained, evaluated or tested on without allow_image_overlap."""
    source, by_default = args.dataset_name or args.questions_file, "validation" if args.dataset_name == "demo" else None
    # verb -> source and split
    uses = {"train": (source, args.train_split)}
    if args.eval_dataset_name:
        uses["evaluate"] = (args.eval_dataset_name, args.eval_split or "train")
    elif args.eval_questions_file and args.eval_split != args.train_split:
        uses["evaluate"] = (args.eval_questions_file, args.train_split)  # a file of VQA v2 has no splits
    elif args.eval_split or by_default:
        uses["evaluate"] = (source, args.eval_split or by_default)
    if args.test_dataset_name or args.test_split:
        uses["test"] = (args.test_dataset_name or source, args.test_split or "train")
    for one, other in combinations(uses, 2):
        (name, split), (other_name, other_split) = uses[one], uses[other]
        if split == other_split and _same_file(name, other_name) and not args.allow_image_overlap:
            named = "--eval_split, --eval_dataset_name or --eval_questions_file, or none of these to hold out a part"
            raise ValueError(
                f"The rows to {other} on are those to {one} on: {name}, split {split}. Scores would say nothing about "
                f"new images. Name other rows with "
                f"{'--test_split or --test_dataset_name' if other == 'test' else f'{named} of the images'}; "
                "--allow_image_overlap allows it."
            )


def _same_file(one: str, other: str | None) -> bool:
    """Also of a folder and its metadata file, and of two equal ids of the Hub."""

    def file_of(name: str) -> Path:
        path = Path(name).expanduser().resolve()
        return next((path / file for file in METADATA_FILES if (path / file).is_file()), path)

    return other is not None and file_of(one) == file_of(other)


def columns_of(table: Table) -> list[str]:
    # a stream of json or csv does not know its columns before its first row
    return table.column_names or list(next(iter(table), {}))


def select_splits(tables: dict[str, Table], args: DataArguments) -> tuple[Table, Table | None]:
    return _split_by_column(tables[""], args) if list(tables) == [""] else _named_splits(tables, args)


def _split_by_column(table: Table, args: DataArguments) -> tuple[Table, Table | None]:
    if "split" not in table.column_names:
        if args.eval_split or args.train_split != "train":
            raise ValueError(
                "train_split and eval_split need a column `split` or a source with named splits; this one has neither. "
                "Leave them out: a part of the images is then held out."
            )
        return table, None
    values = [] if isinstance(table, RowsOfFile) else _split_values(table)
    found = table.split_sizes if isinstance(table, RowsOfFile) else dict.fromkeys(values)

    def rows_of(split: str) -> Table:
        _require_split(split, found)
        if isinstance(table, RowsOfFile):
            return table.select_split(split)
        return table.select([position for position, value in enumerate(values) if value == split])

    return rows_of(args.train_split), rows_of(args.eval_split) if args.eval_split else None


def _named_splits(tables: dict[str, Table], args: DataArguments) -> tuple[Table, Table | None]:
    _require_split(args.train_split, tables)
    eval_split = args.eval_split
    if eval_split is None and (args.eval_questions_file or args.dataset_name == "demo"):
        eval_split = "validation" if args.dataset_name == "demo" else "eval"
    if eval_split is not None:
        _require_split(eval_split, tables)
    return tables[args.train_split], tables[eval_split] if eval_split else None


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
            "The data has the splits %s. Only %s is used, and a part of its images is held out to evaluate on. To "
            "evaluate on another split: --eval_split %s",
            *(found, args.train_split + (f" (and {test_split} to test)" if test_split else ""), others[0]),
        )


def _split_values(table: Dataset) -> list[str]:
    # without [:] a column of datasets 5 comes row by row, which takes a minute for a million
    return [str(value) for value in table["split"][:]]


def _require_split(split: str, there: Iterable[str]) -> None:
    if split not in there:
        raise ValueError(
            f"There is no split {split!r}; the data has {', '.join(there)}. Set train_split and eval_split."
        )


def hold_out_images(rows: Dataset, fraction: float, seed: int, identity: dict[str, int]) -> tuple[Dataset, Dataset]:
    """identity: by image_id, of an image that may stand there under several."""
    ids, numbers = dictionary_of(rows, "image_id"), {}
    number_of_id = [numbers.setdefault(identity[image_id], len(numbers)) for image_id in ids.dictionary.to_pylist()]
    images = np.array(number_of_id, int)[ids.indices.to_numpy()]
    total = int(images.max(initial=-1)) + 1
    if total < 2:
        raise ValueError(f"Holding out images needs two or more, found {total}. Give an eval_split.")
    number = min(max(1, round(fraction * total)), total - 1)
    held_out = np.isin(images, np.random.default_rng(seed).choice(total, number, replace=False))
    logger.info(
        "No eval_split: %d of %d images with %d of %d rows are held out to evaluate on.",
        *(number, total, held_out.sum(), len(rows)),
    )
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))
