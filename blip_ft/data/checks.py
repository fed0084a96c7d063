"""Find images that cannot be read, and report bad rows."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets import (
    Dataset,
)
from datasets.config import HF_CACHE_HOME
from tqdm.auto import tqdm

from blip_ft.data.images import content_hash, open_encoded, open_image
from blip_ft.data.schema import Part
from blip_ft.data.tables import Row, to_json

logger = logging.getLogger(__name__)


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


def find_unreadable_images(parts: Iterable[Part], mode: str) -> dict[str, dict[str, str]]:
    """Part -> image_id -> reason, of the images whose header, or in mode `full` whose pixels, cannot be read.

    By part, for two files may count their images from 0 each. In mode `full`, which reads the files anyway, the
    parts also learn the content of the others.
    """
    remembered = _remembered("readable_images.txt")
    known = set(remembered.read_text().split("\n")) if remembered.is_file() else set()
    hashes = ImageHashes()
    found: dict[str, dict[str, str]] = {}
    fresh: list[str] = []

    def check(image: Row) -> tuple[str | None, str | None, str | None]:
        problem, key = _image_problem(image, mode, known)
        # key is None for bytes, whose hash is known from reading the rows
        return problem, key, hashes.of(image) if key and mode == "full" else None

    for part in parts:
        found[part.name] = {}
        ordered, column = list(part.first), part.rows.select_columns("image")
        progress = tqdm(total=len(ordered), desc=f"Checking images ({part.name})", delay=3)
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


def without_images(rows: Dataset, unreadable: dict[str, str]) -> Dataset:
    if not unreadable:
        return rows
    return rows.select(
        [position for position, image_id in enumerate(rows["image_id"][:]) if image_id not in unreadable]
    )


def why_unreadable(image: Row) -> str | None:
    """Why an image cannot be decoded; None where it can."""
    return _image_problem(image, "full", known=set())[0]


def _image_problem(image: Row, mode: str, known: set[str]) -> tuple[str | None, str | None]:
    """Why an image cannot be read, if so, and under which name a good file is remembered."""
    key = None
    if image is None:
        return "image is missing", None
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
        return f"image cannot be read: {type(error).__name__}: {error}", None
    return None, key


def report_bad_rows(bad: list[Row], total: int, max_fraction: float, file: Path | None) -> None:
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
    logger.warning("%s\nThey are left out of training; in evaluation an unreadable image counts as wrong.", summary)
