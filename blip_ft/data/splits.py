"""Choose the rows to train, evaluate and test on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset

from blip_ft.arguments import DataArguments
from blip_ft.data.sources import METADATA_FILES, read_source
from blip_ft.data.tables import RowsOfFile, Table, encode_column

logger = logging.getLogger(__name__)


def read_splits(args: DataArguments) -> dict[str, tuple[Table, Path | None]]:
    """The raw rows of `train` and, if they are given, of `eval` and `test`.

    Each table comes with the folder that its image paths are relative to.
    """
    _require_separate_rows(args)
    tables, folder = read_source(args)
    test = {}
    if args.test_dataset_name or args.test_split:
        sources = (tables, folder)
        if args.test_dataset_name:
            sources = read_source(replace(args, dataset_name=args.test_dataset_name))
        chosen = replace(args, train_split=args.test_split or "train", eval_split=None, streaming=False)
        table, _ = select_splits(sources[0], chosen)
        test = {"test": (table, sources[1])}
    if args.eval_dataset_name:
        other, other_folder = read_source(replace(args, dataset_name=args.eval_dataset_name))
        train, _ = select_splits(tables, replace(args, eval_split=None))
        # all rows of the other source, unless it has splits
        evaluation, _ = select_splits(other, replace(args, train_split=args.eval_split or "train", eval_split=None))
        return {"train": (train, folder), "eval": (evaluation, other_folder), **test}
    train, evaluation = select_splits(tables, args)
    if evaluation is None:
        _warn_of_unused_splits(tables, args)
    return {"train": (train, folder), **({} if evaluation is None else {"eval": (evaluation, folder)}), **test}


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
    """The columns of the rows to train on, as the source names them."""
    return get_column_names(select_splits(read_source(args)[0], replace(args, eval_split=None))[0])


def get_column_names(table: Table) -> list[str]:
    """The columns of a table. Reads the first row if a stream does not know its columns before (json and csv)."""
    return table.column_names or list(next(iter(table), {}))


def _require_separate_rows(args: DataArguments) -> None:
    """Raises: ValueError if the same rows are for two of training, evaluation and test, without allow_image_overlap."""
    source = args.dataset_name or args.questions_file
    default_split = "validation" if args.dataset_name == "demo" else None
    # verb -> source and split
    uses = {"train": (source, args.train_split)}
    if args.eval_dataset_name:
        uses["evaluate"] = (args.eval_dataset_name, args.eval_split or "train")
    elif args.eval_questions_file and args.eval_split != args.train_split:
        uses["evaluate"] = (args.eval_questions_file, args.train_split)  # a VQA v2 file has no splits
    elif args.eval_split or default_split:
        uses["evaluate"] = (source, args.eval_split or default_split)
    if args.test_dataset_name or args.test_split:
        uses["test"] = (args.test_dataset_name or source, args.test_split or "train")
    for one, other in combinations(uses, 2):
        (name, split), (other_name, other_split) = uses[one], uses[other]
        if split == other_split and _is_same_file(name, other_name) and not args.allow_image_overlap:
            flags = "--test_split or --test_dataset_name"
            if other == "evaluate":
                flags = "--eval_split, --eval_dataset_name or --eval_questions_file (none: some images are held out)"
            raise ValueError(
                f"The same rows are used to {one} and to {other}: {name}, split {split}. The scores would say nothing "
                f"about new images. Choose other rows with {flags}. To use the same rows, set --allow_image_overlap."
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
