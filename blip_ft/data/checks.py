"""Find images that cannot be read, and report rows that cannot be used."""

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

from datasets import Dataset
from datasets.config import HF_CACHE_HOME
from tqdm.auto import tqdm

from blip_ft.data.images import content_hash, open_encoded, open_image
from blip_ft.data.schema import Part
from blip_ft.data.tables import Row, to_json

logger = logging.getLogger(__name__)


def find_unreadable_images(parts: Iterable[Part], mode: str) -> dict[str, dict[str, str]]:
    """For each part, the images that cannot be read: image_id -> reason.

    The results are separate for each part because two files may both number their images from 0.

    Args:
        mode: `header` reads only the header of each image. `full` decodes its pixels; since this reads the files
            anyway, it also puts the hash of each file into Part.identity.
    """
    cache = _cache_file("readable_images.txt")
    known = set(cache.read_text().split("\n")) if cache.is_file() else set()
    hashes = ImageHashes()
    found: dict[str, dict[str, str]] = {}
    fresh: list[str] = []

    def check(image: Row) -> tuple[str | None, str | None, str | None]:
        problem, key = _check_image(image, mode, known)
        # key is None for bytes; their hash is known since the rows were read
        return problem, key, hashes.of(image) if key and mode == "full" else None

    for part in parts:
        found[part.name] = {}
        ordered, column = list(part.first), part.rows.select_columns("image")
        # disable=None: the bar is shown only in a terminal
        progress = tqdm(total=len(ordered), desc=f"Checking images ({part.name})", delay=3, disable=None)
        with ThreadPoolExecutor() as pool:
            # in chunks, because map() reads all of its input at once
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
        _append_lines(cache, fresh)
    hashes.remember()
    return found


def drop_unreadable_images(rows: Dataset, unreadable: dict[str, str]) -> Dataset:
    """The rows without those whose image_id is in `unreadable`."""
    if not unreadable:
        return rows
    return rows.select(
        [position for position, image_id in enumerate(rows["image_id"][:]) if image_id not in unreadable]
    )


def why_unreadable(image: Row) -> str | None:
    """The reason why an image cannot be decoded, or None if it can."""
    return _check_image(image, "full", known=set())[0]


def report_bad_rows(bad: list[Row], total: int, max_fraction: float, file: Path | None) -> None:
    """Log the bad rows and write them to `file`. Raises: ValueError if more than max_fraction of the rows are bad."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(to_json(row) + "\n" for row in bad), encoding="utf-8")
    first = "\n".join(f"  {row['split']} row {row['row']} ({row['image_id']}): {row['reason']}" for row in bad[:5])
    summary = f"{len(bad)} of {total} rows cannot be used" + (f", all listed in {file}" if file else "") + f":\n{first}"
    # compared in the same way as the value suggested below is computed: 0.29 * 100 is less than 29
    if len(bad) / total > max_fraction:
        raise ValueError(
            f"{summary}\nThat is more than max_bad_fraction = {max_fraction:.2%}. Fix or remove these rows, or set "
            f"--max_bad_fraction {math.ceil(1000 * len(bad) / total) / 1000}"
        )
    logger.warning(
        "%s\nThese rows are not used for training. In evaluation, a row with an unreadable image counts as wrong.",
        summary,
    )


class ImageHashes:
    """SHA-1 of images. The hash of a file is cached on disk and computed again only if the file has changed."""

    def __init__(self) -> None:
        self.file = _cache_file("image_hashes.txt")
        lines = self.file.read_text().split("\n") if self.file.is_file() else []
        complete = re.compile("[0-9a-f]{40} [0-9a-f]{40}")  # a killed run may have written half a line
        self.known = dict(line.split(" ") for line in lines if complete.fullmatch(line))
        self.fresh: dict[str, str] = {}

    def of(self, image: Row) -> str:
        """The hash of datasets' {"bytes": ..., "path": ...}. Raises: OSError if the file cannot be read."""
        if image["bytes"] is not None:
            return content_hash(image)
        signature = _file_signature(image["path"])
        if signature in self.known:
            return self.known[signature]
        found = self.known[signature] = content_hash(image)
        # a file that changes twice within one tick of the file system's clock keeps its times; a tick of FAT is 2 s
        if time.time() - os.stat(image["path"]).st_ctime > 2:
            self.fresh[signature] = found
        return found

    def remember(self) -> None:
        """Write the new hashes to the cache."""
        _append_lines(self.file, (f"{signature} {found}" for signature, found in self.fresh.items()))
        self.fresh = {}


def _check_image(image: Row, mode: str, known: set[str]) -> tuple[str | None, str | None]:
    """The reason why an image cannot be read, if any, and the key under which a readable file is cached."""
    key = None
    if image is None:
        return "image is missing", None
    try:
        if image["bytes"] is None:
            key = f"{_file_signature(image['path'])} {mode}"
            if key in known:
                return None, key
        if mode == "full":
            open_image(image, size=64)  # decodes a JPEG at an eighth of its size
        else:
            open_encoded(image).close()
    # decoders raise many classes on broken input: OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
    except Exception as error:
        return f"image cannot be read: {type(error).__name__}: {error}", None
    return None, key


def _file_signature(path: str) -> str:
    """A string that changes whenever the file changes.

    Size and mtime are not enough: `cp -p` and rsync can replace a file and keep both. ctime cannot be set back.
    """
    status = os.stat(path)
    values = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return hashlib.sha1(f"{path} {values}".encode()).hexdigest()


def _cache_file(name: str) -> Path:
    return Path(HF_CACHE_HOME) / "blip_ft" / name


def _append_lines(file: Path, lines: Iterable[str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as opened:
            opened.write("".join(f"{line}\n" for line in lines))
    except OSError as error:
        logger.info("The results of the image check cannot be cached: %s", error)
