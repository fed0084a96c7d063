"""What labels of BLIP-2 and InstructBLIP must be, and the number of their tokens."""

from __future__ import annotations

import torch

from blip_ft.data.texts import IGNORED


def require_answers(input_ids: torch.Tensor, labels: torch.Tensor | None, is_aligned: bool) -> None:
    """Raise ValueError if labels are missing, or a copy of input_ids, or not the answers alone.

    Args:
        input_ids: (num_questions, prompt_length).
        labels: (num_answers, answer_length), -100 on padding.
        is_aligned: input_ids have placeholders, as in transformers, where labels may ignore the prompt or be missing.
    """
    if labels is None:
        if is_aligned:
            return
        raise ValueError("forward needs labels to compute the loss. To answer questions, call generate.")
    if labels.shape == input_ids.shape:
        is_copied = labels == input_ids
        if (is_copied | (labels == IGNORED)).all() and is_copied[:, 0].any():
            raise ValueError(
                "labels repeat input_ids, so that the loss would be that of the prompt and of `<image>`. Give the "
                "answers alone as labels, with their end token, or set the prompt's positions to -100."
            )
    counted = labels != IGNORED
    if not is_aligned and (counted[:, 1:] & ~counted[:, :-1]).any():
        raise ValueError(
            "Found -100 before a token of labels; it may only follow an answer's tokens. Without `<image>`, input_ids "
            "are the prompts alone, and labels the answers alone."
        )


def count_tokens(labels: torch.Tensor, answer_weights: torch.Tensor | None = None) -> torch.Tensor:
    """The weighted number of tokens of labels (num_answers, answer_length), without -100."""
    tokens = (labels != IGNORED).sum(1)
    return (tokens if answer_weights is None else tokens * answer_weights).sum()
