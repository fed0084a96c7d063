"""Convert rows with any columns to one schema. No path leaves the image folder, and no URL is fetched."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE

from blip_ft.arguments import DataArguments
from blip_ft.data.tables import Row, Table, contains_bytes, iterate_rows, store_on_disk
from blip_ft.data.texts import clean_caption

HUB_CACHES = (HF_DATASETS_CACHE, HF_HUB_CACHE)

COCO_FILE = re.compile(r"COCO_(\w+)_\d{12}\.jpg")

OPTIONAL_COLUMNS = ("question_id", "answer_type", "weight")

VQA_FEATURES = {
    **{name: Value("string") for name in ("question", "question_id", "answer_type")},
    "answers": List(Value("string")),
    "weight": Value("float64"),
}


class Schema:
    """Converts the rows of a source, whatever its columns are called, to our columns.

    Args:
        name: train, eval or test.
        source: name of the source if its rows are mixed with others. Ids begin with it: two sources may both number
            their images from 0.
        others_have: columns of the sources that it is mixed with; an optional one of them is filled in.
    """

    references: str  # the argument that names the column of what the model should say

    def __init__(
        self,
        args: DataArguments,
        columns: list[str],
        folder: Path | None,
        name: str,
        needs_references: bool = True,
        source: str = "",
        others_have: Collection[str] = (),
    ) -> None:
        self.source, self.prefix = source, f"{source}:" if source else ""
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
        self.has_type, self.has_weight = (name in {*columns, *others_have} for name in ("answer_type", "weight"))
        self.images: dict[str, int] = {}  # image_id that the source gave -> hash of its path or content
        self.in_place = False  # whether the images stay in the table that they came in
        self.features = Features({"image": Image(decode=False), "image_id": Value("string"), **self._text_features()})
        self.needed = {self.image_column, self.id_column, *self.text_columns.values(), *OPTIONAL_COLUMNS}

    def _text_columns(self, args: DataArguments, columns: list[str]) -> dict[str, str]:
        """The columns that are needed: argument -> the column that it names."""
        raise NotImplementedError

    def _text_features(self) -> dict[str, Any]:
        raise NotImplementedError

    def _texts(self, row: Row, position: int) -> tuple[Row, str | None]:
        """All columns except the image, and the reason why the row cannot be used, if any."""
        raise NotImplementedError

    def convert(self, row: Row, position: int) -> tuple[Row, str | None]:
        """The row in our columns, and the reason why it cannot be used, if any."""
        image, made_id, reason = _find_image(row.get(self.image_column), self.folder, self.in_place)
        given_id = _as_id(row.get(self.id_column))
        image_id = self.prefix + (given_id or made_id)
        texts, problem = self._texts(row, position)
        reason = reason or problem
        if given_id and not reason:
            # a batch has one image per image_id, so a second image with the same id would never be seen
            content = hash(image["path"] or made_id)
            if self.images.setdefault(image_id, content) != content:
                reason = f"image is not the one of an earlier row with the same {self.id_column} {given_id}"
        return {"image": image, "image_id": image_id, **texts}, reason

    def identity(self, image_id: str, image: Row) -> int:
        """A number that is equal for equal paths and for equal bytes, even if their image_id differs."""
        # without a path, an image_id that the source did not give is a hash of the bytes
        return self.images.get(image_id, hash(image["path"] or image_id.removeprefix(self.prefix)))

    def to_train(self, rows: list[Row]) -> Iterable[Row]:
        """Turn the converted rows of one image into rows to train on."""
        return rows

    def usable_rows(self, rows: Dataset, reasons: list[str | None]) -> Dataset:
        """The rows that can be used: those without a reason against them."""
        if not any(reasons):
            return rows
        return rows.select(np.flatnonzero([reason is None for reason in reasons]))


class VqaSchema(Schema):
    """Rows with one question and its answers."""

    references = "answer_column"

    def _text_columns(self, args: DataArguments, columns: list[str]) -> dict[str, str]:
        answer_column = args.answer_column or ("answers" if "answers" in columns else "answer")
        return {"question_column": args.question_column, "answer_column": answer_column}

    def _text_features(self) -> dict[str, Any]:
        optional = {"answer_type": self.has_type, "weight": self.has_weight}
        return {name: feature for name, feature in VQA_FEATURES.items() if optional.get(name, True)}

    def _texts(self, row: Row, position: int) -> tuple[Row, str | None]:
        question, reason = row.get(self.text_columns["question_column"]), None
        answers = _as_texts(row.get(self.text_columns["answer_column"]), "answer")
        question = _clean_text(question) if isinstance(question, str) else ""
        if not question:
            reason = "question is empty or not a text"
        elif not answers and self.needs_references:
            reason = "answer is empty or not a text"
        texts = {
            "question": question,
            "answers": answers,
            "question_id": self.prefix + (_as_id(row.get("question_id")) or f"{self.name}-{position}"),
        }
        if self.has_type:
            texts["answer_type"] = _as_id(row.get("answer_type")) or "unknown"
        if self.has_weight:
            weight = _as_weight(row.get("weight"))
            texts["weight"] = 1.0 if weight is None else weight
            if weight is None and not reason:
                reason = "weight is not a finite number of at least 0 (rename the column if it means something else)"
        return texts, reason


class CaptionSchema(Schema):
    """Rows with one or more captions. The captions of all usable rows of an image are merged into one row."""

    references = "caption_column"

    def _text_columns(self, args: DataArguments, columns: list[str]) -> dict[str, str]:
        return {"caption_column": args.caption_column or ("captions" if "captions" in columns else "caption")}

    def _text_features(self) -> dict[str, Any]:
        return {"captions": List(Value("string"))}

    def _texts(self, row: Row, position: int) -> tuple[Row, str | None]:
        captions = _as_texts(row.get(self.text_columns["caption_column"]), "caption")
        # a caption like "..." has no words left after cleaning
        captions = [caption for caption in captions if clean_caption(caption)]
        missing = self.needs_references and not captions
        return {"captions": captions}, "caption is empty or not a text" if missing else None

    def to_train(self, rows: list[Row]) -> Iterable[Row]:
        """One row per different caption."""
        captions = dict.fromkeys(caption for row in rows for caption in row["captions"])
        image = {name: rows[0][name] for name in ("image", "image_id")}
        return [{**image, "caption": caption} for caption in captions]

    def usable_rows(self, rows: Dataset, reasons: list[str | None]) -> Dataset:
        """One row per image, in order of first appearance, with the different captions of all its usable rows."""
        first: dict[str, int] = {}
        captions: dict[int, dict[str, None]] = {}
        for position, (image_id, texts) in enumerate(zip(rows["image_id"][:], rows["captions"][:], strict=True)):
            if not reasons[position]:
                captions.setdefault(first.setdefault(image_id, position), {}).update(dict.fromkeys(texts))
        # merge before selecting rows: after select(), datasets would copy every image
        merged = ({"captions": list(captions.get(position, ()))} for position in range(len(rows)))
        columns = [rows.remove_columns("captions"), store_on_disk(merged, Features(self._text_features()))]
        return concatenate_datasets(columns, axis=1).select(list(first.values()))


class Part:
    """The converted rows of one split and, for each row, the reason why it cannot be used, if any."""

    def __init__(self, table: Table, schema: Schema) -> None:
        self.schema, self.name = schema, schema.name
        features, images = schema.features.copy(), None
        if isinstance(table, Dataset):
            # a second column of images would be decoded with each row
            table = table.select_columns([name for name in table.column_names if name in schema.needed])
            feature = table.features[schema.image_column]
            if isinstance(feature, List):
                raise ValueError(
                    f'Column "{schema.image_column}" contains lists; expected one image per row. Give each image its '
                    "own row, or choose another column with --image_column."
                )
            if _is_image_feature(feature):
                table = table.cast_column(schema.image_column, Image(decode=False))
                if schema.folder is None or contains_bytes(table, schema.image_column):
                    schema.in_place = True
                    images = table.select_columns(schema.image_column).rename_columns({schema.image_column: "image"})
                    del features["image"]
        self.reasons: list[str | None] = []
        self.first: dict[str, int] = {}  # image_id -> the first usable row with this image
        # image_id -> hash of the image's content or, while that is unknown, of its path: equal for one image of two ids
        self.identity: dict[str, int] = {}
        self.rows = store_on_disk(self._convert(table, features), features)
        if images is not None:
            self.rows = concatenate_datasets([images, self.rows], axis=1)

    def _convert(self, table: Table, features: Features) -> Iterator[Row]:
        # rows of a stream beyond the limit are not even fetched
        limit = self.schema.max_eval_samples if isinstance(table, IterableDataset) else None
        for position, row in enumerate(islice(iterate_rows(table), limit)):
            converted, reason = self.schema.convert(row, position)
            self.reasons.append(reason)
            image_id = converted["image_id"]
            if not reason and image_id not in self.first:
                self.first[image_id] = position
                self.identity[image_id] = self.schema.identity(image_id, converted["image"])
            yield {name: converted[name] for name in features}

    def __len__(self) -> int:
        return len(self.rows)

    def usable_rows(self) -> Dataset:
        return self.schema.usable_rows(self.rows, self.reasons)

    def bad_rows(self, unreadable: dict[str, str]) -> Iterator[Row]:
        """Split, row, image_id and reason of each row that cannot be used.

        Args:
            unreadable: image_id -> reason, from find_unreadable_images.
        """
        if not unreadable and not any(self.reasons):
            return
        for position, (image_id, reason) in enumerate(zip(self.rows["image_id"][:], self.reasons, strict=True)):
            if reason or image_id in unreadable:
                yield {
                    "split": self.name,
                    "row": position,
                    "image_id": image_id,
                    "reason": reason or unreadable[image_id],
                    **({"source": self.schema.source} if self.schema.source else {}),
                }


class MixedPart(Part):
    """The rows of several sources, one source after another.

    Image ids begin with the name of their source. A file that is in several sources has the id of the first one: in a
    batch it is one image, and its captions are not negatives of each other.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts, self.schema, self.name = parts, parts[0].schema, parts[0].name
        self.reasons = [reason for part in parts for reason in part.reasons]
        self.first, self.identity = {}, {}
        self.new_ids: dict[str, str] = {}  # image_id of a part -> that of the rows, for all usable images
        id_of: dict[int, str] = {}  # identity -> image_id
        start = 0
        for part in parts:
            for image_id, position in part.first.items():
                new_id = id_of.setdefault(part.identity[image_id], image_id)
                self.new_ids[image_id] = new_id
                self.first.setdefault(new_id, start + position)
                self.identity[new_id] = part.identity[image_id]
            start += len(part)
        rows = concatenate_datasets([part.rows for part in parts])
        ids = ({"image_id": self.new_ids.get(image_id, image_id)} for image_id in rows["image_id"][:])
        ids = store_on_disk(ids, Features({"image_id": Value("string")}))
        self.rows = concatenate_datasets([rows.remove_columns("image_id"), ids], axis=1)

    def bad_rows(self, unreadable: dict[str, str]) -> Iterator[Row]:
        """As of Part; rows are counted in their own source, which is named."""
        of_parts = {old: unreadable[new] for old, new in self.new_ids.items() if new in unreadable}
        return chain.from_iterable(part.bad_rows(of_parts) for part in self.parts)


def _require_columns(needed: dict[str, str], found: list[str]) -> None:
    for argument, column in needed.items():
        if column not in found:
            usual = argument.removesuffix("_column")
            nearest = [name for wanted in (usual, column) for name in difflib.get_close_matches(wanted, found, n=1)]
            example = (nearest or [usual if not found else "NAME"])[0]
            way_out = f"Set {argument}, e.g. --{argument} {example}"
            if not nearest and argument == "question_column" and {"caption", "captions"} & set(found):
                way_out = f"For captions, use recipes/captioning.py or retrieval.py; for questions, set {argument}"
            elif not nearest and argument == "caption_column" and "question" in found:
                way_out = f"For questions, use recipes/vqa.py; for captions, set {argument}"
            raise ValueError(
                f"Rows need the columns {', '.join(sorted(needed.values()))}; this data set has {', '.join(found)}. "
                + way_out
            )


def _is_image_feature(feature: Any) -> bool:
    """Whether a column has images.

    Also True for the forms that images have in parquet without their feature: {"bytes": binary, "path": string}, or
    binary.
    """
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, Image) or feature in (Value("binary"), Value("large_binary"))


def _find_image(value: Any, folder: Path | None, in_place: bool) -> tuple[Row, str, str | None]:
    """The column `image`, an image_id made from the content or file, and why the image cannot be used, if so."""
    content = value
    if isinstance(value, dict):
        content, value = value.get("bytes"), value.get("path")
    if isinstance(content, bytes):
        return {"bytes": content, "path": None}, hashlib.sha1(content).hexdigest(), None
    made_id = value
    if in_place and folder:
        located, reason = value, "image has no bytes" if value else None
    elif in_place:
        # the files of a Hub data set are in the cache; a row that names any other file cannot be trusted
        made_id = str(Path(value).resolve()) if value else None
        inside = not value or any(Path(made_id).is_relative_to(Path(cache).resolve()) for cache in HUB_CACHES)
        located, reason = value, None if inside else "image is outside the Hub's cache"
    elif isinstance(value, str):
        located, made_id, reason = _locate(value, folder)
    else:
        located, reason = None, "image is not a path"
    # datasets refuses an image with neither bytes nor path
    return {"bytes": None, "path": located or ""}, _as_id(made_id) or "none", reason


@lru_cache(maxsize=1 << 16)  # the rows of an image repeat its path
def _locate(path: str, folder: Path | None) -> tuple[str | None, str, str | None]:
    """(absolute path, image_id, None), or (None, path as written, reason why it is refused).

    The image_id is the path of the resolved file, relative to folder: the same for a.png, ./a.png and a link to it.
    """
    if path != _as_id(path):
        return None, path, "image has no path, or its path is not text in UTF-8"
    if "://" in path or path.startswith("data:"):
        return None, path, "image is a URL, and URLs in rows are not fetched"
    if not path.strip() or "\0" in path:
        return None, path, "image has no path"
    root, written = (folder or Path.cwd()).resolve(), path
    # COCO's archives unpack into folders named after the subset: train2014/COCO_train2014_000000000009.jpg
    subset = COCO_FILE.fullmatch(path)
    if subset and (root / subset[1] / path).exists():
        path = os.path.join(subset[1], path)
    try:
        resolved = (root / path).resolve()  # follows links, so that no link leads out of the folder
    except (OSError, RuntimeError) as error:  # a circle of links
        return None, written, f"image's path cannot be resolved: {error}"
    if not resolved.is_relative_to(root):
        return None, written, f"image is outside {root}"
    return str(resolved), resolved.relative_to(root).as_posix(), None


def _as_id(value: Any) -> str | None:
    """An id as text that can be encoded as UTF-8; None for a value that is not an id: an empty cell, NaN, a list."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, (str, int, float)) or value == "":
        return None
    return str(value).encode("utf-8", "backslashreplace").decode()


def _as_weight(value: Any) -> float | None:
    """A row's weight: 1 for an empty cell, None for a value that is not a finite number of at least 0."""
    if value is None or value == "":
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        weight = float(value)
    except (ValueError, OverflowError):
        return None
    return weight if 0 <= weight < math.inf else None


def _as_texts(value: Any, name: str) -> list[str]:
    """The texts of a column's value: a string, number or boolean, a dict with one under `name`, or a list of these."""
    texts, waiting = [], [value]
    while waiting:  # not recursive: a file may have very deeply nested lists
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


def _clean_text(text: str) -> str:
    """The text without control characters, lone surrogates and other characters that the tokenizer ignores."""
    text = text.strip()
    if text.isascii() and text.isprintable():
        return text  # true for nearly all texts; the rest is slower
    kept = [char for char in text if char.isspace() or unicodedata.category(char)[0] != "C" and char != "\ufffd"]
    # accents alone are not a text: the tokenizer strips them
    has_text = any(unicodedata.category(char)[0] in "LNPS" for char in kept)
    return "".join(kept).strip() if has_text else ""
