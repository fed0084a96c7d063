"""Where rows come from: any source, checked and renamed to one schema, and the order in which they are trained on."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, combinations, count, groupby, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import yaml
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.config import HF_CACHE_HOME, HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image as PillowImage
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import BlipProcessor

from blip_ft import demo
from blip_ft.arguments import (
    BlipTrainingArguments,
    DataArguments,
    ModelArguments,
    PeftArguments,
    VqaArguments,
    parse,
)
from blip_ft.collators import (
    IMAGE_FORMATS,
    VqaCollator,
    clean_caption,
    content_hash,
    encode_labels,
    encode_row_images,
    encode_texts,
    open_encoded,
    open_image,
)
from blip_ft.models import load_processor
from blip_ft.outputs import to_json

logger = logging.getLogger(__name__)

Row = dict[str, Any]

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
HUB_CACHES = (HF_DATASETS_CACHE, HF_HUB_CACHE)
COCO_FILE = re.compile(r"COCO_(\w+)_\d{12}\.jpg")
VQA_FEATURES = {
    **{name: Value("string") for name in ("question", "question_id", "answer_type")},
    "answers": List(Value("string")),
}


class RowsOfFile:
    """Rows that are read again at each pass: held as Python objects, a million with ten answers take 3 GB.

    Args:
        read: gives the rows from the beginning.
        split: only those with this value of the column `split`.
    """

    def __init__(self, read: Callable[[], Iterable[Row]], split: str | None = None) -> None:
        self.read, self.split = read, split
        self.length, columns = 0, {}
        for row in self:
            self.length += 1
            columns |= dict.fromkeys(row)
        self.column_names = list(columns)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Row]:
        for row in self.read():
            if self.split is None or str(row.get("split")) == self.split:
                yield row


Table = Dataset | RowsOfFile | IterableDataset


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
    evaluation those whose picture cannot be read stay, to be counted as wrong. A question_id that stands twice is named
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
    """Captions to train on, one a row, and pictures with all their captions to evaluate on.

    Columns: image ({"bytes", "path"}, not decoded), image_id, and caption to train, captions (strings) to evaluate on.
    What a picture's rows in the source say is put together, each caption once. Bad rows, image_overlap and errors as in
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
    rows, identity = _load(_VqaSchema if kind == "vqa" else _CaptionSchema, args, bad_rows_file, seed)
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

    task: vqa, with a question each, or pictures, each once. Columns as load_vqa and load_captions evaluate on; answers
    and captions are empty where the source has none.
    """
    tables, folder = _read(args)
    split = args.eval_split or ("validation" if args.dataset_name == "demo" else None)
    if split is None and len(tables) > 1:
        raise ValueError(f"The data has the splits {', '.join(tables)}. Choose one: --eval_split {list(tables)[-1]}")
    if split is None:
        (table,) = tables.values()
        if "split" in table.column_names:
            logger.warning("The rows of all splits are taken, also those trained on. Choose one with --eval_split.")
    else:
        table, _ = _select_splits(tables, replace(args, train_split=split, eval_split=None))
    schema = _VqaSchema if task == "vqa" else _CaptionSchema
    part = _Part(table, schema(args, table.column_names, folder, "eval", needs_references=False))
    rows, bad = _first(part.good(), args.max_eval_samples), list(part.bad_rows({}))
    if not len(rows):
        raise ValueError(f"No row is left to predict on; {len(part)} were read. Why not: {bad[:1]}")
    return rows, bad


def list_pictures(paths: Iterable[str]) -> Dataset:
    """image and image_id, its path, of picture files and of those in folders, in order of their names.

    Raises: ValueError for a path that is not there, and for a folder without pictures.
    """
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"There is no picture and no folder {path}. Check the path.")
        found = [path]
        if path.is_dir():
            known = PillowImage.registered_extensions().items()
            endings = {ending for ending, form in known if form in IMAGE_FORMATS}
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings)
        if not found:
            raise ValueError(f"{path} holds no picture (.jpg, .png, ...).")
        files += map(str, found)
    features = Features({"image": Image(decode=False), "image_id": Value("string")})
    rows = ({"image": {"bytes": None, "path": file}, "image_id": file} for file in dict.fromkeys(files))
    return _on_disk(rows, features)


def column_names(args: DataArguments) -> list[str]:
    """Of the rows to train on, as the source calls them."""
    return _columns_of(_select_splits(_read(args)[0], replace(args, eval_split=None))[0])


def _load(
    schema: type[_Schema], args: DataArguments, bad_rows_file: Path | None, seed: int
) -> tuple[dict[str, Dataset | StreamedRows], dict[str, dict[str, int]]]:
    """The good rows of `train`, `eval` and, where it is named, `test`, and of each _Part.identity."""
    sources = {
        name: (table, schema(args, _columns_of(table), folder, name))
        for name, (table, folder) in _read_splits(args).items()
    }
    stream = StreamedRows(*sources.pop("train"), args, bad_rows_file, seed) if args.streaming else None
    parts = {name: _Part(*source) for name, source in sources.items()}
    unreadable = _unreadable_pictures(parts.values(), args.check_images)

    bad = [row for name, part in parts.items() for row in part.bad_rows(unreadable[name])]
    total = sum(len(part) for part in parts.values())
    if bad:
        _report_bad_rows(bad, total, args.max_bad_fraction, bad_rows_file)

    rows = {name: part.good() for name, part in parts.items()}
    identity = {name: part.identity for name, part in parts.items()}
    if "eval" not in rows:  # a stream is never held out from
        rows["train"], rows["eval"] = _hold_out_pictures(rows["train"], args.eval_fraction, seed, identity["train"])
        identity["eval"] = identity["train"]
    if stream is None:
        rows["train"] = _without_pictures(rows["train"], unreadable["train"])
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
        rows = rows.pictures.select(np.unique(rows.picture))
    first, second = (_dictionary(part, "image_id").dictionary.to_pylist() for part in (rows, eval_rows))
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


def values_of(rows: Dataset, column: str) -> Iterator[Any]:
    """The values of a column, a portion at a time: as Python objects, a million with ten answers take 3 GB."""
    for portion in rows.select_columns([column]).iter(10_000):
        yield from portion[column]


def _warn_of_repeated_ids(rows: Dataset, name: str) -> None:
    ids = _dictionary(rows, "question_id")
    counts = np.bincount(ids.indices)
    if repeated := int((counts > 1).sum()):
        example = ids.dictionary[int(counts.argmax())]
        logger.warning(
            "%d question_ids of the rows to %s on stand in several rows, e.g. %s. All rows are used, but files of "
            "answers to be scored elsewhere, as on the server of VQA v2, need each question_id once.",
            *(repeated, name, example),
        )


class CaptionRows(torch.utils.data.Dataset):
    """One caption a row, over pictures that hold several: a picture's bytes are stored once.

    Args:
        pictures: columns image, image_id and captions.
        limit: use the first rows only.
    """

    def __init__(self, pictures: Dataset, limit: int | None = None) -> None:
        self.pictures = pictures
        counts = [len(captions) for captions in pictures["captions"][:]]
        self.picture = np.repeat(np.arange(len(counts)), counts)[:limit]
        self.place = np.concatenate([np.arange(count) for count in counts])[:limit]  # among its picture's captions

    def __len__(self) -> int:
        return len(self.picture)

    def __getitem__(self, position: int) -> Row:
        row = self.pictures[int(self.picture[position])]
        return {"image": row["image"], "image_id": row["image_id"], "caption": row["captions"][self.place[position]]}

    def captions(self) -> list[str]:
        """Of all rows, without reading a picture."""
        of_picture = self.pictures["captions"][:]
        return [of_picture[picture][place] for picture, place in zip(self.picture, self.place, strict=True)]


class StreamedRows(torch.utils.data.IterableDataset):
    """Rows to train on, read as they are needed and without end; rows of a picture that follow each other stay so.

    A pass over the source gives each row once, among all processes and workers together. Where the Hub has a number of
    files that they can share evenly, each reads files of its own; else each reads all and keeps every n-th picture.
    Rows that cannot be used are skipped, and listed in bad_rows_file during the first pass. Same seed, processes and
    workers: same order.

    The trainer sets process, num_processes, batch_size, and first_batch to begin at: those of this process before it
    are read, but no picture of theirs is decoded.

    Raises: ValueError in a pass where more than max_bad_fraction of the rows cannot be used, counted from 1,000 rows.
    """

    def __init__(
        self, table: Table, schema: _Schema, args: DataArguments, bad_rows_file: Path | None, seed: int
    ) -> None:
        if isinstance(table, Dataset):
            pictures = [name for name, feature in table.features.items() if isinstance(feature, Image)]
            for name in pictures:
                table = table.cast_column(name, Image(decode=False))
        if bad_rows_file is not None:
            bad_rows_file.unlink(missing_ok=True)  # of a run that is resumed: its rows are read, and listed, anew
        self.table, self.schema, self.args, self.seed = table, schema, args, seed
        self.bad_rows_file = bad_rows_file
        self.process, self.num_processes, self.batch_size, self.first_batch = 0, 1, 1, 0

    def __iter__(self) -> Iterator[Row]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # the loader takes a batch of each worker in turn, and begins with the first
        number = (number + self.first_batch) % workers
        place, places = self.process * workers + number, self.num_processes * workers
        rows = chain.from_iterable(self.read_pass(epoch, place, places) for epoch in count())
        batches_before = len(range(number, self.first_batch, workers))
        return islice(rows, batches_before * self.batch_size, None)

    def first_rows(self) -> Iterator[Row]:
        """The rows in their order in the source, to look at; none is listed as bad."""
        for row in self._good_rows(self.table, listed=False):
            yield from self.schema.to_train([row])

    def read_pass(self, epoch: int, place: int = 0, places: int = 1) -> Iterator[Row]:
        """The rows that one of `places` readers has in a pass, in random order."""
        generator = np.random.default_rng((self.seed, epoch, place))
        table, share, shares = self.table, place, places
        if isinstance(table, IterableDataset) and table.num_shards % places == 0 and not self.args.max_train_samples:
            table, share, shares = table.shard(places, place), 0, 1
        good = self._good_rows(table, listed=epoch == 0 and share == 0)
        if self.args.group_questions is False:
            groups = ([row] for row in good)
        else:
            groups = (list(rows) for _, rows in groupby(good, key=lambda row: row["image_id"]))
        held, empty = [], True
        for group in islice(groups, share, None, shares):
            empty = False
            if len(held) < self.args.shuffle_buffer:
                held.append(group)
                continue
            drawn = generator.integers(len(held))
            group, held[drawn] = held[drawn], group
            yield from self.schema.to_train(group)
        if empty:
            raise ValueError(
                f"The stream has too few rows for {places} readers (processes x --dataloader_num_workers): nothing is "
                "left for one of them. Take fewer, or leave out --streaming."
            )
        for drawn in generator.permutation(len(held)):
            yield from self.schema.to_train(held[drawn])

    def _good_rows(self, table: Table, listed: bool) -> Iterator[Row]:
        num_bad = position = 0
        for position, row in enumerate(islice(_iterate(table), self.args.max_train_samples)):
            converted, reason = self.schema.convert(row, position)
            if not reason:
                yield converted
                continue
            num_bad += 1
            bad = {"split": "train", "row": position, "image_id": converted["image_id"], "reason": reason}
            if listed:
                logger.warning("train row %d (%s) is skipped: %s", position, bad["image_id"], reason)
                if self.bad_rows_file is not None:
                    with self.bad_rows_file.open("a", encoding="utf-8") as file:
                        file.write(to_json(bad) + "\n")
            self._require_few(num_bad, max(position + 1, 1000), bad)
        if num_bad:
            self._require_few(num_bad, position + 1, bad)

    def _require_few(self, num_bad: int, num_rows: int, last: Row) -> None:
        if num_bad > self.args.max_bad_fraction * num_rows:
            raise ValueError(
                f"{num_bad} of the first {num_rows} rows of the stream cannot be used, the last of them, row "
                f"{last['row']}, for: {last['reason']}. That is more than max_bad_fraction = "
                f"{self.args.max_bad_fraction:.2%}. Mend or remove them, or set --max_bad_fraction"
            )


def number_pictures(rows: Dataset | CaptionRows) -> np.ndarray:
    """(rows,) from 0 in order of first appearance, equal where the image_id is."""
    if isinstance(rows, CaptionRows):
        return number_pictures(rows.pictures)[rows.picture]
    return _dictionary(rows, "image_id").indices.to_numpy()


def _dictionary(rows: Dataset, column: str) -> pa.DictionaryArray:
    """The column's different strings in order of first appearance, and of each row which."""
    # as Arrow and in portions: as Python's strings the ids of a million rows are the larger part of all memory
    portions = rows.select_columns(column).with_format("arrow").iter(10_000)
    ids = pa.chunked_array([table[column].combine_chunks() for table in portions], pa.string())
    return ids.combine_chunks().dictionary_encode()


def require_whole_batch(number: int, global_batch_size: int) -> None:
    """Raises: ValueError where there are fewer rows than one optimiser step takes."""
    if number < global_batch_size:
        raise ValueError(
            f"One step takes {global_batch_size} rows (per_device_train_batch_size x processes x "
            f"gradient_accumulation_steps) and there are {number}. Choose at most {number}, e.g. "
            f"--per_device_train_batch_size {number} --gradient_accumulation_steps 1 on one process."
        )


class GroupedSampler(Sampler[int]):
    """Row positions of one epoch in random order, the rows of a picture side by side, cut to whole global batches.

    Args:
        pictures: (rows,), the number of each row's picture, as number_pictures gives it.
        global_batch_size: rows of one optimiser step: per device x processes x accumulation.
        group: False shuffles rows, whatever their picture.
    Source: the original drops the last batch (utils.py create_loader, drop_last); what is cut differs per epoch.
    """

    def __init__(self, pictures: np.ndarray, global_batch_size: int, seed: int, group: bool = True) -> None:
        require_whole_batch(len(pictures), global_batch_size)
        self.pictures = pictures if group else np.arange(len(pictures))
        self.length = len(pictures) // global_batch_size * global_batch_size
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        place = generator.permutation(int(self.pictures.max()) + 1)[self.pictures]
        order = np.lexsort((generator.random(len(place)), place))
        for start in range(0, self.length, 1 << 16):  # all at once, a list of Python's integers is the larger part
            yield from order[start : min(start + (1 << 16), self.length)].tolist()


class _NextEpochSampler(GroupedSampler):
    """Each pass is the next epoch, for loops that do not call set_epoch."""

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())
        self.epoch += 1
        return iter(order)


class DataPipeline:
    """Loaders for a hand-written training loop, from the YAML that a recipe's --config takes.

    Batches hold pixel_values (rows, 3, height, width), input_ids and attention_mask (rows, question_length) and labels
    (rows, answer_length) of the most frequent answer, -100 on padding. With `group_questions: true` they are those of
    VqaCollator, each picture once.

    Args:
        config: path of the YAML, or its content.
    """

    def __init__(self, config: str | Path | dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(config, dict):
                content, config = config, Path(folder) / "DataPipeline.yaml"
                config.write_text(yaml.safe_dump(content), encoding="utf-8")
            self.model_args, _, self.data_args, self.task_args, self.training_args = parse(
                *(ModelArguments, PeftArguments, DataArguments, VqaArguments, BlipTrainingArguments),
                # batches are made on the CPU; without the flag `bf16: true` is refused where there is no GPU
                argv=["--config", str(config), "--use_cpu"],
            )
        self.processor: BlipProcessor | None = None

    def setup(self) -> None:
        """Read the rows, and the processor of model_name_or_path, by default that of the recipe's checkpoint."""
        name = self.model_args.model_name_or_path or "Salesforce/blip-vqa-base"
        if self.data_args.streaming:
            raise ValueError("streaming is for the recipes. Leave it out of DataPipeline's YAML.")
        self.train_rows, self.eval_rows = load_vqa(self.data_args, seed=self.training_args.seed)
        self.processor = load_processor(
            name,
            self.model_args.image_size,
            revision=self.model_args.model_revision,
            allow_pickle=self.model_args.allow_pickle,
        )
        args = self.training_args
        self._shuffle = torch.Generator().manual_seed(args.seed)
        self._sampler = None
        if self.data_args.group_questions:
            pictures = number_pictures(self.train_rows)
            self._sampler = _NextEpochSampler(pictures, args.per_device_train_batch_size, args.seed)

    def get_train_dataloader(self) -> DataLoader:
        """Shuffled anew in each epoch; with grouping, cut to whole batches."""
        self._require_setup()
        order = {"sampler": self._sampler} if self._sampler else {"shuffle": True, "generator": self._shuffle}
        return self._loader(self.train_rows, self.training_args.per_device_train_batch_size, **order)

    def get_eval_dataloader(self) -> DataLoader:
        """Every row once, in the data's order."""
        self._require_setup()
        return self._loader(self.eval_rows, self.training_args.per_device_eval_batch_size)

    def _require_setup(self) -> None:
        if self.processor is None:
            raise ValueError("Call setup() first: it reads the rows and the processor.")

    def _loader(self, rows: Dataset, batch_size: int, **kwargs: Any) -> DataLoader:
        limits = (self.task_args.max_question_tokens, self.task_args.max_answer_tokens)
        grouped = VqaCollator(self.processor, *limits)
        return DataLoader(
            rows,
            batch_size,
            collate_fn=grouped if self.data_args.group_questions else self._collate_pairs,
            num_workers=self.training_args.dataloader_num_workers,
            **kwargs,
        )

    def _collate_pairs(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        answers = [max(row["answers"], key=row["answers"].count) for row in rows]  # max gives the first on ties
        task, tokenizer, images = self.task_args, self.processor.tokenizer, self.processor.image_processor
        pictures = encode_row_images(rows, images)
        pixels = pictures["pixel_values"][pictures["image_index"]]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.image_mean, images.image_std))
        return {
            "pixel_values": (pixels / 255 - mean) / std,
            **encode_texts([row["question"] for row in rows], tokenizer, task.max_question_tokens),
            "labels": encode_labels(answers, tokenizer, task.max_answer_tokens),
        }


# ---- from a source to raw tables ----


def _read_splits(args: DataArguments) -> dict[str, tuple[Table, Path | None]]:
    """Raw rows of `train` and, where they are named, of `eval` and `test`, with the folder that their picture paths
    start from."""
    _require_separate_rows(args)
    tables, folder = _read(args)
    test = {}
    if args.test_dataset_name or args.test_split:
        sources = (tables, folder)
        if args.test_dataset_name:
            sources = _read(replace(args, dataset_name=args.test_dataset_name))
        named = replace(args, train_split=args.test_split or "train", eval_split=None, streaming=False)
        table, _ = _select_splits(sources[0], named)
        test = {"test": (table, sources[1])}
    if args.eval_dataset_name:
        other, other_folder = _read(replace(args, dataset_name=args.eval_dataset_name))
        train, _ = _select_splits(tables, replace(args, eval_split=None))
        # all of the other source, unless it has splits
        evaluation, _ = _select_splits(other, replace(args, train_split=args.eval_split or "train", eval_split=None))
        return {"train": (train, folder), "eval": (evaluation, other_folder), **test}
    train, evaluation = _select_splits(tables, args)
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


def _read(args: DataArguments) -> tuple[dict[str, Table], Path | None]:
    """Raw tables by split ({"": table} where the source names none), and the folder that picture paths start from."""
    folder = Path(args.image_folder).expanduser() if args.image_folder else None
    if folder and not folder.is_dir():
        raise ValueError(f"image_folder must be a folder, {folder} is none.")
    if args.questions_file:
        files = {"train": (args.questions_file, args.annotations_file)}
        if args.eval_questions_file:
            files["eval"] = (args.eval_questions_file, args.eval_annotations_file)
        tables = {name: RowsOfFile(partial(iter, _read_vqa_v2(*pair))) for name, pair in files.items()}
        return tables, folder
    name = args.dataset_name
    if name is None:
        raise ValueError("No data is named. Give --dataset_name FOLDER_OR_FILE_OR_HUB_ID, or --dataset_name demo.")
    if name == "demo":
        return dict(demo.load_demo()), folder
    path = Path(name).expanduser()
    if path.is_file():
        return {"": _read_file(path, args.streaming)}, folder or path.parent
    if not path.is_dir():
        return _read_hub(name, args.dataset_config, args.streaming), folder
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = load_from_disk(str(path))
        except (OSError, ValueError, KeyError, IndexError) as error:  # the last where it has no rows
            raise ValueError(
                f"{path}, written by save_to_disk, has no rows or cannot be read any more: {error}"
            ) from error
        return dict(saved) if isinstance(saved, DatasetDict) else {"": saved}, folder or path
    for file in METADATA_FILES:
        if (path / file).is_file():
            return {"": _read_file(path / file, args.streaming)}, folder or path
    raise ValueError(
        f"{path} is a folder without {', '.join(METADATA_FILES[:-1])} or {METADATA_FILES[-1]} and was not written by "
        "save_to_disk. Add a metadata.jsonl with a line "
        '{"file_name": "cat.jpg", "question": "what is it?", "answer": "a cat"} for each question.'
    )


def _read_file(path: Path, streaming: bool = False) -> Table:
    if path.suffix == ".parquet":
        try:
            if streaming:
                stream = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
                return RowsOfFile(partial(_iterate, stream.decode(False)))
            return Dataset.from_parquet(str(path))
        except (DatasetGenerationError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path} holds no row, or is no whole parquet file: {error.__cause__ or error}") from error
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        ".json": _read_json,
        ".jsonl": _read_json_lines,
        ".csv": _read_csv,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path} must end in .json, .jsonl, .csv or .parquet.")
    read = partial(readers[path.suffix], path)
    try:
        if path.suffix == ".json":  # one document, which is read as a whole
            read = partial(iter, read())
        rows = RowsOfFile(read)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error
    if not len(rows):
        raise ValueError(f"{path} holds no row.")
    return rows


def _read_json(path: Path) -> list[Row]:
    content = _load_json(path)
    if isinstance(content, dict) and "images" in content:
        return _rows_of_coco(content, path)
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f'{path} must hold a list of objects, {{"data": [...]}} with one, COCO captions or Karpathy\'s splits.'
        )
    return rows


def _rows_of_coco(content: Row, path: Path) -> list[Row]:
    """Rows of COCO's captions_*.json (images, annotations) and of Karpathy's dataset_*.json (images with sentences)."""
    try:
        if "annotations" in content:
            files = _by_id(content["images"], "id", "file_name", path)
            return [
                {
                    "file_name": files[entry["image_id"]],
                    "image_id": str(entry["image_id"]),
                    "caption": entry["caption"],
                }
                for entry in content["annotations"]
            ]
        return [
            {
                "file_name": os.path.join(image.get("filepath", ""), image["filename"]),
                "image_id": str(image.get("cocoid", image["filename"])),
                "captions": [sentence["raw"] for sentence in image["sentences"]],
                # the original trains on both (coco_karpathy_train.json)
                "split": "train" if image["split"] == "restval" else image["split"],
            }
            for image in content["images"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold COCO captions (images with id and file_name, annotations with image_id and caption) or "
            f"Karpathy's splits (images with filename, sentences and split); missing: {error}."
        ) from error


def _load_json(path: str | Path) -> Any:
    try:
        return _parse_json(Path(path).read_bytes(), path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _read_json_lines(path: Path) -> Iterable[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = _parse_json(line.rstrip(), path, number)  # else one cut short ends in the next line
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: needs an object in braces, found a {type(row).__name__}.")
            yield row


def _parse_json(content: bytes, path: str | Path, line: int = 1) -> Any:
    """line: where content begins in the file."""
    try:
        return json.loads(text := content.decode("utf-8-sig"), object_pairs_hook=_object_of_pairs)
    except _RepeatedKey as error:
        key, lines_before = _first_repeated_key(text)
        raise _stands_twice(path, line + lines_before, "key", key) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line + error.lineno - 1}: not valid JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {line}: must be text in UTF-8 ({error.reason}).") from error
    # a number of thousands of digits, or a thousand brackets within each other
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, from line {line}: JSON that cannot be read ({error}).") from error


class _RepeatedKey(ValueError):
    """An object of JSON has a key twice. json would keep the last value without a word."""


def _stands_twice(path: str | Path, line: int, kind: str, name: str) -> ValueError:
    return ValueError(
        f"{path}, line {line}: the {kind} {name!r} stands there twice, and one of the two would be lost. Remove or "
        "rename one."
    )


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> Row:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _RepeatedKey
    return values


def _first_repeated_key(text: str) -> tuple[str, int]:
    """The first key of JSON that stands twice in an object, and the lines before its second place."""
    open_objects: list[set[str]] = []
    for token in re.finditer(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]', text):
        if token[0] == "{":
            open_objects.append(set())
        elif token[0] == "}":
            open_objects.pop()
        elif token[2]:
            key = json.loads(token[1])
            if key in open_objects[-1]:
                return key, text.count("\n", 0, token.start())
            open_objects[-1].add(key)
    raise AssertionError("json has found a repeated key, and the same text has none")


def _read_csv(path: Path) -> Iterable[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            names = reader.fieldnames or []
            if repeated := [name for name in names if names.count(name) > 1]:
                raise _stands_twice(path, reader.line_num, "column", repeated[0])
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: needs {len(reader.fieldnames)} values, one for each column."
                    )
                yield {name: _list_in_csv(value, path, reader.line_num) for name, value in row.items()}
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error}).") from error


def _list_in_csv(value: str, path: Path, line: int) -> Any:
    """A cell like ["a dog", "dog"] is a list; csv has no other way to hold one."""
    if value.startswith("["):
        try:
            return json.loads(value, object_pairs_hook=_object_of_pairs)
        except _RepeatedKey as error:
            raise _stands_twice(path, line, "key", _first_repeated_key(value)[0]) from error
        except (ValueError, RecursionError):
            pass
    return value


def _read_hub(name: str, config: str | None, streaming: bool) -> dict[str, Table]:
    try:
        splits = load_dataset(name, config, streaming=streaming)
        return {split: table.decode(False) if streaming else table for split, table in splits.items()}
    # datasets and huggingface_hub raise a dozen unrelated classes here: offline, missing, gated, script, wrong config
    except Exception as error:
        raise ValueError(
            f"{name} is no file and no folder here, and as a data set of the Hub it could not be loaded: "
            f"{type(error).__name__}: {error}\nCheck the path, the spelling (owner/name), the network and, for a "
            "private one, HF_TOKEN. Data set scripts have ended with datasets 4: the Hub must hold parquet, json, csv."
        ) from error


def _read_vqa_v2(questions_file: str, annotations_file: str | None) -> list[Row]:
    questions = _load_json(questions_file)
    annotations = _load_json(annotations_file) if annotations_file else {"annotations": []}
    try:
        subtype = questions["data_subtype"]
        answers = _by_id(annotations["annotations"], "question_id", "answers", annotations_file)
        types = {entry["question_id"]: entry.get("answer_type") for entry in annotations["annotations"]}
        rows = []
        for entry in questions["questions"]:
            rows.append(
                {
                    "image": f"COCO_{subtype}_{entry['image_id']:012d}.jpg",
                    "image_id": str(entry["image_id"]),
                    "question": entry["question"],
                    "question_id": str(entry["question_id"]),
                    "answers": answers.get(entry["question_id"]),
                    "answer_type": types.get(entry["question_id"]),
                }
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{questions_file} and {annotations_file} must be official VQA v2 files (data_subtype, questions, "
            f"annotations); missing: {error}."
        ) from error
    return rows


def _by_id(entries: list[Row], id_name: str, value_name: str, path: str | Path) -> dict[Any, Any]:
    """Raises: ValueError for an id with two values, of which one would be lost."""
    values: dict[Any, Any] = {}
    for entry in entries:
        if values.setdefault(entry[id_name], entry.get(value_name)) != entry.get(value_name):
            raise ValueError(f"{path} has two different {value_name} for {id_name} {entry[id_name]}. Remove one.")
    return values


# ---- splits ----


def _columns_of(table: Table) -> list[str]:
    # a stream of json or csv does not know its columns before its first row
    return table.column_names or list(next(iter(table), {}))


def _select_splits(tables: dict[str, Table], args: DataArguments) -> tuple[Table, Table | None]:
    return _split_by_column(tables[""], args) if list(tables) == [""] else _named_splits(tables, args)


def _split_by_column(table: Table, args: DataArguments) -> tuple[Table, Table | None]:
    if "split" not in table.column_names:
        if args.eval_split or args.train_split != "train":
            raise ValueError(
                "train_split and eval_split need a column `split` or a source with named splits; this one has neither. "
                "Leave them out: a part of the pictures is then held out."
            )
        return table, None
    in_rows = isinstance(table, Dataset)
    values = _split_values(table)

    def rows_of(split: str) -> Table:
        _require_split(split, dict.fromkeys(values))
        if not in_rows:
            return RowsOfFile(table.read, split)
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
        counts = Counter(_split_values(table))
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


def _split_values(table: Dataset | RowsOfFile) -> list[str]:
    # without [:] a column of datasets 5 comes row by row, which takes a minute for a million
    values = table["split"][:] if isinstance(table, Dataset) else (row.get("split") for row in table)
    return [str(value) for value in values]


def _require_split(split: str, there: Iterable[str]) -> None:
    if split not in there:
        raise ValueError(
            f"There is no split {split!r}; the data has {', '.join(there)}. Set train_split and eval_split."
        )


def _hold_out_pictures(rows: Dataset, fraction: float, seed: int, identity: dict[str, int]) -> tuple[Dataset, Dataset]:
    """identity: by image_id, of an image that may stand there under several."""
    ids, numbers = _dictionary(rows, "image_id"), {}
    number_of_id = [numbers.setdefault(identity[image_id], len(numbers)) for image_id in ids.dictionary.to_pylist()]
    pictures = np.array(number_of_id, int)[ids.indices.to_numpy()]
    total = int(pictures.max(initial=-1)) + 1
    if total < 2:
        raise ValueError(f"Holding out pictures needs two or more, found {total}. Give an eval_split.")
    number = min(max(1, round(fraction * total)), total - 1)
    held_out = np.isin(pictures, np.random.default_rng(seed).choice(total, number, replace=False))
    logger.info(
        "No eval_split: %d of %d pictures with %d of %d rows are held out to evaluate on.",
        *(number, total, held_out.sum(), len(rows)),
    )
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


# ---- raw tables to the schema ----


class _Schema:
    """From the rows of a source, whatever its columns are called, to ours."""

    references: str  # the argument that names the column of what a model is to say

    def __init__(
        self, args: DataArguments, columns: list[str], folder: Path | None, name: str, needs_references: bool = True
    ) -> None:
        self.folder, self.name, self.id_column = folder, name, args.image_id_column
        self.max_eval_samples = args.max_eval_samples
        self.image_column = args.image_column or ("image" if "image" in columns else "file_name")
        self.text_columns = self._text_columns(args, columns)
        self.needs_references = needs_references
        required = {"image_column": self.image_column, **self.text_columns}
        if not needs_references and getattr(args, self.references) is None:
            del required[self.references]
        _require_columns(required, columns)
        if self.id_column != "image_id":
            _require_columns({"image_id_column": self.id_column}, columns)
        self.has_type = "answer_type" in columns
        self.pictures: dict[str, int] = {}  # given image_id -> hash of the path or content that it stands for
        self.in_place = False  # whether the pictures stay in the table that they came in
        self.features = Features({"image": Image(decode=False), "image_id": Value("string"), **self._text_features()})
        self.needed = {self.image_column, self.id_column, *self.text_columns.values(), "question_id", "answer_type"}

    def _text_columns(self, args: DataArguments, columns: list[str]) -> dict[str, str]:
        """Argument -> the column that it names, of those that are needed."""
        raise NotImplementedError

    def _text_features(self) -> dict[str, Any]:
        raise NotImplementedError

    def _texts(self, row: Row, position: int) -> tuple[Row, str | None]:
        """The columns beside the picture, and why the row cannot be used, if so."""
        raise NotImplementedError

    def convert(self, row: Row, position: int) -> tuple[Row, str | None]:
        """The row in the schema, and why it cannot be used, if so."""
        image, made_id, reason = _find_picture(row.get(self.image_column), self.folder, self.in_place)
        given_id = _as_id(row.get(self.id_column))
        texts, problem = self._texts(row, position)
        reason = reason or problem
        if given_id and not reason:
            # the pictures of an id stand once in a batch: the second one would never be seen
            picture = hash(image["path"] or made_id)
            if self.pictures.setdefault(given_id, picture) != picture:
                reason = f"picture is another one than that of an earlier row with {self.id_column} {given_id}"
        return {"image": image, "image_id": given_id or made_id, **texts}, reason

    def identity(self, image_id: str, image: Row) -> int:
        """Equal for equal paths and for equal bytes, whatever their image_id."""
        return self.pictures.get(image_id, hash(image["path"] or image_id))  # which is made of the bytes

    def to_train(self, rows: list[Row]) -> Iterable[Row]:
        """Converted rows of one picture as they are trained on."""
        return rows

    def good(self, rows: Dataset, reasons: list[str | None]) -> Dataset:
        """The rows with a picture's path or bytes and its texts."""
        if not any(reasons):
            return rows
        return rows.select(np.flatnonzero([reason is None for reason in reasons]))


class _VqaSchema(_Schema):
    references = "answer_column"

    def _text_columns(self, args: DataArguments, columns: list[str]) -> dict[str, str]:
        answer_column = args.answer_column or ("answers" if "answers" in columns else "answer")
        return {"question_column": args.question_column, "answer_column": answer_column}

    def _text_features(self) -> dict[str, Any]:
        return {name: feature for name, feature in VQA_FEATURES.items() if name != "answer_type" or self.has_type}

    def _texts(self, row: Row, position: int) -> tuple[Row, str | None]:
        question, reason = row.get(self.text_columns["question_column"]), None
        answers = _as_texts(row.get(self.text_columns["answer_column"]), "answer")
        question = _clean_text(question) if isinstance(question, str) else ""
        if not question:
            reason = "question is empty or no text"
        elif not answers and self.needs_references:
            reason = "answer is empty or no text"
        texts = {
            "question": question,
            "answers": answers,
            "question_id": _as_id(row.get("question_id")) or f"{self.name}-{position}",
        }
        if self.has_type:
            texts["answer_type"] = _as_id(row.get("answer_type")) or "unknown"
        return texts, reason


class _CaptionSchema(_Schema):
    references = "caption_column"

    def _text_columns(self, args: DataArguments, columns: list[str]) -> dict[str, str]:
        return {"caption_column": args.caption_column or ("captions" if "captions" in columns else "caption")}

    def _text_features(self) -> dict[str, Any]:
        return {"captions": List(Value("string"))}

    def _texts(self, row: Row, position: int) -> tuple[Row, str | None]:
        captions = _as_texts(row.get(self.text_columns["caption_column"]), "caption")
        # "..." is one without a word once it is cleaned
        captions = [caption for caption in captions if clean_caption(caption)]
        missing = self.needs_references and not captions
        return {"captions": captions}, "caption is empty or no text" if missing else None

    def to_train(self, rows: list[Row]) -> Iterable[Row]:
        captions = dict.fromkeys(caption for row in rows for caption in row["captions"])
        picture = {name: rows[0][name] for name in ("image", "image_id")}
        return [{**picture, "caption": caption} for caption in captions]

    def good(self, rows: Dataset, reasons: list[str | None]) -> Dataset:
        """One row a picture, in order of first appearance, with the different captions of all its good rows."""
        first: dict[str, int] = {}
        captions: dict[int, dict[str, None]] = {}
        for position, (image_id, texts) in enumerate(zip(rows["image_id"][:], rows["captions"][:], strict=True)):
            if not reasons[position]:
                captions.setdefault(first.setdefault(image_id, position), {}).update(dict.fromkeys(texts))
        # put together before rows are selected: after it, datasets would copy every picture
        merged = ({"captions": list(captions.get(position, ()))} for position in range(len(rows)))
        columns = [rows.remove_columns("captions"), _on_disk(merged, Features(self._text_features()))]
        return concatenate_datasets(columns, axis=1).select(list(first.values()))


class _Part:
    """One split in the schema, with the reason for which each row cannot be used, if any."""

    def __init__(self, table: Table, schema: _Schema) -> None:
        self.schema, self.name = schema, schema.name
        features, pictures = schema.features.copy(), None
        if isinstance(table, Dataset):
            # another column of pictures would be decoded with each row
            table = table.select_columns([name for name in table.column_names if name in schema.needed])
            feature = table.features[schema.image_column]
            if isinstance(feature, List):
                raise ValueError(
                    f"A row has one picture, and those of the column {schema.image_column} are lists. Give each "
                    "picture a row, or name another column: --image_column"
                )
            if _holds_pictures(feature):
                table = table.cast_column(schema.image_column, Image(decode=False))
                if schema.folder is None or _any_bytes(table, schema.image_column):
                    schema.in_place = True
                    pictures = table.select_columns(schema.image_column).rename_columns({schema.image_column: "image"})
                    del features["image"]
        self.reasons: list[str | None] = []
        self.first: dict[str, int] = {}  # image_id -> the first row that shows it and can be used
        # image_id -> hash of its content or, as long as that is not known, of its path: equal for one image of two ids
        self.identity: dict[str, int] = {}
        self.rows = _on_disk(self._convert(table, features), features)
        if pictures is not None:
            self.rows = concatenate_datasets([pictures, self.rows], axis=1)

    def _convert(self, table: Table, features: Features) -> Iterator[Row]:
        # what is not needed of a stream is not fetched
        limit = self.schema.max_eval_samples if isinstance(table, IterableDataset) else None
        for position, row in enumerate(islice(_iterate(table), limit)):
            converted, reason = self.schema.convert(row, position)
            self.reasons.append(reason)
            image_id = converted["image_id"]
            if not reason and image_id not in self.first:
                self.first[image_id] = position
                self.identity[image_id] = self.schema.identity(image_id, converted["image"])
            yield {name: converted[name] for name in features}

    def __len__(self) -> int:
        return len(self.rows)

    def bad_rows(self, unreadable: dict[str, str]) -> Iterator[Row]:
        if not unreadable and not any(self.reasons):
            return
        for position, (image_id, reason) in enumerate(zip(self.rows["image_id"][:], self.reasons, strict=True)):
            if reason or image_id in unreadable:
                yield {
                    "split": self.name,
                    "row": position,
                    "image_id": image_id,
                    "reason": reason or unreadable[image_id],
                }

    def good(self) -> Dataset:
        return self.schema.good(self.rows, self.reasons)


@lru_cache(maxsize=1)
def _temporary_folder() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="blip_ft-")


def _on_disk(rows: Iterable[Row], features: Features) -> Dataset:
    """The rows in a memory-mapped temporary file: held as Python objects, a million with ten answers take 3 GB."""
    file, rows = Path(_temporary_folder().name) / f"{uuid.uuid4().hex}.arrow", iter(rows)
    with pa.ipc.new_stream(file, features.arrow_schema) as stream:
        portion = 100
        while chunk := list(islice(rows, portion)):
            stream.write_table(pa.Table.from_pylist(chunk, schema=features.arrow_schema))
            # a million rows in portions of 1,000 take 100 MB more; a picture in its row may have megabytes
            holds_pictures = any("image" in row and row["image"]["bytes"] for row in chunk)
            portion = 100 if holds_pictures else 10_000
    return Dataset.from_file(str(file))


def _iterate(table: Table) -> Iterator[Row]:
    if isinstance(table, RowsOfFile):
        yield from table
        return
    # datasets makes Python objects of a batch several times faster than of its rows
    for batch in table.iter(100):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _any_bytes(table: Dataset, column: str) -> bool:
    images = (image for batch in table.select_columns(column).iter(100) for image in batch[column])
    return any(image and image["bytes"] is not None for image in images)


def _find_picture(value: Any, folder: Path | None, in_place: bool) -> tuple[Row, str, str | None]:
    """The column `image`, an image_id made of its content or file, and why the picture cannot be used, if so."""
    content = value
    if isinstance(value, dict):
        content, value = value.get("bytes"), value.get("path")
    if isinstance(content, bytes):
        return {"bytes": content, "path": None}, hashlib.sha1(content).hexdigest(), None
    made_id = value
    if in_place and folder:
        located, reason = value, "picture has no bytes" if value else None
    elif in_place:
        # of a Hub data set, whose files lie in the cache; a row that names another file is not to be trusted
        made_id = str(Path(value).resolve()) if value else None
        inside = not value or any(Path(made_id).is_relative_to(Path(cache).resolve()) for cache in HUB_CACHES)
        located, reason = value, None if inside else "picture lies outside the Hub's cache"
    elif isinstance(value, str):
        located, made_id, reason = _locate(value, folder)
    else:
        located, reason = None, "picture is no path"
    # neither of both is refused by datasets
    return {"bytes": None, "path": located or ""}, _as_id(made_id) or "none", reason


def _holds_pictures(feature: Any) -> bool:
    """Pictures, or what parquet has of them without their feature: {"bytes": binary, "path": string} or binary."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, Image) or feature in (Value("binary"), Value("large_binary"))


def _require_columns(needed: dict[str, str], found: list[str]) -> None:
    for argument, column in needed.items():
        if column not in found:
            usual = argument.removesuffix("_column")
            nearest = [name for wanted in (usual, column) for name in difflib.get_close_matches(wanted, found, n=1)]
            example = (nearest or [usual if not found else "NAME"])[0]
            way_out = f"Set {argument}, e.g. --{argument} {example}"
            if not nearest and argument == "question_column" and {"caption", "captions"} & set(found):
                way_out = f"For captions there are recipes/captioning.py and retrieval.py; else set {argument}"
            elif not nearest and argument == "caption_column" and "question" in found:
                way_out = f"For questions there is recipes/vqa.py; else set {argument}"
            raise ValueError(
                f"Rows need the columns {', '.join(sorted(needed.values()))}; this data set has {', '.join(found)}. "
                + way_out
            )


def _clean_text(text: str) -> str:
    """Without control characters, halves of surrogate pairs and the like, which the tokenizer passes over."""
    text = text.strip()
    if text.isascii() and text.isprintable():
        return text  # nearly all, and the rest takes longer
    kept = [char for char in text if char.isspace() or unicodedata.category(char)[0] != "C" and char != "\ufffd"]
    # accents alone are no text: the tokenizer strips them
    has_text = any(unicodedata.category(char)[0] in "LNPS" for char in kept)
    return "".join(kept).strip() if has_text else ""


def _as_id(value: Any) -> str | None:
    """An id as text that UTF-8 can hold, None for what is none: an empty cell, NaN, a list."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, (str, int, float)) or value == "":
        return None
    return str(value).encode("utf-8", "backslashreplace").decode()


def _as_texts(value: Any, name: str) -> list[str]:
    """Strings of a column's value: a string, number or boolean, a dict with one under `name`, or a list of these."""
    texts, waiting = [], [value]
    while waiting:  # not by recursion: a file may hold brackets within brackets
        entry = waiting.pop()
        if isinstance(entry, dict):
            waiting.append(entry.get(name))
        elif isinstance(entry, (list, tuple)):
            waiting += reversed(entry)
        elif text := _as_text(entry):
            texts.append(text)
    return texts


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        value = int(value) if value.is_integer() else value
    return _clean_text(str(value)) if isinstance(value, (str, int, float)) else ""


@lru_cache(maxsize=1 << 16)  # the rows of a picture repeat its path
def _locate(path: str, folder: Path | None) -> tuple[str | None, str, str | None]:
    """A picture's absolute path, its image_id, and None; or None, the path as written and why it is refused.

    The image_id is the path within folder of the file itself: the same for a.png, ./a.png and a link to it.
    """
    if path != _as_id(path):
        return None, path, "picture has no path, or one that is no text in UTF-8"
    if "://" in path or path.startswith("data:"):
        return None, path, "picture is a URL; nothing is fetched from a row"
    if not path.strip() or "\0" in path:
        return None, path, "picture has no path"
    root, written = (folder or Path.cwd()).resolve(), path
    # COCO's archives unpack into folders that are named after the subset: train2014/COCO_train2014_000000000009.jpg
    subset = COCO_FILE.fullmatch(path)
    if subset and (root / subset[1] / path).exists():
        path = os.path.join(subset[1], path)
    try:
        resolved = (root / path).resolve()  # follows links, so that none leads out of the folder
    except (OSError, RuntimeError) as error:  # links in a circle
        return None, written, f"picture's path leads nowhere: {error}"
    if not resolved.is_relative_to(root):
        return None, written, f"picture lies outside {root}"
    return str(resolved), resolved.relative_to(root).as_posix(), None


# ---- what earlier runs found out about image files ----


def _signature(path: str) -> str:
    """Another one after each change of a file.

    Size and mtime alone are kept by `cp -p` and rsync over another file; ctime cannot be set back.
    """
    status = os.stat(path)
    values = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return hashlib.sha1(f"{path} {values}".encode()).hexdigest()


def _remembered(name: str) -> Path:
    return Path(HF_CACHE_HOME) / "blip_ft" / name


def _remember(file: Path, lines: Iterable[str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as opened:
            opened.write("".join(f"{line}\n" for line in lines))
    except OSError as error:
        logger.info("What was found out about the images cannot be remembered: %s", error)


class ImageHashes:
    """SHA-1 of images. That of a file is remembered on disk, and computed again only once the file has changed."""

    def __init__(self) -> None:
        self.file = _remembered("image_hashes.txt")
        lines = self.file.read_text().split("\n") if self.file.is_file() else []
        whole = re.compile("[0-9a-f]{40} [0-9a-f]{40}")  # a killed run may leave half a line
        self.known = dict(line.split(" ") for line in lines if whole.fullmatch(line))
        self.fresh: dict[str, str] = {}

    def of(self, image: Row) -> str:
        """Of datasets' {"bytes": ..., "path": ...}. Raises: OSError if its file cannot be read."""
        if image["bytes"] is not None:
            return content_hash(image)
        signature = _signature(image["path"])
        if signature in self.known:
            return self.known[signature]
        found = self.known[signature] = content_hash(image)
        # within two ticks of a file system's clock a second change would leave the same times: FAT counts 2 seconds
        if time.time() - os.stat(image["path"]).st_ctime > 2:
            self.fresh[signature] = found
        return found

    def remember(self) -> None:
        _remember(self.file, (f"{signature} {found}" for signature, found in self.fresh.items()))
        self.fresh = {}


# ---- pictures that cannot be read ----


def _unreadable_pictures(parts: Iterable[_Part], mode: str) -> dict[str, dict[str, str]]:
    """Part -> image_id -> reason, of the pictures whose header, or in mode `full` whose pixels, cannot be read.

    By part, for two files may count their pictures from 0 each. In mode `full`, which reads the files anyway, the
    parts also learn the content of the others.
    """
    remembered = _remembered("readable_images.txt")
    known = set(remembered.read_text().split("\n")) if remembered.is_file() else set()
    hashes = ImageHashes()
    found: dict[str, dict[str, str]] = {}
    fresh: list[str] = []

    def check(image: Row) -> tuple[str | None, str | None, str | None]:
        problem, key = _picture_problem(image, mode, known)
        # key is None for bytes, whose hash is known from reading the rows
        return problem, key, hashes.of(image) if key and mode == "full" else None

    for part in parts:
        found[part.name] = {}
        ordered, column = list(part.first), part.rows.select_columns("image")
        progress = tqdm(total=len(ordered), desc=f"Checking pictures ({part.name})", delay=3)
        with ThreadPoolExecutor() as pool:
            # in portions, for map() takes all of its input at once
            for start in range(0, len(ordered), 256):
                ids = ordered[start : start + 256]
                results = pool.map(check, [column[part.first[image_id]]["image"] for image_id in ids])
                for image_id, (problem, key, content) in zip(ids, results, strict=True):
                    if problem:
                        found[part.name][image_id] = problem
                    elif key and key not in known:
                        fresh.append(key)
                    if content:
                        part.identity[image_id] = hash(content)
                progress.update(len(ids))
        progress.close()
    if fresh:
        _remember(remembered, fresh)
    hashes.remember()
    return found


def _without_pictures(rows: Dataset, unreadable: dict[str, str]) -> Dataset:
    if not unreadable:
        return rows
    return rows.select(
        [position for position, image_id in enumerate(rows["image_id"][:]) if image_id not in unreadable]
    )


def why_unreadable(image: Row) -> str | None:
    """Why a picture cannot be decoded; None where it can."""
    return _picture_problem(image, "full", known=set())[0]


def _picture_problem(image: Row, mode: str, known: set[str]) -> tuple[str | None, str | None]:
    """Why a picture cannot be read, if so, and under which name a good file is remembered."""
    key = None
    if image is None:
        return "picture is missing", None
    try:
        if image["bytes"] is None:
            key = f"{_signature(image['path'])} {mode}"
            if key in known:
                return None, key
        if mode == "full":
            open_image(image, size=64)  # a JPEG is then decoded at an eighth of its size
        else:
            open_encoded(image).close()
    # decoders raise what they like on broken input: OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
    except Exception as error:
        return f"picture cannot be read: {type(error).__name__}: {error}", None
    return None, key


def _report_bad_rows(bad: list[Row], total: int, max_fraction: float, file: Path | None) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(to_json(row) + "\n" for row in bad), encoding="utf-8")
    first = "\n".join(f"  {row['split']} row {row['row']} ({row['image_id']}): {row['reason']}" for row in bad[:5])
    summary = f"{len(bad)} of {total} rows cannot be used" + (f", all listed in {file}" if file else "") + f":\n{first}"
    if len(bad) / total > max_fraction:  # as the advice below rounds; 0.29 * 100 is less than 29
        raise ValueError(
            f"{summary}\nThat is more than max_bad_fraction = {max_fraction:.2%}. Mend or remove them, or set "
            f"--max_bad_fraction {math.ceil(1000 * len(bad) / total) / 1000}"
        )
    logger.warning("%s\nThey are left out of training; in evaluation an unreadable picture counts as wrong.", summary)
