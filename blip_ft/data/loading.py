"""The rows of a run, of one schema, without bad rows."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from datasets import (
    Dataset,
)

from blip_ft.arguments import DataArguments
from blip_ft.data.checks import find_unreadable_images, report_bad_rows, without_images
from blip_ft.data.schema import CaptionSchema, Part, Schema, VqaSchema
from blip_ft.data.sources import read_source
from blip_ft.data.splits import columns_of, hold_out_images, read_splits, select_splits
from blip_ft.data.streaming import StreamedRows
from blip_ft.data.tables import CaptionRows, Row, dictionary_of

logger = logging.getLogger(__name__)


@dataclass
class ImageOverlap:
    """How many images to evaluate on are also trained on.

    Args:
        num_shared: of those to evaluate on.
        num_eval: all images to evaluate on.
        example: image_id of one that is shared, None if there is none.
    """

    num_shared: int
    num_eval: int
    example: str | None


def load_vqa(
    args: DataArguments, bad_rows_file: Path | None = None, seed: int = 42
) -> tuple[Dataset | StreamedRows, Dataset]:
    """The rows to train on and those to evaluate on, one question each.

    Columns: image ({"bytes", "path"}, not decoded), image_id, question, question_id, answers (one string or more) and,
    where the source has it, answer_type. Rows that cannot be used are left out and listed in bad_rows_file (jsonl); in
    evaluation those whose image cannot be read stay, to be counted as wrong. A question_id that stands twice is named
    in a warning, and so are images to evaluate on that are also trained on. The second data set has the attribute
    image_overlap: an ImageOverlap, or None if the rows to train on are streamed.

    Raises: ValueError for a source, column or split that is not there, if more than max_bad_fraction is bad, and if the
        same rows are to be trained and evaluated on without allow_image_overlap.
    """
    rows = load_splits("vqa", replace(args, test_split=None, test_dataset_name=None), bad_rows_file, seed)
    return rows.train, rows.evaluation


def load_captions(
    args: DataArguments, bad_rows_file: Path | None = None, seed: int = 42
) -> tuple[CaptionRows | StreamedRows, Dataset]:
    """Captions to train on, one a row, and images with all their captions to evaluate on.

    Columns: image ({"bytes", "path"}, not decoded), image_id, and caption to train, captions (strings) to evaluate on.
    What an image's rows in the source say is put together, each caption once. Bad rows, image_overlap and errors as in
    load_vqa.
    """
    rows = load_splits("captions", replace(args, test_split=None, test_dataset_name=None), bad_rows_file, seed)
    return rows.train, rows.evaluation


class Splits(NamedTuple):
    """The rows of a run. Those to evaluate and test on have the attribute image_overlap, those to test on also
    overlap_with_evaluation; test may be None."""

    train: Dataset | CaptionRows | StreamedRows
    evaluation: Dataset
    test: Dataset | None


def load_splits(
    kind: Literal["vqa", "captions"], args: DataArguments, bad_rows_file: Path | None = None, seed: int = 42
) -> Splits:
    """What load_vqa or load_captions gives, and the rows of test_split or test_dataset_name, which are like those to
    evaluate on. Images to test on that are also evaluated on are named in a warning.

    Raises: ValueError as they do, and if the same rows are to be tested and trained or evaluated on.
    """
    rows, identity = _load(VqaSchema if kind == "vqa" else CaptionSchema, args, bad_rows_file, seed)
    if kind == "vqa":
        for name, part in rows.items():
            if isinstance(part, Dataset):
                _warn_of_repeated_ids(part, name)
    if kind == "vqa" or args.streaming:
        train = _first(rows["train"], args.max_train_samples)
    else:
        train = CaptionRows(rows["train"], args.max_train_samples)
    evaluation = _first(rows["eval"], args.max_eval_samples)
    evaluation.image_overlap = _find_image_overlap(
        {"train": train, "eval": evaluation}, identity, is_one_source=not args.eval_dataset_name
    )
    if "test" not in rows:
        return Splits(train, evaluation, None)
    test = _first(rows["test"], args.max_eval_samples)
    of_one_source = not args.test_dataset_name
    test.image_overlap = _find_image_overlap({"train": train, "test": test}, identity, is_one_source=of_one_source)
    test.overlap_with_evaluation = _find_image_overlap(
        {"eval": evaluation, "test": test}, identity, is_one_source=of_one_source and not args.eval_dataset_name
    )
    return Splits(train, evaluation, test)


def load_to_predict(args: DataArguments, task: str) -> tuple[Dataset, list[Row]]:
    """The rows of eval_split, or of a source's only split, and a list of those that cannot be used, with the reason.

    task: vqa, with a question each, or images, each once. Columns as load_vqa and load_captions evaluate on; answers
    and captions are empty where the source has none.
    """
    tables, folder = read_source(args)
    split = args.eval_split or ("validation" if args.dataset_name == "demo" else None)
    if split is None and len(tables) > 1:
        raise ValueError(f"The data has the splits {', '.join(tables)}. Choose one: --eval_split {list(tables)[-1]}")
    if split is None:
        (table,) = tables.values()
        if "split" in table.column_names:
            logger.warning("The rows of all splits are taken, also those trained on. Choose one with --eval_split.")
    else:
        table, _ = select_splits(tables, replace(args, train_split=split, eval_split=None))
    schema = VqaSchema if task == "vqa" else CaptionSchema
    part = Part(table, schema(args, table.column_names, folder, "eval", needs_references=False))
    rows, bad = _first(part.good(), args.max_eval_samples), list(part.bad_rows({}))
    if not len(rows):
        raise ValueError(f"No row is left to predict on; {len(part)} were read. Why not: {bad[:1]}")
    return rows, bad


def _load(
    schema: type[Schema], args: DataArguments, bad_rows_file: Path | None, seed: int
) -> tuple[dict[str, Dataset | StreamedRows], dict[str, dict[str, int]]]:
    """The good rows of `train`, `eval` and, where it is named, `test`, and of each Part.identity."""
    sources = {
        name: (table, schema(args, columns_of(table), folder, name))
        for name, (table, folder) in read_splits(args).items()
    }
    stream = StreamedRows(*sources.pop("train"), args, bad_rows_file, seed) if args.streaming else None
    parts = {name: Part(*source) for name, source in sources.items()}
    unreadable = find_unreadable_images(parts.values(), args.check_images)

    bad = [row for name, part in parts.items() for row in part.bad_rows(unreadable[name])]
    total = sum(len(part) for part in parts.values())
    if bad:
        report_bad_rows(bad, total, args.max_bad_fraction, bad_rows_file)

    rows = {name: part.good() for name, part in parts.items()}
    identity = {name: part.identity for name, part in parts.items()}
    if "eval" not in rows:  # a stream is never held out from
        rows["train"], rows["eval"] = hold_out_images(rows["train"], args.eval_fraction, seed, identity["train"])
        identity["eval"] = identity["train"]
    if stream is None:
        rows["train"] = without_images(rows["train"], unreadable["train"])
    for name, part in rows.items():
        if not len(part):
            raise ValueError(f"No row is left to {name} on. {total} rows were read, {len(bad)} of them were bad.")
    return rows if stream is None else {"train": stream, **rows}, identity


def _first(rows: Dataset | StreamedRows, limit: int | None) -> Dataset | StreamedRows:
    if limit is None or isinstance(rows, StreamedRows):  # which stops each pass there itself
        return rows
    return rows.select(range(min(limit, len(rows))))


VERBS = {"train": "trained", "eval": "evaluated", "test": "tested"}


def _find_image_overlap(
    parts: dict[str, Dataset | CaptionRows | StreamedRows], identity: dict[str, dict[str, int]], is_one_source: bool
) -> ImageOverlap | None:
    """Images of the second part that are also in the first: of the same file or content and, within one source, of the
    same image_id."""
    (name, rows), (eval_name, eval_rows) = parts.items()
    if isinstance(rows, StreamedRows):
        return None
    if isinstance(rows, CaptionRows):
        rows = rows.images.select(np.unique(rows.image))
    first, second = (dictionary_of(part, "image_id").dictionary.to_pylist() for part in (rows, eval_rows))
    images = {identity[name][image_id] for image_id in first}
    ids = set(first) if is_one_source else set()  # another source may count its images from 0 too
    shared = [image_id for image_id in second if image_id in ids or identity[eval_name][image_id] in images]
    if shared:
        logger.warning(
            "%d of %d images to %s on are also %s on, e.g. %s. Scores on these say little about new images. "
            "Take them out of one of the two.",
            *(len(shared), len(second), "evaluate" if eval_name == "eval" else "test", VERBS[name], shared[0]),
        )
    return ImageOverlap(len(shared), len(second), shared[0] if shared else None)


def _warn_of_repeated_ids(rows: Dataset, name: str) -> None:
    ids = dictionary_of(rows, "question_id")
    counts = np.bincount(ids.indices)
    if repeated := int((counts > 1).sum()):
        example = ids.dictionary[int(counts.argmax())]
        logger.warning(
            "%d question_ids of the rows to %s on stand in several rows, e.g. %s. All rows are used, but files of "
            "answers to be scored elsewhere, as on the server of VQA v2, need each question_id once.",
            *(repeated, name, example),
        )
