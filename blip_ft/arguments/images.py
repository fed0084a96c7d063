"""Which images a program reads that does not train."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from blip_ft.arguments.data import DataArguments

OF_DATA = ("image_column", "image_id_column", "question_column", "answer_column", "caption_column", "image_folder")


@dataclass
class ImageArguments(DataArguments):
    """Which images, and the names of their columns."""

    _needs_annotations = False
    without_effect = {
        **dict.fromkeys(
            (
                *("train_split", "eval_fraction", "max_train_samples", "check_images", "max_bad_fraction"),
                *("streaming", "shuffle_buffer", "group_questions", "allow_image_overlap", "augment", "flip"),
            ),
            "Leave it out: nothing is trained.",
        ),
        **dict.fromkeys(("eval_dataset_name", "test_dataset_name"), "Give that data as --dataset_name."),
        "test_split": "Give that split as --eval_split.",
        "eval_questions_file": "Give that file as --questions_file.",
        "eval_annotations_file": "Give that file as --annotations_file.",
    }

    images: list[str] | None = HfArg(default=None, help="Images and folders of images, instead of dataset_name.")

    def __post_init__(self) -> None:
        super().__post_init__()
        sources = {name: bool(getattr(self, name)) for name in ("images", "dataset_name", "questions_file")}
        if sum(sources.values()) != 1:
            *first, last = (f"--{name}" for name in sources if name not in self.without_effect)
            raise ValueError(f"Choose the images by exactly one of {', '.join(first)} and {last}.")

    def unread(self) -> dict[str, str]:
        of_data = (*OF_DATA, "eval_split", "max_eval_samples")
        return super().unread() | dict.fromkeys(of_data if self.images else (), "beside --images")
