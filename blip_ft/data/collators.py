"""Turn rows into batches. Each image is in a batch only once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BlipProcessor, ProcessorMixin

from blip_ft.arguments.families import BLIP
from blip_ft.data.augmentation import Augmentation
from blip_ft.data.images import encode_row_images
from blip_ft.data.text_formats import Texts, texts_of
from blip_ft.data.texts import clean_caption, encode_texts

# rows with image and image_id -> the result of encode_row_images, or the same with image_states for pixel_values
LookUp = Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]


@dataclass
class VqaCollator:
    """Batch rows with image, image_id, question and answers.

    Returns pixel_values (I, 3, H, W) uint8; input_ids and attention_mask (Q, Lq); image_index (Q,);
    labels (A, La); question_index (A,); answer_weights (A,): count / number of that question's answers; readable (Q,).
    Answers to an unreadable image have weight 0. For InstructBLIP also qformer_input_ids and qformer_attention_mask.
    The column `weight` multiplies answer_weights. For BLIP-2 and InstructBLIP there are then also answer_shares (A,),
    the weights without it.

    Args:
        look_up: used instead of encode_row_images.
        texts: None is BLIP's.
        augmentation: draws the views of images, for training.
    """

    processor: ProcessorMixin
    max_question_tokens: int = 35
    max_answer_tokens: int = 30
    look_up: LookUp | None = None
    texts: Texts | None = None
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        self.texts = self.texts or texts_of(self.processor, BLIP, "vqa")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        image_processor = self.processor.image_processor
        images = self.look_up(rows) if self.look_up else encode_row_images(rows, image_processor, self.augmentation)
        answers, question_index, shares, weights = [], [], [], []
        for index, (row, readable) in enumerate(zip(rows, images["readable"].tolist(), strict=True)):
            for answer, count in Counter(row["answers"]).items():
                answers.append(answer)
                question_index.append(index)
                shares.append(count / len(row["answers"]) if readable else 0.0)
                weights.append(shares[-1] * row.get("weight", 1.0))
        has_shares = "weight" in rows[0] and self.texts.family.reads_prompts
        return {
            **images,
            **({"answer_shares": torch.tensor(shares)} if has_shares else {}),
            **self.texts.encode_questions([row["question"] for row in rows], self.max_question_tokens),
            "labels": self.texts.encode_answers(answers, self.max_answer_tokens),
            "question_index": torch.tensor(question_index),
            "answer_weights": torch.tensor(weights),
        }


@dataclass
class CaptionCollator:
    """Batch rows with image, image_id and caption for training.

    Returns pixel_values (I, 3, H, W) uint8; image_index (C,); readable (C,); and what texts.encode_captions returns.

    Args:
        look_up: used instead of encode_row_images.
        texts: None is BLIP's, with its prompt.
        augmentation: draws the views of images.
    Source: BLIP models/blip.py BLIP_Decoder.forward.
    """

    processor: ProcessorMixin
    max_tokens: int = 40
    clean: bool = True
    look_up: LookUp | None = None
    texts: Texts | None = None
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        self.texts = self.texts or texts_of(self.processor, BLIP, "conditional_generation")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        image_processor = self.processor.image_processor
        images = self.look_up(rows) if self.look_up else encode_row_images(rows, image_processor, self.augmentation)
        captions = [clean_caption(row["caption"]) if self.clean else row["caption"] for row in rows]
        return {**images, **self.texts.encode_captions(captions, self.max_tokens, images["readable"])}


@dataclass
class RetrievalCollator:
    """Batch rows with image, image_id and caption for contrastive training.

    Rows with an unreadable image are left out: they would be negatives of the other rows.

    Returns pixel_values (I, 3, H, W) uint8; image_index (C,); image_ids (I,) int64, the same in all batches and runs;
    input_ids and attention_mask (C, L).

    Args:
        augmentation: draws the views of images.
    Raises: ValueError if no image of the batch can be read.
    """

    processor: BlipProcessor
    max_tokens: int = 35
    clean: bool = True
    augmentation: Augmentation | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = encode_row_images(rows, self.processor.image_processor, self.augmentation)
        if not images["readable"].all():
            rows = [row for row, readable in zip(rows, images["readable"].tolist(), strict=True) if readable]
            if not rows:
                raise ValueError("No image of a batch can be read any more. Check that the files still exist.")
            images = encode_row_images(rows, self.processor.image_processor, self.augmentation)
        captions = [clean_caption(row["caption"]) if self.clean else row["caption"] for row in rows]
        image_ids = dict.fromkeys(row["image_id"] for row in rows)
        digests = [hashlib.sha1(image_id.encode()).digest() for image_id in image_ids]
        return {
            "pixel_values": images["pixel_values"],
            "image_index": images["image_index"],
            "image_ids": torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests]),
            **encode_texts(captions, self.processor.tokenizer, self.max_tokens),
        }


@dataclass
class ImageCollator:
    """Batch only the images of rows, so that no reference text can reach the model.

    Returns pixel_values (rows, 3, H, W) uint8, one per row, and readable (rows,).
    """

    processor: ProcessorMixin

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = encode_row_images(rows, self.processor.image_processor)
        return {"pixel_values": images["pixel_values"][images["image_index"]], "readable": images["readable"]}
