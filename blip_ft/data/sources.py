"""Read a source of any kind: files, folders, official VQA v2 and COCO files, the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PillowImage

from blip_ft.arguments import DataArguments
from blip_ft.data import demo
from blip_ft.data.images import IMAGE_FORMATS
from blip_ft.data.tables import Row, RowsOfFile, Table, iterate, rows_on_disk
from blip_ft.data.text_files import parse_json, read_csv, read_json_lines

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def list_images(paths: Iterable[str]) -> Dataset:
    """image and image_id, its path, of image files and of those in folders, in order of their names.

    Raises: ValueError for a path that is not there, and for a folder without images.
    """
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"There is no image and no folder {path}. Check the path.")
        found = [path]
        if path.is_dir():
            known = PillowImage.registered_extensions().items()
            endings = {ending for ending, form in known if form in IMAGE_FORMATS}
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings)
        if not found:
            raise ValueError(f"{path} holds no image (.jpg, .png, ...).")
        files += map(str, found)
    features = Features({"image": Image(decode=False), "image_id": Value("string")})
    rows = ({"image": {"bytes": None, "path": file}, "image_id": file} for file in dict.fromkeys(files))
    return rows_on_disk(rows, features)


def read_source(args: DataArguments) -> tuple[dict[str, Table], Path | None]:
    """Raw tables by split ({"": table} where the source names none), and the folder that image paths start from."""
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
                return RowsOfFile(partial(iterate, stream.decode(False)))
            return Dataset.from_parquet(str(path))
        except (DatasetGenerationError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path} holds no row, or is no whole parquet file: {error.__cause__ or error}") from error
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        ".json": _read_json,
        ".jsonl": read_json_lines,
        ".csv": read_csv,
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
        return parse_json(Path(path).read_bytes(), path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


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
