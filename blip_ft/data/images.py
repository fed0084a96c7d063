"""Open, check and resize images."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import stat
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BlipImageProcessor

logger = logging.getLogger(__name__)

# Pillow knows forty more, and for EPS it starts Ghostscript: a data set must not choose what runs here
Image.init()
IMAGE_FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
    if name in Image.OPEN  # AVIF since Pillow 11.3
)

# libtiff's limit for the JPEGs in its files; encoders write about 10 scans, mozjpeg up to 64
MAX_JPEG_SCANS = 100

JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])")  # FF 00 is a byte of a scan

# SOF, DHT, DAC, SOS, DQT, DNL, DRI, APP, COM
JPEG_SEGMENTS = {*range(0xC0, 0xD0), *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE}


def open_image(image: Any, size: int | None = None) -> Image.Image:
    """An upright RGB image of any mode.

    Args:
        image: a path, encoded bytes, a PIL image, an array (height, width, 3) of bytes, or datasets' {"bytes": ...,
            "path": ...}.
        size: pixels a side that are enough: a larger JPEG is decoded at a half, quarter or eighth of its size.
    Raises: OSError if it cannot be read or is not a regular file in one of IMAGE_FORMATS; ValueError if it is none of
        these, has more pixels than Pillow's limit, or is a JPEG of more than MAX_JPEG_SCANS.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        image = open_encoded(image)
        if image.format in ("JPEG", "MPO"):
            _require_few_scans(image)
        if size is not None:
            image.draft(image.mode, (size, size))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        # convert() would clip 16 bits to white
        values = np.nan_to_num(np.asarray(image))
        image = Image.fromarray((values / 257 if values.max() > 255 else values).clip(0, 255).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # a palette may hold transparency, which convert("RGB") warns about
    return image.convert("RGB")


def open_encoded(image: Any) -> Image.Image:
    """Reads the header only. image and errors: as of open_image, but for PIL images and arrays."""
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if image is None:
        raise ValueError("An image is a path, bytes or a PIL image; this row has none.")
    if not isinstance(image, (str, os.PathLike, io.BytesIO)):
        raise ValueError(f"An image is a path, bytes, a PIL image or an array; this is a {type(image).__name__}.")
    if not isinstance(image, io.BytesIO):
        _require_regular_file(image)
    try:
        opened, limit = Image.open(image, formats=IMAGE_FORMATS), Image.MAX_IMAGE_PIXELS
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(
            f"it is damaged, or in none of the formats {', '.join(IMAGE_FORMATS)}. Convert it to one of them."
        ) from error
    # a few bytes can stand for gigabytes of pixels; Pillow warns here, and refuses twice as many
    if limit and opened.width * opened.height > limit:
        raise ValueError(f"It has {opened.width} x {opened.height} pixels, more than the {limit} that Pillow allows.")
    return opened


def _require_regular_file(path: str | os.PathLike) -> None:
    """Raises: OSError for a named pipe, whose opening may wait forever, for a device and for a folder."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file but a folder, named pipe, socket or device.")


def _require_few_scans(image: Image.Image) -> None:
    """Raises: ValueError for a JPEG that takes long to decode: each scan, of a few bytes or many, visits all pixels.

    100 scans of the most pixels that Pillow allows take 3 seconds; thousands fit into half a megabyte.
    """
    position = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(position)
    # the bytes of a start of scan also stand in thumbnails, and by chance in what follows the image
    if content.count(b"\xff\xda") > MAX_JPEG_SCANS and (scans := _count_scans(content)) > MAX_JPEG_SCANS:
        raise ValueError(f"It is a JPEG of {scans} scans; at most {MAX_JPEG_SCANS} are decoded. Save it anew.")


def _count_scans(jpeg: bytes) -> int:
    """Scans up to the end marker. What follows, a second image or a film, is not decoded."""
    scans = position = 0
    while marker := JPEG_MARKER.search(jpeg, position):
        position, code = marker.end(), marker[1][0]
        if code == 0xD9:
            break
        scans += code == 0xDA
        if code in JPEG_SEGMENTS:
            position += max(2, int.from_bytes(jpeg[position : position + 2], "big"))
    return scans


def content_hash(image: dict[str, Any]) -> str:
    """SHA-1 of the encoded bytes of datasets' {"bytes": ..., "path": ...}, in hexadecimal digits.

    Raises: OSError if its file cannot be read or is not a regular one.
    """
    content = image["bytes"]
    if content is None:
        _require_regular_file(image["path"])
        with open(image["path"], "rb") as file:
            content = file.read()
    return hashlib.sha1(content).hexdigest()


def longest_side(image_processor: BlipImageProcessor) -> int:
    """Pixels of the longer side of what resize_to_uint8 gives."""
    return max(image_processor.size["width"], image_processor.size["height"])


def resize_to_uint8(images: Sequence[Image.Image], image_processor: BlipImageProcessor) -> torch.Tensor:
    """(num_images, 3, height, width) uint8: resized as the processor does; the device normalises."""
    size = (image_processor.size["width"], image_processor.size["height"])
    resized = [np.asarray(image.resize(size, image_processor.resample)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


def encode_row_images(rows: Sequence[dict[str, Any]], image_processor: BlipImageProcessor) -> dict[str, torch.Tensor]:
    """The images of rows with image and image_id, each once; one that cannot be read becomes a grey one.

    Returns pixel_values (I, 3, H, W) uint8; image_index (rows,); readable (rows,), False for the grey ones.
    """
    first_row: dict[str, dict] = {}
    for row in rows:
        first_row.setdefault(row["image_id"], row)
    position = {image_id: index for index, image_id in enumerate(first_row)}
    images, unreadable = [], set()
    for image_id, row in first_row.items():
        try:
            images.append(open_image(row["image"], longest_side(image_processor)))
        # decoders raise what they like on broken input: OSError, SyntaxError, ValueError, struct.error, zlib.error
        except Exception as error:
            logger.warning("image %s cannot be read and counts for nothing: %s", image_id, error)
            images.append(Image.new("RGB", (1, 1), (128, 128, 128)))
            unreadable.add(image_id)
    return {
        "pixel_values": resize_to_uint8(images, image_processor),
        "image_index": torch.tensor([position[row["image_id"]] for row in rows]),
        "readable": torch.tensor([row["image_id"] not in unreadable for row in rows]),
    }
