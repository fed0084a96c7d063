"""What recipes/bootstrap.py writes: scores.jsonl, metadata.jsonl, text files beside the images, and report.html.

scores.jsonl has one JSON object per text, in the order of the images:

    image       path of the image, null if the data contains the image itself
    image_id    as in the data, or the path relative to the image folder
    text        own texts as the data has them
    source      own or generated
    score       0 to 1, the probability that the text describes the image; null without a filter
    kept        true or false

metadata.jsonl has one JSON object per image with a text that is kept: file_name, image_id if it is not the file name,
captions (all texts that are kept), and text (the one with the highest score).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from blip_ft.data.images import IMAGE_FORMATS, open_encoded
from blip_ft.data.tables import contains_bytes
from blip_ft.data.texts import clean_caption
from blip_ft.results.parts import Line, Output
from blip_ft.results.report import write_page
from blip_ft.results.samples import Sample

# texts and their scores stay, for another threshold
OUTPUT = Output("bootstrap", "scores.jsonl", keeps_parts=True)

OF_TEXTS = ("own", "generated")

METADATA_FILE = "metadata.jsonl"

IMAGES = "images"  # folder for images that the data contains as bytes

MAX_SHOWN = 60  # kept texts on the page, and dropped ones

SHARES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1)

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


def different_texts(own: Iterable[str], generated: Iterable[str], clean: bool) -> list[Line]:
    """Text and source of all texts of an image, without repetitions as the models read them. Own texts come first."""
    texts: dict[str, Line] = {}
    for source, part in (("own", own), ("generated", generated)):
        for text in part:
            if read := clean_caption(text) if clean else text.strip():
                texts.setdefault(read, {"text": text, "source": source})
    return list(texts.values())


def decide(scores: Sequence[float | None], threshold: float, keep_share: float | None) -> list[bool]:
    """Whether each text is kept.

    Args:
        scores: 0 to 1; all are None without a filter, and then all are kept.
        threshold: the lowest score that is kept.
        keep_share: instead of threshold, the share of texts to keep, those with the highest scores; of equal ones the
            first.
    """
    if None in scores:
        return [True] * len(scores)
    if keep_share is None:
        return [score >= threshold for score in scores]
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-np.array(scores), kind="stable")[: round(keep_share * len(scores))]] = True
    return kept.tolist()


def build_scores(rows: Dataset, lines: Sequence[Line], threshold: float, keep_share: float | None) -> list[Line]:
    """The lines of scores.jsonl, each with the position of its row.

    Args:
        lines: `texts` of each row, with text, source and score; none for an image that cannot be read.
    """
    paths, ids = rows.flatten()["image.path"][:], rows["image_id"][:]
    found = [
        {"position": position, "image": paths[position], "image_id": ids[position], **text}
        for position, line in enumerate(lines)
        for text in line.get("texts", ())
    ]
    kept = decide([line["score"] for line in found], threshold, keep_share)
    return [{**line, "kept": keep} for line, keep in zip(found, kept, strict=True)]


def kept_by_image(scores: Iterable[Line]) -> dict[int, list[Line]]:
    """Position of an image -> its lines that are kept, for the images that have any."""
    kept: dict[int, list[Line]] = {}
    for line in scores:
        if line["kept"]:
            kept.setdefault(line["position"], []).append(line)
    return kept


def build_metadata(rows: Dataset, names: dict[int, str], kept: dict[int, list[Line]]) -> Iterator[Line]:
    """The lines of metadata.jsonl.

    Args:
        names: position of an image -> its path relative to the image folder.
        kept: from kept_by_image.
    """
    ids = rows["image_id"][:]
    for position, lines in kept.items():
        name = names[position]
        given_id = {} if ids[position] == name else {"image_id": ids[position]}
        captions = [line["text"] for line in lines]
        yield {"file_name": name, **given_id, "captions": captions, "text": best_text(lines)}


def best_text(lines: Sequence[Line]) -> str:
    """The text with the highest score, in one line; without scores the first."""
    best = max(lines, key=lambda line: line["score"] or 0)
    return " ".join(best["text"].split())


def relative_names(rows: Dataset, folder: Path) -> dict[int, str] | None:
    """Position -> path relative to folder; None if an image is not a file in folder, e.g. if the data has its bytes."""
    if contains_bytes(rows, "image"):
        return None
    paths = [Path(os.path.abspath(path)) for path in rows.flatten()["image.path"][:]]
    if not all(path.is_relative_to(folder) for path in paths):
        return None
    return {position: path.relative_to(folder).as_posix() for position, path in enumerate(paths)}


def write_images(rows: Dataset, positions: Iterable[int], folder: Path) -> dict[int, str]:
    """Write encoded images, as they are, to images/ in folder. Returns: position -> path relative to folder."""
    (folder / IMAGES).mkdir(exist_ok=True)
    suffixes = {SUFFIXES.get(name, name.lower()) for name in IMAGE_FORMATS}
    for old in (folder / IMAGES).iterdir():  # of an earlier threshold; other files stay
        if old.suffix[1:] in suffixes:
            old.unlink()
    names = {}
    for position in positions:
        image = rows[position]["image"]
        with open_encoded(image) as opened:
            suffix = SUFFIXES.get(opened.format, opened.format.lower())
        names[position] = f"{IMAGES}/{position:08d}.{suffix}"
        content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
        (folder / names[position]).write_bytes(content)
    return names


def text_files(names: dict[int, str], folder: Path, extension: str) -> dict[int, Path]:
    """Position -> the text file beside an image.

    Raises: ValueError if two images have the same, or if the extension is one of images.
    """
    if extension.lower() in Image.registered_extensions():
        raise ValueError(f"caption_extension {extension} is one of images, and a text could replace an image.")
    files = {position: (folder / name).with_suffix(extension) for position, name in names.items()}
    owner: dict[Path, int] = {}
    for position, file in files.items():
        if (other := owner.setdefault(file, position)) != position:
            raise ValueError(
                f"{names[other]} and {names[position]} would have the same text file, {file.name}. Rename one of them, "
                "or leave out --write_txt."
            )
    return files


def write_texts(
    files: dict[int, Path], scores: Iterable[Line], kept: dict[int, list[Line]], overwrite: bool
) -> tuple[int, int]:
    """Write the best text of each image to its file, and remove a file with a text of an image that keeps none.

    Args:
        files: position of an image -> its text file.
        scores: lines of scores.jsonl with their positions.
        kept: from kept_by_image.
        overwrite: without it, files that exist stay.
    Returns: the numbers of files written, and left as they were.
    """
    left = 0
    dropped: dict[int, set[str]] = {}
    for line in scores:
        if line["position"] not in kept:
            dropped.setdefault(line["position"], set()).add(best_text([line]))
    for position, texts in dropped.items():  # written for an earlier threshold
        file = files.get(position)
        if file and file.is_file() and file.read_text(encoding="utf-8", errors="replace").strip() in texts:
            if overwrite:
                file.unlink()
            left += not overwrite
    for position, lines in kept.items():
        file = files[position]
        if file.exists() and not overwrite:
            left += 1
            continue
        unfinished = file.with_name(f"{file.name}.unfinished")
        unfinished.write_text(best_text(lines) + "\n", encoding="utf-8")
        os.replace(unfinished, file)
    return len(kept) - left, left


def write_report(path: Path, title: str, scores: Sequence[Line], num_images: int, open_row: Callable) -> None:
    """Write report.html: counts, quantiles of the scores, the lowest texts that are kept and the highest dropped ones.

    Args:
        scores: lines of scores.jsonl with their positions.
        open_row: returns the RGB image of a row, given its position.
    """
    samples = [
        Sample(
            line["text"],
            accuracy=float(line["kept"]),
            score=line["score"],
            kind=f"{line['source']}, {'kept' if line['kept'] else 'dropped'}",
        )
        for line in scores
    ]
    order = sorted(range(len(scores)), key=lambda place: scores[place]["score"] or 0)
    kept = [place for place in order if scores[place]["kept"]]
    dropped = [place for place in order if not scores[place]["kept"]]

    def open_image(place: int) -> Image.Image:
        return open_row(scores[place]["position"])

    write_page(
        path,
        "bootstrap.html",
        *(samples, kept[:MAX_SHOWN] + dropped[-MAX_SHOWN:][::-1], open_image),
        title=title,
        counts={
            "texts": len(scores),
            "texts kept": len(kept),
            "images": num_images,
            "images with a text": len(kept_by_image(scores)),
        },
        **quantiles_of(scores),
        **{"notes": [], "verdicts": [], "bands": []},
    )


def quantiles_of(scores: Sequence[Line]) -> dict[str, Any]:
    """For the page: `sources`, and `quantiles`: share -> the score of each source that this share is below."""
    known = [line for line in scores if line["score"] is not None]
    by_source = {source: [line["score"] for line in known if line["source"] == source] for source in OF_TEXTS}
    by_source = {source: values for source, values in by_source.items() if values}
    quantiles = {
        share: [float(np.quantile(values, share)) for values in by_source.values()] for share in SHARES if known
    }
    return {"sources": list(by_source), "quantiles": quantiles}
