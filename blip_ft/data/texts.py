"""Clean texts, convert them to token ids, and decode generated ids."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a position without a target

MAX_CAPTION_WORDS = 30

MAX_QUESTION_WORDS = 50


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, (num_texts, longest): [CLS] ... [SEP], truncated to max_tokens."""
    # losses and masks assume padding on the right
    settings = {"padding": True, "padding_side": "right", "truncation": True, "max_length": max_tokens}
    tokens = tokenizer(list(texts), **settings, return_tensors="pt")
    # otherwise the tokenizer keeps these settings and is saved with them
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def encode_labels(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> torch.Tensor:
    """(num_texts, longest) token ids, with -100 on padding."""
    tokens = encode_texts(texts, tokenizer, max_tokens)
    return tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORED)


def decode_texts(
    token_ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase, end_token_id: int | None = None
) -> list[str]:
    """Decode each row up to the first end token, without special ids and ids that the tokenizer does not know.

    end_token_id: default [SEP].

    The Hub's tokenizer has 30,522 entries, but the model can also generate [DEC] 30522 and [ENC] 30523.
    """
    special, known = set(tokenizer.all_special_ids), len(tokenizer)
    end = tokenizer.sep_token_id if end_token_id is None else end_token_id
    texts = []
    for row in token_ids.tolist():
        row = row[: row.index(end)] if end in row else row
        kept = [token for token in row if 0 <= token < known and token not in special]
        texts.append(tokenizer.decode(kept).strip())
    return texts


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of [CLS] and the prompt's words, without [SEP]. Generation starts with them; they have no loss."""
    return tokenizer(prompt)["input_ids"][:-1]


def require_room(
    prompt: str,
    prompt_length: int,
    max_caption_tokens: int | None,
    generation_max_length: int,
    generation_min_length: int,
) -> None:
    """Raise ValueError if the prompt of BLIP leaves no room for a word and [SEP] in one of the lengths.

    Args:
        prompt_length: number of tokens of the prompt, which the lengths include.
        max_caption_tokens: the limit in training, None without training.
    """
    needed = prompt_length + 2
    limits = {"max_caption_tokens": max_caption_tokens, "generation_max_length": generation_max_length}
    for name, limit in limits.items():
        if limit is not None and limit < needed:
            raise ValueError(
                f"{name} is {limit}, but the prompt {prompt!r}, one word and [SEP] need {needed} tokens. No "
                f"caption fits. Set --{name} to {needed} or more, or shorten --prompt."
            )
    require_order(generation_min_length, generation_max_length)


def require_order(generation_min_length: int, generation_max_length: int) -> None:
    if generation_min_length > generation_max_length:
        raise ValueError(
            f"generation_min_length {generation_min_length} is larger than generation_max_length "
            f"{generation_max_length}. Lower the first or raise the second."
        )


def clean_caption(caption: str) -> str:
    """Lowercase, replace each of . ! " ( ) * # : ; ~ by a space, and keep the first MAX_CAPTION_WORDS words.

    Source: BLIP data/utils.py pre_caption.
    """
    return " ".join(re.sub(r"[.!\"()*#:;~]", " ", caption.lower()).split()[:MAX_CAPTION_WORDS])


def clean_question(question: str) -> str:
    """Lowercase, remove each of . ! " ( ) * # : ; ~ and spaces at the end, and keep the first MAX_QUESTION_WORDS words.

    Unlike in clean_caption, what is removed leaves no space, and spaces in a row are kept: `3.5` becomes 35.

    Source: BLIP data/utils.py pre_question; LAVIS processors/blip_processors.py BlipQuestionProcessor is the same.
    """
    words = re.sub(r"[.!\"()*#:;~]", "", question.lower()).rstrip(" ").split(" ")
    return " ".join(words[:MAX_QUESTION_WORDS])
