"""Batches in, strings out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BlipProcessor, PreTrainedTokenizerBase

from blip_ft.collators import (
    decode_texts,
    encode_images,
    encode_labels,
    encode_prompt,
    encode_texts,
    open_image,
)


def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    question_states: torch.Tensor,
    attention_mask: torch.Tensor,
    max_length: int = 20,
    num_beams: int = 3,
) -> list[str]:
    """An answer for each question, written freely.

    Args:
        question_states, attention_mask: (num_questions, question_length, ...), of model.encode_questions.
        max_length: tokens of an answer, [DEC] and [SEP] among them.
    """
    ids = model.generate_answers(
        question_states, attention_mask, max_length=max_length, num_beams=num_beams, do_sample=False
    )
    return decode_texts(ids, tokenizer)


def rank(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    question_states: torch.Tensor,
    attention_mask: torch.Tensor,
    candidates: Sequence[str],
    k: int = 128,
    max_tokens: int = 30,
) -> list[str]:
    """The likeliest of the candidates for each question, as the original's rank_answer chooses it."""
    ids = encode_labels(candidates, tokenizer, max_tokens).to(question_states.device)
    _, order = model.rank_answers(question_states, attention_mask, ids, k)
    return [candidates[best] for best in order[:, 0].tolist()]


def caption(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pixel_values: torch.Tensor,
    prompt: str = "a picture of ",
    max_length: int = 20,
    num_beams: int = 3,
    min_length: int = 5,
    repetition_penalty: float = 1.0,
) -> list[str]:
    """A caption for each picture, without the prompt that it begins with.

    Args:
        pixel_values: (num_images, 3, height, width).
        max_length, min_length: tokens, prompt and [SEP] among them.
    """
    start = torch.tensor([encode_prompt(prompt, tokenizer)] * len(pixel_values), device=pixel_values.device)
    ids = model.generate(
        pixel_values,
        start,
        max_length=max_length,
        min_length=min_length,
        num_beams=num_beams,
        repetition_penalty=repetition_penalty,
        do_sample=False,
    )
    return decode_texts(ids[:, start.shape[1] :], tokenizer)


def answer_questions(
    model: torch.nn.Module,
    processor: BlipProcessor,
    images: Sequence[Any],
    questions: Sequence[str],
    max_length: int = 20,
    num_beams: int = 3,
    images_at_once: int = 16,
    questions_at_once: int = 64,
) -> list[str]:
    """An answer for each pair of picture and question, in their order; each different picture is encoded once.

    Args:
        images: paths, bytes or PIL images, one for each question; the same object, path or bytes is the same picture.
        images_at_once, questions_at_once: bound the memory; the answers do not depend on them.
    """
    # PIL images cannot be hashed
    keys = [image if isinstance(image, (str, bytes)) else id(image) for image in images]
    asked: dict[Any, list[int]] = {}
    for position, key in enumerate(keys):
        asked.setdefault(key, []).append(position)
    longest = model.config.text_config.max_position_embeddings
    answers = [""] * len(questions)
    groups = list(asked.values())
    for start in range(0, len(groups), images_at_once):
        chunk = groups[start : start + images_at_once]
        pixels = encode_images([open_image(images[group[0]]) for group in chunk], processor.image_processor)
        pairs = [(row, position) for row, group in enumerate(chunk) for position in group]
        with torch.no_grad():
            states = model.encode_images(pixels.to(model.device)).last_hidden_state
            for first in range(0, len(pairs), questions_at_once):
                rows, positions = zip(*pairs[first : first + questions_at_once], strict=True)
                tokens = encode_texts([questions[p] for p in positions], processor.tokenizer, longest)
                ids, mask = tokens["input_ids"].to(model.device), tokens["attention_mask"].to(model.device)
                index = torch.tensor(rows, device=model.device)
                question_states = model.encode_questions(states, ids, mask, index)
                texts = answer(model, processor.tokenizer, question_states, mask, max_length, num_beams)
                for position, text in zip(positions, texts, strict=True):
                    answers[position] = text
    return answers
