"""Settings of one task each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blip_ft.arguments.settings import Settings


@dataclass
class VqaArguments(Settings):
    """What belongs to question answering alone."""

    _argument_group_name = "Question answering"

    question_start_token: Literal["cls", "enc"] = field(
        default="cls",
        metadata={
            "help": "First token of a question. cls: what stock inference sends; enc: what the original trained with."
        },
    )
    max_question_tokens: int = field(default=35, metadata={"help": "Longer questions are cut. Paper: 35."})
    max_answer_tokens: int = field(default=30, metadata={"help": "Longer answers are cut in training."})
    answer_mode: Literal["generate", "rank"] = field(
        default="generate", metadata={"help": "Write the answer freely, or choose the likeliest of answer_list."}
    )
    answer_list: str | None = field(
        default=None, metadata={"help": "File of answers to choose from: a JSON list, or one a line."}
    )
    k_test: int = field(
        default=128, metadata={"help": "Answers scored in full for each question when ranking. Paper: 128."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.answer_mode == "rank") != (self.answer_list is not None):
            raise ValueError(
                "answer_mode rank and answer_list go together: give --answer_mode rank --answer_list FILE."
            )

    def unread(self) -> dict[str, str]:
        return {} if self.answer_mode == "rank" else {"k_test": "without --answer_mode rank"}


@dataclass
class CaptioningArguments(Settings):
    """What belongs to captioning alone."""

    _argument_group_name = "Captioning"

    prompt: str = field(
        default="a picture of ",
        metadata={"help": "What every caption begins with; it is given, not learned. Original: `a picture of `."},
    )
    max_caption_tokens: int = field(
        default=40, metadata={"help": "Longer captions, with their prompt, are cut in training. Paper: 40."}
    )
    clean_captions: bool = field(
        default=True,
        metadata={
            "help": "Train on captions in lower case, without most punctuation, cut at 30 words, as the original."
        },
    )
    generation_min_length: int = field(default=5, metadata={"help": "Tokens of a caption at least, prompt included."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1: words already written become rarer."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, found {self.repetition_penalty}; 1 changes nothing.")


@dataclass
class RetrievalArguments(Settings):
    """What belongs to image-text retrieval alone."""

    _argument_group_name = "Retrieval"

    queue_size: int = field(
        default=57600, metadata={"help": "Pairs remembered as negatives; 0: those of the batch only. Paper: 57600."}
    )
    momentum: float = field(default=0.995, metadata={"help": "Share of the momentum weights that a step keeps."})
    alpha: float = field(
        default=0.4, metadata={"help": "Weight of the momentum model's soft targets, reached after the first epoch."}
    )
    itm_start_token: Literal["cls", "enc"] = field(
        default="cls",
        metadata={"help": "First token of a text to be matched. cls: what stock sends; enc: as the original trained."},
    )
    max_caption_tokens: int = field(default=35, metadata={"help": "Longer captions are cut. Paper: 35."})
    clean_captions: bool = field(
        default=True,
        metadata={"help": "Captions in lower case, without most punctuation, cut at 30 words, as the original."},
    )
    k_test: int = field(
        default=256,
        metadata={"help": "Candidates that the matching head ranks again. Paper: 256 for COCO, 128 for Flickr."},
    )
