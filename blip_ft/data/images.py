"""Open images safely, and resize them."""

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

from blip_ft.data.augmentation import Augmentation

logger = logging.getLogger(__name__)

# Pillow reads forty more formats, and starts Ghostscript for EPS: a data set must not decide which program runs
Image.init()
IMAGE_FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
    if name in Image.OPEN  # AVIF since Pillow 11.3
)

# libtiff's limit for JPEGs inside TIFF files; usual encoders write about 10 scans, mozjpeg up to 64
MAX_JPEG_SCANS = 100

JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])")  # FF 00 is data of a scan

# SOF, DHT, DAC, SOS, DQT, DNL, DRI, APP, COM
JPEG_SEGMENTS = {*range(0xC0, 0xD0), *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE}


def open_image(image: Any, size: int | None = None) -> Image.Image:
    """Open an image of any mode and return it upright, in RGB.

    Args:
        image: a path, encoded bytes, a PIL image, an array (height, width, 3) of uint8, or datasets' {"bytes": ...,
            "path": ...}.
        size: number of pixels per side that is enough: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size.
    Raises: OSError if the image cannot be read or is not a regular file in one of IMAGE_FORMATS; ValueError if `image`
        has another type, has more pixels than Pillow's limit, or is a JPEG with more than MAX_JPEG_SCANS.
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
        # convert() would clip 16-bit values to white
        values = np.nan_to_num(np.asarray(image))
        image = Image.fromarray((values / 257 if values.max() > 255 else values).clip(0, 255).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # a palette may have transparency; convert("RGB") would warn about it
    return image.convert("RGB")


def open_encoded(image: Any) -> Image.Image:
    """Open a path, encoded bytes or datasets' dict and read only its header. Errors as in open_image."""
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if image is None:
        raise ValueError("Expected a path, bytes or a PIL image, but this row has no image.")
    if not isinstance(image, (str, os.PathLike, io.BytesIO)):
        raise ValueError(f"Expected a path, bytes, a PIL image or an array; found a {type(image).__name__}.")
    if not isinstance(image, io.BytesIO):
        _require_regular_file(image)
    try:
        opened, limit = Image.open(image, formats=IMAGE_FORMATS), Image.MAX_IMAGE_PIXELS
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(
            f"it is damaged, or not in one of the formats {', '.join(IMAGE_FORMATS)}. Convert it to one of them."
        ) from error
    # a small file can decode to gigabytes of pixels; Pillow only warns here, and refuses twice as many pixels
    if limit and opened.width * opened.height > limit:
        raise ValueError(f"The image has {opened.width} x {opened.height} pixels; Pillow's limit is {limit}.")
    return opened


def _require_regular_file(path: str | os.PathLike) -> None:
    """Raises: OSError for a folder, a device and a named pipe: opening a pipe may wait forever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file, but a folder, named pipe, socket or device.")


def _require_few_scans(image: Image.Image) -> None:
    """Raises: ValueError for a JPEG that would take long to decode: each scan, even a short one, visits all pixels.

    100 scans of the largest image that Pillow allows take 3 seconds; thousands of scans fit into half a megabyte.
    """
    position = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(position)
    # the bytes that start a scan also appear in thumbnails and, by chance, in data after the image
    if content.count(b"\xff\xda") > MAX_JPEG_SCANS and (scans := _count_scans(content)) > MAX_JPEG_SCANS:
        raise ValueError(f"The JPEG has {scans} scans; the limit is {MAX_JPEG_SCANS}. Save it again.")


def _count_scans(jpeg: bytes) -> int:
    """Count the scans before the end marker. What follows it, such as a second image or a video, is not decoded."""
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
    """SHA-1 of the encoded bytes of datasets' {"bytes": ..., "path": ...}, as hexadecimal digits.

    Raises: OSError if the file cannot be read or is not a regular file.
    """
    content = image["bytes"]
    if content is None:
        _require_regular_file(image["path"])
        with open(image["path"], "rb") as file:
            content = file.read()
    return hashlib.sha1(content).hexdigest()


def longest_side(image_processor: BlipImageProcessor) -> int:
    """The longer side of the images from resize_to_uint8, in pixels."""
    return max(image_processor.size["width"], image_processor.size["height"])


def resize_to_uint8(images: Sequence[Image.Image], image_processor: BlipImageProcessor) -> torch.Tensor:
    """(num_images, 3, height, width) uint8, resized as the processor does. The device normalizes them later."""
    size = (image_processor.size["width"], image_processor.size["height"])
    resized = [np.asarray(image.resize(size, image_processor.resample)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


def encode_row_images(
    rows: Sequence[dict[str, Any]], image_processor: BlipImageProcessor, augmentation: Augmentation | None = None
) -> dict[str, torch.Tensor]:
    """Encode the images of rows with image and image_id, each only once. An unreadable image becomes a gray one.

    Args:
        augmentation: draws a random view of each image, which its rows share. Rows of a stream have an epoch of their
            own; the others are in that of the augmentation.
    Returns pixel_values (I, 3, H, W) uint8; image_index (rows,); readable (rows,), False for the gray images.
    """
    first_row: dict[str, dict] = {}
    for row in rows:
        first_row.setdefault(row["image_id"], row)
    position = {image_id: index for index, image_id in enumerate(first_row)}
    size = (image_processor.size["width"], image_processor.size["height"])
    # a crop of an image that was decoded at half its size would be enlarged
    enough = longest_side(image_processor) * (2 if augmentation else 1)
    images, unreadable = [], set()
    for image_id, row in first_row.items():
        try:
            image = open_image(row["image"], enough)
        # decoders raise many classes on broken input: OSError, SyntaxError, ValueError, struct.error, zlib.error
        except Exception as error:
            logger.warning("image %s cannot be read and is replaced by a gray image: %s", image_id, error)
            image = Image.new("RGB", (1, 1), (128, 128, 128))
            unreadable.add(image_id)
        else:
            if augmentation:
                view = augmentation.draw(image_id, image.size, row.get("epoch"))
                image = view.apply(image, size, image_processor.resample)
        images.append(image)
    return {
        "pixel_values": resize_to_uint8(images, image_processor),
        "image_index": torch.tensor([position[row["image_id"]] for row in rows]),
        "readable": torch.tensor([row["image_id"] not in unreadable for row in rows]),
    }
