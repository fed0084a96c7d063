"""Load the rows of a run: in one schema, without bad rows, and with a count of images that are in two parts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from datasets import Dataset

from blip_ft.arguments import DataArguments
from blip_ft.data.checks import drop_unreadable_images, find_unreadable_images, report_bad_rows
from blip_ft.data.schema import CaptionSchema, MixedPart, Part, Schema, VqaSchema
from blip_ft.data.sources import read_source
from blip_ft.data.splits import SourceRows, get_column_names, hold_out_images, naming, read_splits, select_splits
from blip_ft.data.streaming import StreamedRows
from blip_ft.data.tables import CaptionRows, Row, Table, encode_column

logger = logging.getLogger(__name__)

# part -> what is done with its rows, for messages
VERBS = {"train": "train", "eval": "evaluate", "test": "test"}
PARTICIPLES = {"train": "trained", "eval": "evaluated", "test": "tested"}


@dataclass
class ImageOverlap:
    """How many images of the evaluation rows are also in the training rows.

    Args:
        num_shared: images that are in both.
        num_eval: all images of the evaluation rows.
        example: image_id of a shared image, None if there is none.
    """

    num_shared: int
    num_eval: int
    example: str | None


class Splits(NamedTuple):
    """The rows of a run. `test` may be None.

    `evaluation` and `test` have the attribute image_overlap: an ImageOverlap with the training rows, or None if these
    are streamed. `test` also has overlap_with_evaluation, an ImageOverlap with the evaluation rows.
    """

    train: Dataset | CaptionRows | StreamedRows
    evaluation: Dataset
    test: Dataset | None


def load_vqa(
    args: DataArguments, bad_rows_file: Path | None = None, seed: int = 42
) -> tuple[Dataset | StreamedRows, Dataset]:
    """Load the rows to train on and the rows to evaluate on, with one question each.

    Columns: image ({"bytes", "path"}, not decoded), image_id, question, question_id, answers (one or more strings) and,
    if the source has it, answer_type. Rows that cannot be used are left out and listed in bad_rows_file (jsonl). But
    evaluation rows with an unreadable image stay, and count as wrong. A warning names a question_id that several rows
    have, and images that are both trained and evaluated on. The evaluation rows have the attribute image_overlap: an
    ImageOverlap, or None if the training rows are streamed.

    Raises: ValueError if a source, column or split does not exist, if more than max_bad_fraction of the rows are bad,
        or if training and evaluation use the same rows without allow_image_overlap.
    """
    rows = load_splits("vqa", replace(args, test_split=None, test_dataset_name=None), bad_rows_file, seed)
    return rows.train, rows.evaluation


def load_captions(
    args: DataArguments, bad_rows_file: Path | None = None, seed: int = 42
) -> tuple[CaptionRows | StreamedRows, Dataset]:
    """Load captions to train on, one per row, and images with all their captions to evaluate on.

    Columns: image ({"bytes", "path"}, not decoded), image_id, and caption (training) or captions (evaluation, a list of
    strings). The captions of all rows of an image in the source are merged, without duplicates. Bad rows,
    image_overlap and errors are as in load_vqa.
    """
    rows = load_splits("captions", replace(args, test_split=None, test_dataset_name=None), bad_rows_file, seed)
    return rows.train, rows.evaluation


def load_splits(
    kind: Literal["vqa", "captions"], args: DataArguments, bad_rows_file: Path | None = None, seed: int = 42
) -> Splits:
    """Load the rows of load_vqa or load_captions, and those of test_split or test_dataset_name.

    Test rows have the columns of evaluation rows. A warning names images that are in both.

    Raises: ValueError as load_vqa does, and if test rows are the same as training or evaluation rows.
    """
    rows, identity = _load_parts(VqaSchema if kind == "vqa" else CaptionSchema, args, bad_rows_file, seed)
    if kind == "vqa":
        for name, part in rows.items():
            if isinstance(part, Dataset):
                _warn_of_repeated_ids(part, name)
    if kind == "vqa" or args.streaming:
        train = _take_first(rows["train"], args.max_train_samples)
    else:
        train = CaptionRows(rows["train"], args.max_train_samples)
    evaluation = _take_first(rows["eval"], args.max_eval_samples)
    evaluation.image_overlap = _find_image_overlap(
        {"train": train, "eval": evaluation}, identity, is_one_source=not args.eval_dataset_name
    )
    if "test" not in rows:
        return Splits(train, evaluation, None)
    test = _take_first(rows["test"], args.max_eval_samples)
    is_one_source = not args.test_dataset_name
    test.image_overlap = _find_image_overlap({"train": train, "test": test}, identity, is_one_source)
    test.overlap_with_evaluation = _find_image_overlap(
        {"eval": evaluation, "test": test}, identity, is_one_source and not args.eval_dataset_name
    )
    return Splits(train, evaluation, test)


def load_to_predict(
    args: DataArguments, kind: Literal["vqa", "images"], needs_split: bool = False
) -> tuple[Dataset, list[Row]]:
    """Load the rows of eval_split, or of the only split of a source, and a list of the rows that cannot be used.

    The columns are those of evaluation rows. Answers and captions are empty if the source has none.

    Args:
        kind: `vqa` gives one row per question, `images` one row per image.
        needs_split: refuse rows of several splits, which the result would mix.
    Returns: the rows; split, row, image_id and reason of each bad row.
    """
    tables, folder = read_source(args)
    split = args.eval_split or ("validation" if args.dataset_name == "demo" else None)
    if split is None and len(tables) > 1:
        raise ValueError(f"The data has the splits {', '.join(tables)}. Choose one: --eval_split {list(tables)[-1]}")
    if split is None:
        (table,) = tables.values()
        if "split" in table.column_names:
            if needs_split:
                raise ValueError("The data has a column `split`. Choose the rows to use, e.g. --eval_split train.")
            logger.warning("The rows of all splits are used, including training rows. Choose one with --eval_split.")
    else:
        table, _ = select_splits(tables, replace(args, train_split=split, eval_split=None))
    schema = VqaSchema if kind == "vqa" else CaptionSchema
    part = Part(table, schema(args, table.column_names, folder, "eval", needs_references=False))
    rows, bad = _take_first(part.usable_rows(), args.max_eval_samples), list(part.bad_rows({}))
    if not len(rows):
        raise ValueError(f"None of the {len(part)} rows can be used to predict. The first bad row: {bad[:1]}")
    return rows, bad


def _load_parts(
    schema: type[Schema], args: DataArguments, bad_rows_file: Path | None, seed: int
) -> tuple[dict[str, Dataset | StreamedRows], dict[str, dict[str, int]]]:
    """The usable rows and the Part.identity of `train`, `eval` and, if it is given, `test`."""
    sources = {name: _with_schemas(schema, args, name, several) for name, several in read_splits(args).items()}
    stream = None
    if args.streaming:  # of one source
        (source,) = sources.pop("train").values()
        stream = StreamedRows(*source, args, bad_rows_file, seed)
    parts = {name: _mix(several) for name, several in sources.items()}
    unreadable = find_unreadable_images(parts.values(), args.check_images)

    bad = [row for name, part in parts.items() for row in part.bad_rows(unreadable[name])]
    total = sum(len(part) for part in parts.values())
    if bad:
        report_bad_rows(bad, total, args.max_bad_fraction, bad_rows_file)

    rows = {name: part.usable_rows() for name, part in parts.items()}
    identity = {name: part.identity for name, part in parts.items()}
    if "eval" not in rows:  # never the case for a stream: no image can be held out from it
        rows["train"], rows["eval"] = hold_out_images(rows["train"], args.eval_fraction, seed, identity["train"])
        identity["eval"] = identity["train"]
    if stream is None:
        rows["train"] = drop_unreadable_images(rows["train"], unreadable["train"])
    for name, part in rows.items():
        if not len(part):
            raise ValueError(f"No rows are left to {VERBS[name]} on: {len(bad)} of {total} rows are bad.")
    return rows if stream is None else {"train": stream, **rows}, identity


def _with_schemas(
    schema: type[Schema], args: DataArguments, name: str, sources: list[SourceRows]
) -> dict[str, tuple[Table, Schema]]:
    """The table of each source, and the schema that converts it; all give the same columns."""
    columns = {source.source: get_column_names(source.table) for source in sources}
    in_any = {column for names in columns.values() for column in names}
    if name == "train" and schema is VqaSchema and "weight" in in_any:
        logger.info("The column `weight` multiplies the loss of each row. Rename it if it means something else.")
    found = {}
    for source, table, folder in sources:
        with naming(source):
            found[source] = (table, schema(args, columns[source], folder, name, source=source, others_have=in_any))
    return found


def _mix(sources: dict[str, tuple[Table, Schema]]) -> Part:
    parts = []
    for source, (table, schema) in sources.items():
        with naming(source):
            parts.append(Part(table, schema))
    return MixedPart(parts) if len(parts) > 1 else parts[0]


def _take_first(rows: Dataset | StreamedRows, limit: int | None) -> Dataset | StreamedRows:
    if limit is None or isinstance(rows, StreamedRows):  # a stream applies its limit to each pass itself
        return rows
    return rows.select(range(min(limit, len(rows))))


def _find_image_overlap(
    parts: dict[str, Dataset | CaptionRows | StreamedRows], identity: dict[str, dict[str, int]], is_one_source: bool
) -> ImageOverlap | None:
    """Count the images of the second part that are also in the first.

    These have the same file or content or, within one source, the same image_id.
    """
    (name, rows), (eval_name, eval_rows) = parts.items()
    if isinstance(rows, StreamedRows):
        return None
    if isinstance(rows, CaptionRows):
        rows = rows.images.select(np.unique(rows.image_index))
    first, second = (encode_column(part, "image_id").dictionary.to_pylist() for part in (rows, eval_rows))
    images = {identity[name][image_id] for image_id in first}
    ids = set(first) if is_one_source else set()  # two sources may both number their images from 0
    shared = [image_id for image_id in second if image_id in ids or identity[eval_name][image_id] in images]
    if shared:
        logger.warning(
            "%d of %d images to %s on are also %s on, e.g. %s. Scores on them say little about new images. Remove them "
            "from one of the two.",
            *(len(shared), len(second), VERBS[eval_name], PARTICIPLES[name], shared[0]),
        )
    return ImageOverlap(len(shared), len(second), shared[0] if shared else None)


def _warn_of_repeated_ids(rows: Dataset, name: str) -> None:
    ids = encode_column(rows, "question_id")
    counts = np.bincount(ids.indices)
    if repeated := int((counts > 1).sum()):
        example = ids.dictionary[int(counts.argmax())]
        logger.warning(
            "%d question_ids of the rows to %s on appear in several rows, e.g. %s. All rows are used. But an answer "
            "file for an evaluation server, such as the one of VQA v2, may have each question_id only once.",
            *(repeated, VERBS[name], example),
        )
