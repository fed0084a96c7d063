"""Batches in, strings out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from blip_ft.collators import decode_texts, encode_labels


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
