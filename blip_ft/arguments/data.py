"""Where rows come from, and what their columns are called."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blip_ft.arguments.settings import Settings, changed_settings
from blip_ft.arguments.training import BlipTrainingArguments

# settings of a loader that a stream's own has too
STREAM_READS = ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_drop_last")


@dataclass
class DataArguments(Settings):
    """Where rows come from and what their columns are called."""

    _argument_group_name = "Data"
    _needs_annotations = True  # False to predict alone

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "`demo`, a Hub id, an image folder with metadata.jsonl/csv/parquet, a save_to_disk folder, or a "
            "json, jsonl, csv or parquet file with a column of image paths."
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Another source of the same kinds, to evaluate on. Default: dataset_name itself."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Name of the configuration of a Hub data set."})
    questions_file: str | None = field(default=None, metadata={"help": "Official VQA v2 questions JSON to train on."})
    annotations_file: str | None = field(default=None, metadata={"help": "Its annotations JSON."})
    eval_questions_file: str | None = field(
        default=None, metadata={"help": "Official VQA v2 questions JSON to evaluate on."}
    )
    eval_annotations_file: str | None = field(default=None, metadata={"help": "Its annotations JSON."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder that image paths start from. Default: that of the data file."}
    )
    train_split: str = field(default="train", metadata={"help": "Split, or value of the column `split`, to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: eval_fraction of the images of train_split."}
    )
    test_split: str | None = field(
        default=None,
        metadata={"help": "Split that the final model is evaluated on once, beside those rows that may choose it."},
    )
    test_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Another source of the same kinds for this. Default: dataset_name, if a test_split is named."
        },
    )
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Share of the images (not rows) held out where there is no eval_split."}
    )
    allow_image_overlap: bool = field(
        default=False,
        metadata={"help": "Evaluate on the rows that are trained on, if both are named the same. Default: refused."},
    )
    image_column: str | None = field(default=None, metadata={"help": "Default: `image`, else `file_name`."})
    image_id_column: str = field(
        default="image_id",
        metadata={"help": "Same id, same image. Made from the path or the bytes where it is missing."},
    )
    question_column: str = field(default="question", metadata={"help": "Column of questions."})
    answer_column: str | None = field(
        default=None,
        metadata={"help": "Strings, lists, VQA v2 dicts, numbers or booleans. Default: `answers`, else `answer`."},
    )
    caption_column: str | None = field(
        default=None, metadata={"help": "Strings or lists of strings. Default: `captions`, else `caption`."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use the first rows only, of those to test on too."}
    )
    check_images: Literal["full", "header"] = field(
        default="full",
        metadata={"help": "Before training decode every image at reduced size, or read its header only (large sets)."},
    )
    max_bad_fraction: float = field(
        default=0.01,
        metadata={"help": "Stop when a larger share of all rows has an image that cannot be read, 0 to 1."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the rows to train on as they are needed, without a copy on disk. Takes --max_steps, which is "
            "then one epoch, and something to evaluate on; a bad image is met in training and counts for nothing."
        },
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={"help": "Images that each worker holds of a stream, to draw the next one from."},
    )
    group_questions: bool | None = field(
        default=None,
        metadata={
            "help": "Keep an image's questions or captions in one batch. Default: on for questions and captions, "
            "off for retrieval and in DataPipeline."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name and self.questions_file:
            raise ValueError("Give dataset_name or questions_file, not both.")
        if self.eval_dataset_name and not self.dataset_name:
            raise ValueError("eval_dataset_name goes with dataset_name; for VQA v2 files give eval_questions_file.")
        if (self.test_split or self.test_dataset_name) and self.questions_file:
            raise ValueError(
                "test_split and test_dataset_name go with dataset_name. To test on VQA v2 files, evaluate the result "
                "afterwards: --model_name_or_path OUTPUT_DIR --do_train false --eval_questions_file FILE"
            )
        for questions, answers in (
            ("questions_file", "annotations_file"),
            ("eval_questions_file", "eval_annotations_file"),
        ):
            if self._needs_annotations and bool(getattr(self, questions)) != bool(getattr(self, answers)):
                raise ValueError(f"{questions} and {answers} go together: the official VQA v2 files come in pairs.")
        if self.questions_file and not self.image_folder:
            raise ValueError("questions_file needs image_folder: the folder that holds the COCO images.")
        if self.streaming and not (self.eval_split or self.eval_dataset_name or self.eval_questions_file):
            raise ValueError("From a stream no image can be held out. Give --eval_split or --eval_dataset_name.")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction is a share between 0 and 1, found {self.eval_fraction}.")
        if self.eval_questions_file and not self.questions_file:
            raise ValueError("eval_questions_file goes with questions_file; for other data give eval_dataset_name.")

    def unread(self) -> dict[str, str]:
        names = (self.dataset_name, self.eval_dataset_name, self.test_dataset_name)
        of_hub = any(name not in (None, "demo") and not Path(name).expanduser().exists() for name in names)
        to_evaluate = (self.eval_split, self.eval_dataset_name, self.eval_questions_file)
        return {
            **({} if of_hub else {"dataset_config": "without a data set of the Hub"}),
            **({} if self.streaming else {"shuffle_buffer": "without --streaming"}),
            **({"eval_fraction": "beside other data to evaluate on"} if any(to_evaluate) else {}),
            **({"eval_fraction": "with the demo's data"} if self.dataset_name == "demo" else {}),
        }

    def check_streaming(self, training_args: BlipTrainingArguments) -> None:
        """Settle what depends on both: steps in place of epochs for a stream, and which rows may be the same.

        Raises: ValueError if rows are streamed and training_args do not go with that.
        """
        # nothing is trained on the rows to train on
        self.allow_image_overlap |= not training_args.do_train
        if self.streaming:
            training_args.go_by_steps()
        if self.streaming and training_args.max_steps < 1:
            raise ValueError("A stream has no end: --streaming needs --max_steps, the optimiser steps to train for.")
        for name in changed_settings(training_args) if self.streaming else ():
            of_loader = name.startswith("dataloader_") and name not in STREAM_READS
            if of_loader or name in ("data_seed", "ignore_data_skip"):
                way_out = "Use --seed." if name == "data_seed" else "Leave it out."
                raise ValueError(f"{name} has no effect with --streaming. {way_out}")
        if self.streaming and training_args.cache_image_features:
            raise ValueError("cache_image_features needs to know all images before training: leave out --streaming.")

    @property
    def hub_id(self) -> str | None:
        """The data set's id where it lies on the Hub, None for files and for the demo."""
        name = self.dataset_name
        return None if name in (None, "demo") or Path(name).exists() else name

    @property
    def label(self) -> str:
        """A short name for the model card, without the folders that lead to the data."""
        return Path(self.dataset_name or self.questions_file).name

    @property
    def held_out(self) -> str:
        """What is evaluated on, in words for the model card."""
        source = self.eval_dataset_name or self.eval_questions_file
        if source:
            return Path(source).name + (f", split {self.eval_split}" if self.eval_split else "")
        if self.eval_split or self.dataset_name == "demo":
            return f"split {self.eval_split or 'validation'}"
        return f"{self.eval_fraction:.0%} of the images of {self.train_split}"

    @property
    def tested_on(self) -> str | None:
        """What the final model is evaluated on once, in words; None if nothing is named."""
        if self.test_dataset_name:
            return Path(self.test_dataset_name).name + (f", split {self.test_split}" if self.test_split else "")
        return f"split {self.test_split}" if self.test_split else None
