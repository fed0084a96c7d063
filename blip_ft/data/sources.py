"""Read the raw rows of a source: a file, a folder, official VQA v2 or COCO files, or a data set of the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PillowImage

from blip_ft.arguments import DataArguments
from blip_ft.data import demo
from blip_ft.data.images import IMAGE_FORMATS
from blip_ft.data.tables import Row, RowsOfFile, Table, iterate_rows, store_on_disk
from blip_ft.data.text_files import parse_json, read_csv, read_json_lines

# the column `dataset` of the original's vqa_train.json, vqa_val.json, vqa_test.json and vg_qa.json -> weight of a row
# Source: BLIP data/vqa_dataset.py __getitem__
ORIGINAL_WEIGHTS = {"vqa": 1.0, "vg": 0.2}

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def read_source(args: DataArguments) -> tuple[dict[str, Table], Path | None]:
    """The raw table of each split, and the folder that image paths are relative to.

    A source without named splits gives {"": table}.
    """
    folder = Path(args.image_folder).expanduser() if args.image_folder else None
    if folder and not folder.is_dir():
        raise ValueError(f"image_folder must be a folder; {folder} is not.")
    if args.questions_file:
        files = {"train": (args.questions_file, args.annotations_file)}
        if args.eval_questions_file:
            files["eval"] = (args.eval_questions_file, args.eval_annotations_file)
        tables = {name: RowsOfFile(partial(iter, _read_vqa_v2(*pair))) for name, pair in files.items()}
        return tables, folder
    name = args.dataset_name
    if name is None:
        raise ValueError("No data set is given. Use --dataset_name FOLDER_OR_FILE_OR_HUB_ID, or --dataset_name demo.")
    if name == "demo":
        return dict(demo.load_demo()), folder
    path = Path(name).expanduser()
    if path.is_file():
        return {"": _read_file(path, args.streaming)}, folder or path.parent
    if path.is_dir():
        return _read_folder(path, args.streaming), folder or path
    return _read_hub(name, args.dataset_config, args.streaming), folder


def list_images(paths: Iterable[str]) -> Dataset:
    """Rows with image and image_id (the file's path), for image files and all image files in folders, sorted by name.

    Raises: ValueError for a path that does not exist, and for a folder without images.
    """
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist. Check the path.")
        found = [path]
        if path.is_dir():
            known = PillowImage.registered_extensions().items()
            suffixes = {suffix for suffix, name in known if name in IMAGE_FORMATS}
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
        if not found:
            raise ValueError(f"The folder {path} has no images (.jpg, .png, ...).")
        files += map(str, found)
    first: dict[str, str] = {}  # of several names of one file, the first
    for file in files:
        first.setdefault(os.path.abspath(file), file)
    features = Features({"image": Image(decode=False), "image_id": Value("string")})
    rows = ({"image": {"bytes": None, "path": file}, "image_id": file} for file in first.values())
    return store_on_disk(rows, features)


def _read_folder(path: Path, streaming: bool) -> dict[str, Table]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = load_from_disk(str(path))
        except (OSError, ValueError, KeyError, IndexError) as error:  # IndexError if it has no rows
            raise ValueError(
                f"{path} was written by save_to_disk, but has no rows or cannot be read any more: {error}"
            ) from error
        return dict(saved) if isinstance(saved, DatasetDict) else {"": saved}
    for file in METADATA_FILES:
        if (path / file).is_file():
            return {"": _read_file(path / file, streaming)}
    raise ValueError(
        f"The folder {path} has no {', '.join(METADATA_FILES[:-1])} or {METADATA_FILES[-1]} and was not written by "
        "save_to_disk. Add a metadata.jsonl with one line per question, e.g. "
        '{"file_name": "cat.jpg", "question": "what is it?", "answer": "a cat"}'
    )


def _read_file(path: Path, streaming: bool) -> Table:
    if path.suffix == ".parquet":
        try:
            if streaming:
                stream = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
                return RowsOfFile(partial(iterate_rows, stream.decode(False)))
            return Dataset.from_parquet(str(path))
        except (DatasetGenerationError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"{path} has no rows or is not a complete parquet file: {error.__cause__ or error}"
            ) from error
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        ".json": _read_json,
        ".jsonl": read_json_lines,
        ".csv": read_csv,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path} must end in .json, .jsonl, .csv or .parquet.")
    read = partial(readers[path.suffix], path)
    try:
        if path.suffix == ".json":  # a single document: it cannot be parsed in parts
            read = partial(iter, read())
        rows = RowsOfFile(read)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error
    if not len(rows):
        raise ValueError(f"{path} has no rows.")
    return rows


def _read_hub(name: str, config: str | None, streaming: bool) -> dict[str, Table]:
    try:
        splits = load_dataset(name, config, streaming=streaming)
        return {split: table.decode(False) if streaming else table for split, table in splits.items()}
    # datasets and huggingface_hub raise a dozen unrelated classes here: offline, missing, gated, script, wrong config
    except Exception as error:
        raise ValueError(
            f"{name} is not a local file or folder, and it could not be loaded as a data set of the Hub: "
            f"{type(error).__name__}: {error}\nCheck the path, the spelling (owner/name), the network and, for a "
            "private data set, HF_TOKEN. Since version 4, datasets does not run data set scripts: the Hub repository "
            "must have parquet, json or csv files."
        ) from error


def _read_json(path: Path) -> list[Row]:
    content = _load_json(path)
    if isinstance(content, dict) and "images" in content:
        return _rows_of_coco(content, path)
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f'{path} must be a list of objects, {{"data": [...]}} with such a list, COCO captions or Karpathy\'s '
            "splits."
        )
    if all(str(row.get("dataset")) in ORIGINAL_WEIGHTS and "question" in row for row in rows):
        for row in rows:  # in place: there are a million
            row.setdefault("weight", ORIGINAL_WEIGHTS[row["dataset"]])
    return rows


def _rows_of_coco(content: Row, path: Path) -> list[Row]:
    """Rows of COCO's captions_*.json (images, annotations) or Karpathy's dataset_*.json (images with sentences)."""
    try:
        if "annotations" in content:
            files = _values_by_id(content["images"], "id", "file_name", path)
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
                # BLIP trains on both (coco_karpathy_train.json)
                "split": "train" if image["split"] == "restval" else image["split"],
            }
            for image in content["images"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be COCO captions (images with id and file_name, annotations with image_id and caption) or "
            f"Karpathy's splits (images with filename, sentences and split); missing: {error}."
        ) from error


def _read_vqa_v2(questions_file: str, annotations_file: str | None) -> list[Row]:
    questions = _load_json(questions_file)
    annotations = _load_json(annotations_file) if annotations_file else {"annotations": []}
    try:
        subtype = questions["data_subtype"]
        answers = _values_by_id(annotations["annotations"], "question_id", "answers", annotations_file)
        types = {entry["question_id"]: entry.get("answer_type") for entry in annotations["annotations"]}
        return [
            {
                "image": f"COCO_{subtype}_{entry['image_id']:012d}.jpg",
                "image_id": str(entry["image_id"]),
                "question": entry["question"],
                "question_id": str(entry["question_id"]),
                "answers": answers.get(entry["question_id"]),
                "answer_type": types.get(entry["question_id"]),
            }
            for entry in questions["questions"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{questions_file} and {annotations_file} must be official VQA v2 files (data_subtype, questions, "
            f"annotations); missing: {error}."
        ) from error


def _load_json(path: str | Path) -> Any:
    try:
        return parse_json(Path(path).read_bytes(), path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _values_by_id(entries: list[Row], id_name: str, value_name: str, path: str | Path) -> dict[Any, Any]:
    """Raises: ValueError for an id with two different values, because one of them would be lost."""
    values: dict[Any, Any] = {}
    for entry in entries:
        if values.setdefault(entry[id_name], entry.get(value_name)) != entry.get(value_name):
            raise ValueError(f"{path} has two different {value_name} for {id_name} {entry[id_name]}. Remove one.")
    return values
