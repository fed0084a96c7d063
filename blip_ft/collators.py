"""Rows to batches, and the encoding of pictures and texts that inference uses too."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BlipImageProcessor, BlipProcessor, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a position that has no target

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
    """An upright RGB picture of any mode.

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
        raise ValueError("A picture is a path, bytes or a PIL image; this row has none.")
    if not isinstance(image, (str, os.PathLike, io.BytesIO)):
        raise ValueError(f"A picture is a path, bytes, a PIL image or an array; this is a {type(image).__name__}.")
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
    """Pixels of the longer side of what encode_images gives."""
    return max(image_processor.size["width"], image_processor.size["height"])


def encode_images(images: Sequence[Image.Image], image_processor: BlipImageProcessor) -> torch.Tensor:
    """(num_images, 3, height, width) uint8: resized as the processor does; the device normalises."""
    size = (image_processor.size["width"], image_processor.size["height"])
    resized = [np.asarray(image.resize(size, image_processor.resample)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, (num_texts, longest), [CLS] ... [SEP], cut at max_tokens."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    # the tokenizer would keep both and be saved with them
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def encode_labels(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> torch.Tensor:
    """(num_texts, longest) ids with -100 on padding."""
    tokens = encode_texts(texts, tokenizer, max_tokens)
    return tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORED)


def decode_texts(token_ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Strings of generated rows: up to the first [SEP], without special ids and ids the tokenizer does not know.

    The Hub's tokenizer has 30,522 entries while the model also writes [DEC] 30522 and [ENC] 30523.
    """
    special, end, known = set(tokenizer.all_special_ids), tokenizer.sep_token_id, len(tokenizer)
    texts = []
    for row in token_ids.tolist():
        row = row[: row.index(end)] if end in row else row
        kept = [token for token in row if 0 <= token < known and token not in special]
        texts.append(tokenizer.decode(kept).strip())
    return texts


def encode_row_images(rows: Sequence[dict[str, Any]], image_processor: BlipImageProcessor) -> dict[str, torch.Tensor]:
    """The pictures of rows with image and image_id, each once; one that cannot be read becomes a grey one.

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
            logger.warning("picture %s cannot be read and counts for nothing: %s", image_id, error)
            images.append(Image.new("RGB", (1, 1), (128, 128, 128)))
            unreadable.add(image_id)
    return {
        "pixel_values": encode_images(images, image_processor),
        "image_index": torch.tensor([position[row["image_id"]] for row in rows]),
        "readable": torch.tensor([row["image_id"] not in unreadable for row in rows]),
    }


# rows with image and image_id -> what encode_row_images gives, or image_states in the place of its pixel_values
LookUp = Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]


@dataclass
class VqaCollator:
    """Rows of image, image_id, question and answers to a batch in which each picture stands once.

    Returns pixel_values (I, 3, H, W) uint8; input_ids and attention_mask (Q, Lq); image_index (Q,);
    labels (A, La); question_index (A,); answer_weights (A,): count / number of that question's answers; readable (Q,).
    The answers to a picture that cannot be read weigh 0. look_up takes the place of encode_row_images.
    """

    processor: BlipProcessor
    max_question_tokens: int = 35
    max_answer_tokens: int = 30
    look_up: LookUp | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = self.look_up(rows) if self.look_up else encode_row_images(rows, self.processor.image_processor)
        answers, question_index, weights = [], [], []
        for index, (row, readable) in enumerate(zip(rows, pictures["readable"].tolist(), strict=True)):
            for answer, count in Counter(row["answers"]).items():
                answers.append(answer)
                question_index.append(index)
                weights.append(count / len(row["answers"]) if readable else 0.0)
        tokenizer = self.processor.tokenizer
        return {
            **pictures,
            **encode_texts([row["question"] for row in rows], tokenizer, self.max_question_tokens),
            "labels": encode_labels(answers, tokenizer, self.max_answer_tokens),
            "question_index": torch.tensor(question_index),
            "answer_weights": torch.tensor(weights),
        }


@dataclass
class CaptionCollator:
    """Rows of image, image_id and caption to a batch to train on, in which each picture stands once.

    Returns pixel_values (I, 3, H, W) uint8; image_index (C,); input_ids and attention_mask (C, L) of prompt and
    caption; labels (C, L), -100 on the prompt, on padding and for a picture that cannot be read; readable (C,).
    look_up takes the place of encode_row_images.
    Source: BLIP models/blip.py BLIP_Decoder.forward.
    """

    processor: BlipProcessor
    prompt: str = "a picture of "
    max_tokens: int = 40
    clean: bool = True
    look_up: LookUp | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = self.look_up(rows) if self.look_up else encode_row_images(rows, self.processor.image_processor)
        captions = [clean_caption(row["caption"]) if self.clean else row["caption"] for row in rows]
        tokenizer = self.processor.tokenizer
        tokens = encode_texts([self.prompt + caption for caption in captions], tokenizer, self.max_tokens)
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORED)
        labels[:, : len(encode_prompt(self.prompt, tokenizer))] = IGNORED
        labels[~pictures["readable"]] = IGNORED
        return {**pictures, **tokens, "labels": labels}


@dataclass
class RetrievalCollator:
    """Rows of image, image_id and caption to a batch to train on, in which each picture stands once.

    A row whose picture cannot be read is left out, for it would be a negative to the others.

    Returns pixel_values (I, 3, H, W) uint8; image_index (C,); image_ids (I,) int64, the same in all batches and runs;
    input_ids and attention_mask (C, L).
    Raises: ValueError where no picture of the batch can be read.
    """

    processor: BlipProcessor
    max_tokens: int = 35
    clean: bool = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = encode_row_images(rows, self.processor.image_processor)
        if not pictures["readable"].all():
            rows = [row for row, readable in zip(rows, pictures["readable"].tolist(), strict=True) if readable]
            if not rows:
                raise ValueError("No picture of a whole batch can be read any more. Check that the files are there.")
            pictures = encode_row_images(rows, self.processor.image_processor)
        captions = [clean_caption(row["caption"]) if self.clean else row["caption"] for row in rows]
        image_ids = dict.fromkeys(row["image_id"] for row in rows)
        digests = [hashlib.sha1(image_id.encode()).digest() for image_id in image_ids]
        return {
            "pixel_values": pictures["pixel_values"],
            "image_index": pictures["image_index"],
            "image_ids": torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests]),
            **encode_texts(captions, self.processor.tokenizer, self.max_tokens),
        }


@dataclass
class PictureCollator:
    """Rows of image and image_id to a batch of their pictures alone; no reference can reach the model.

    Returns pixel_values (rows, 3, H, W) uint8, readable (rows,).
    """

    processor: BlipProcessor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = encode_row_images(rows, self.processor.image_processor)
        return {"pixel_values": pictures["pixel_values"][pictures["image_index"]], "readable": pictures["readable"]}


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of [CLS] and the prompt's words, without [SEP]: how generation begins, and what training does not count."""
    return tokenizer(prompt)["input_ids"][:-1]


def require_room_for_captions(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    generation_min_length: int,
    generation_max_length: int,
    max_caption_tokens: int | None = None,
) -> None:
    """Raise ValueError if the prompt leaves no room for a word and [SEP]; all lengths include the prompt's tokens.

    Args:
        max_caption_tokens: of training; None if nothing is trained.
    """
    needed = len(encode_prompt(prompt, tokenizer)) + 2
    limits = {"max_caption_tokens": max_caption_tokens, "generation_max_length": generation_max_length}
    for name, limit in limits.items():
        if limit is not None and limit < needed:
            raise ValueError(
                f"{name} is {limit}, and the prompt {prompt!r}, a word and the end take {needed} tokens: nothing is "
                f"left of a caption. Set --{name} to {needed} or more, or shorten --prompt."
            )
    if generation_min_length > generation_max_length:
        raise ValueError(
            f"generation_min_length {generation_min_length} is above generation_max_length {generation_max_length}. "
            "Lower the one or raise the other."
        )


def clean_caption(caption: str, max_words: int = 30) -> str:
    """Lower case, with a space for each of . ! " ( ) * # : ; ~ and at most max_words words.

    Source: BLIP data/utils.py pre_caption.
    """
    return " ".join(re.sub(r"[.!\"()*#:;~]", " ", caption.lower()).split()[:max_words])
