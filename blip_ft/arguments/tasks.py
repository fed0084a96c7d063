"""Settings that belong to one task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers.hf_argparser import HfArg

from blip_ft.arguments.settings import Settings


@dataclass
class VqaArguments(Settings):
    """Settings of visual question answering only."""

    _argument_group_name = "Question answering"

    question_start_token: Literal["cls", "enc"] = HfArg(
        default="cls", help="First token of a question. With cls as in transformers, with enc as in the original."
    )
    max_question_tokens: int = HfArg(default=35, help="Truncate longer questions. Paper: 35.")
    max_answer_tokens: int = HfArg(default=30, help="Truncate longer answers in training.")
    answer_mode: Literal["generate", "rank"] = HfArg(
        default="generate", help="Generate answers, or rank those of answer_list."
    )
    answer_list: str | None = HfArg(default=None, help="File of answers to rank. A JSON list, or one answer per line.")
    k_test: int = HfArg(default=128, help="Answers per question that get a full score. Used to rank only. Paper: 128.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.answer_mode == "rank") != (self.answer_list is not None):
            raise ValueError("Use answer_mode rank and answer_list together: --answer_mode rank --answer_list FILE.")

    def unread(self) -> dict[str, str]:
        return {} if self.answer_mode == "rank" else {"k_test": "without --answer_mode rank"}


@dataclass
class CaptioningArguments(Settings):
    """Settings of captioning only."""

    _argument_group_name = "Captioning"

    prompt: str = HfArg(
        default="a picture of ", help="Beginning of every caption. It is given, not learned. Original: `a picture of `."
    )
    max_caption_tokens: int = HfArg(default=40, help="Truncate longer captions, prompt included. Paper: 40.")
    clean_captions: bool = HfArg(
        default=True, help="Clean captions as the original. Lowercase, without most punctuation, at most 30 words."
    )
    generation_min_length: int = HfArg(default=5, help="Minimum tokens of a caption, prompt included.")
    repetition_penalty: float = HfArg(default=1.0, help="Above 1, make repeated words less likely.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, found {self.repetition_penalty}; 1 has no effect.")


@dataclass
class RetrievalArguments(Settings):
    """Settings of image-text retrieval only."""

    _argument_group_name = "Retrieval"

    queue_size: int = HfArg(default=57600, help="Pairs kept as negatives; 0: only the batch. Paper: 57600.")
    momentum: float = HfArg(default=0.995, help="Share of momentum weights kept per step.")
    alpha: float = HfArg(
        default=0.4, help="Weight of the momentum model's soft targets. It rises from 0 over the first epoch."
    )
    itm_start_token: Literal["cls", "enc"] = HfArg(
        default="cls", help="First token of a text to match. With cls as in transformers, with enc as in the original."
    )
    max_caption_tokens: int = HfArg(default=35, help="Truncate longer captions. Paper: 35.")
    clean_captions: bool = HfArg(
        default=True, help="Clean captions as the original. Lowercase, without most punctuation, at most 30 words."
    )
    k_test: int = HfArg(
        default=256, help="Candidates that the matching head ranks again. Paper: 256 for COCO, 128 for Flickr."
    )
