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
    question_prompt: str | None = HfArg(
        default=None,
        help="Text to read, with {} for the question. `Question: {} Short answer:` for BLIP-2, "
        "`Question: {} Short Answer:` for InstructBLIP, {} for BLIP. Default: as the model was trained.",
    )
    clean_questions: bool | None = HfArg(
        default=None,
        help="Clean questions as the original. Lowercase, without most punctuation, at most 50 words. Default: as the "
        "model was trained, or false.",
    )
    max_question_tokens: int | None = HfArg(
        default=None, help="Truncate longer questions with their prompt. Default: 35, BLIP-2 32, InstructBLIP 128."
    )
    max_answer_tokens: int | None = HfArg(
        default=None, help="Truncate longer answers in training. Default: 30, BLIP-2 32, InstructBLIP 256."
    )
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

    prompt: str | None = HfArg(
        default=None,
        help="Text before every caption. It is given, not learned. `a picture of ` for BLIP, `a photo of` for BLIP-2, "
        "`A short image caption.` for InstructBLIP. Default: as the model was trained.",
    )
    max_caption_tokens: int | None = HfArg(
        default=None,
        help="Truncate longer captions; for BLIP the prompt counts. Default: 40, BLIP-2 32, InstructBLIP 256.",
    )
    clean_captions: bool = HfArg(
        default=True, help="Clean captions as the original. Lowercase, without most punctuation, at most 30 words."
    )
    generation_min_length: int | None = HfArg(
        default=None,
        help="Minimum tokens of a caption; for BLIP the prompt counts. Default: 5, BLIP-2 8, InstructBLIP 10.",
    )
    repetition_penalty: float | None = HfArg(
        default=None, help="Above 1, make repeated words less likely. Default: 1, InstructBLIP 1.5."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
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
