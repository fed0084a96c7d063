"""Where rows come from, and the names of their columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from blip_ft.arguments.settings import Settings, changed_settings
from blip_ft.arguments.training import BlipTrainingArguments

# settings of the Trainer's data loader that a streaming loader also reads
STREAM_READS = ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_drop_last")


@dataclass
class DataArguments(Settings):
    """Where rows come from, and the names of their columns."""

    _argument_group_name = "Data"
    _needs_annotations = True  # False for prediction

    # lists for the parser; of a list with one entry, __post_init__ keeps the entry, a string
    dataset_name: list[str] | None = HfArg(
        default=None,
        help="Data: `demo`, a Hub id, a folder or a file. A folder contains images and "
        "metadata.jsonl/csv/parquet, or was written by save_to_disk; a json, jsonl, csv or parquet file has "
        "a column of image paths. The rows of several are mixed.",
    )
    eval_dataset_name: str | None = HfArg(
        default=None, help="Data to evaluate on. Same kinds as dataset_name. Default: dataset_name."
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration name of a Hub data set.")
    questions_file: str | None = HfArg(default=None, help="Official VQA v2 questions JSON to train on.")
    annotations_file: str | None = HfArg(default=None, help="Official VQA v2 annotations JSON to train on.")
    eval_questions_file: str | None = HfArg(default=None, help="Official VQA v2 questions JSON to evaluate on.")
    eval_annotations_file: str | None = HfArg(default=None, help="Official VQA v2 annotations JSON to evaluate on.")
    image_folder: list[str] | None = HfArg(
        default=None,
        help="Folder that image paths are relative to. Default: that of the data file. For several dataset_name, one "
        "for all, or one for each; other data to evaluate or test on is then in the first.",
    )
    train_split: str = HfArg(
        default="train", help="Split to train on. In files, a column `split` gives each row's split."
    )
    eval_split: str | None = HfArg(
        default=None, help="Split to evaluate on. Default: eval_fraction of the images of train_split."
    )
    test_split: str | None = HfArg(
        default=None, help="Split to test the final model on, once. It is not used to choose a checkpoint."
    )
    test_dataset_name: str | None = HfArg(
        default=None, help="Data to test the final model on, once. Default: dataset_name, if test_split is given."
    )
    eval_fraction: float = HfArg(
        default=0.1,
        help="Share of images to hold out for evaluation. Images are counted, not rows. Used if there is no "
        "eval_split.",
    )
    allow_image_overlap: bool = HfArg(
        default=False, help="Allow evaluation on the rows of training. Otherwise it is refused."
    )
    image_column: str | None = HfArg(default=None, help="Column of images. Default: image or file_name.")
    image_id_column: str = HfArg(
        default="image_id", help="Column of image ids. If it is missing, ids are made from paths or bytes."
    )
    question_column: str = HfArg(default="question", help="Column of questions.")
    answer_column: str | None = HfArg(
        default=None,
        help="Column of answers. Strings, lists, VQA v2 dicts, numbers or booleans. Default: answers or answer.",
    )
    caption_column: str | None = HfArg(
        default=None, help="Column of captions. Strings or lists of strings. Default: captions or caption."
    )
    max_train_samples: int | None = HfArg(default=None, help="Train on the first N rows only.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate and test on the first N rows only.")
    check_images: Literal["full", "header"] = HfArg(
        default="full",
        help="Image check before training. With full, all images are decoded at reduced size; with header, only "
        "headers are read, for large sets.",
    )
    max_bad_fraction: float = HfArg(
        default=0.01, help="Largest share of rows with unreadable images. In [0, 1]; above it, the run stops."
    )
    streaming: bool = HfArg(
        default=False,
        help="Read training rows on demand. Nothing is copied to disk. Requires evaluation data and --max_steps, "
        "which then counts as one epoch. Unreadable images are skipped in training.",
    )
    shuffle_buffer: int = HfArg(default=1000, help="Size of each worker's shuffle buffer, in images.")
    group_questions: bool | None = HfArg(
        default=None,
        help="Keep all texts of an image in one batch. By default true for vqa and captioning, false otherwise.",
    )
    augment: bool = HfArg(
        default=False,
        help="Train on a random view of each image, as the original. It is cropped, flipped, changed by RandAugment. "
        "Each epoch has other views. Evaluation reads whole images.",
    )
    flip: bool = HfArg(
        default=True,
        help="With --augment, flip half of the views. Turn it off for documents, signs, and answers that say left or "
        "right.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sources()
        if self.dataset_name and self.questions_file:
            raise ValueError("dataset_name and questions_file are mutually exclusive. Give one of them.")
        if self.eval_dataset_name and not self.dataset_name:
            raise ValueError("eval_dataset_name requires dataset_name. For VQA v2 files, use eval_questions_file.")
        if (self.test_split or self.test_dataset_name) and self.questions_file:
            raise ValueError(
                "test_split and test_dataset_name require dataset_name. To test on VQA v2 files, evaluate the trained "
                "model: --model_name_or_path OUTPUT_DIR --do_train false --eval_questions_file FILE"
            )
        for questions, answers in (
            ("questions_file", "annotations_file"),
            ("eval_questions_file", "eval_annotations_file"),
        ):
            if self._needs_annotations and bool(getattr(self, questions)) != bool(getattr(self, answers)):
                raise ValueError(
                    f"{questions} and {answers} must be given together: the official VQA v2 files come in pairs."
                )
        if self.questions_file and not self.image_folder:
            raise ValueError("questions_file requires image_folder, the folder with the COCO images.")
        if self.streaming and not (self.eval_split or self.eval_dataset_name or self.eval_questions_file):
            raise ValueError("No images can be held out from a stream. Add --eval_split or --eval_dataset_name.")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be between 0 and 1, both excluded; found {self.eval_fraction}.")
        if self.eval_questions_file and not self.questions_file:
            raise ValueError("eval_questions_file requires questions_file. For other data, use eval_dataset_name.")

    def _check_sources(self) -> None:
        """Turn lists of one into strings. Raises: ValueError for names and folders that do not work together."""
        self.dataset_name, self.image_folder = _only_one(self.dataset_name), _only_one(self.image_folder)
        names, folders = _as_list(self.dataset_name), _as_list(self.image_folder)
        if len(folders) > 1 and len(folders) != len(names):
            raise ValueError(
                f"image_folder takes one folder for all data, or one for each dataset_name; found {len(folders)} "
                f"folders for {len(names)}."
            )
        if len(names) < 2:
            return
        if not self._needs_annotations:
            raise ValueError(f"Predictions are for one dataset_name, found {', '.join(names)}. Predict for each.")
        if "demo" in names:
            raise ValueError(
                "The demo's data is not mixed with other data. Leave out `demo`, or the other dataset_name."
            )
        if self.streaming:
            raise ValueError("One dataset_name can be streamed; several are mixed without --streaming.")
        if len(set(names)) < len(names):
            raise ValueError(f"dataset_name has the same data twice: {', '.join(names)}. Give each once.")

    def sources(self) -> dict[str, DataArguments]:
        """A name for each source of dataset_name -> the arguments that read it alone. The name of a single one is "".

        A name has no folders, so that data may be moved; the second of equal names is e.g. `train.json-2`.
        """
        names, folders = _as_list(self.dataset_name), _as_list(self.image_folder)
        if len(names) < 2:
            return {"": self}
        if len(folders) < 2:
            folders = [self.image_folder] * len(names)
        found: dict[str, DataArguments] = {}
        for name, folder in zip(names, folders, strict=True):
            source, number = Path(name).name, 2
            while source in found:
                source, number = f"{Path(name).name}-{number}", number + 1
            found[source] = replace(self, dataset_name=name, image_folder=folder)
        return found

    def other_source(self, name: str) -> DataArguments:
        """The arguments that read eval_dataset_name or test_dataset_name in the place of dataset_name."""
        return replace(self, dataset_name=name, image_folder=next(iter(_as_list(self.image_folder)), None))

    def unread(self) -> dict[str, str]:
        names = (*_as_list(self.dataset_name), self.eval_dataset_name, self.test_dataset_name)
        of_hub = any(name not in (None, "demo") and not Path(name).expanduser().exists() for name in names)
        to_evaluate = (self.eval_split, self.eval_dataset_name, self.eval_questions_file)
        return {
            **({} if of_hub else {"dataset_config": "without a data set of the Hub"}),
            **({} if self.streaming else {"shuffle_buffer": "without --streaming"}),
            **({} if self.augment else {"flip": "without --augment"}),
            **({"eval_fraction": "beside other data to evaluate on"} if any(to_evaluate) else {}),
            **({"eval_fraction": "with the demo's data"} if self.dataset_name == "demo" else {}),
        }

    def check_streaming(self, training_args: BlipTrainingArguments) -> None:
        """Apply to both what depends on both: steps instead of epochs for a stream, and whether rows may overlap.

        Raises: ValueError if rows are streamed or augmented and training_args do not allow it.
        """
        # without training, the training rows are not used
        self.allow_image_overlap |= not training_args.do_train
        if self.streaming:
            training_args.go_by_steps()
        if self.streaming and training_args.max_steps < 1:
            raise ValueError("A stream has no end: --streaming requires --max_steps, the number of optimizer steps.")
        for name in changed_settings(training_args) if self.streaming else ():
            of_loader = name.startswith("dataloader_") and name not in STREAM_READS
            if of_loader or name in ("data_seed", "ignore_data_skip"):
                way_out = "Use --seed." if name == "data_seed" else "Leave it out."
                raise ValueError(f"{name} has no effect with --streaming. {way_out}")
        if self.streaming and training_args.cache_image_features:
            raise ValueError("cache_image_features needs all images before training. Leave out --streaming.")
        if self.streaming and training_args.cosine_per_epoch:
            raise ValueError("A stream has no epochs: cosine_per_epoch does not work with --streaming. Leave it out.")
        if self.augment and training_args.cache_image_features:
            raise ValueError(
                "cache_image_features keeps the features of one view of each image, and --augment makes others in each "
                "epoch. Leave out one of the two."
            )

    @property
    def hub_ids(self) -> list[str]:
        """The ids of the data on the Hub, without files and the demo."""
        return [name for name in _as_list(self.dataset_name) if name != "demo" and not Path(name).expanduser().exists()]

    @property
    def label(self) -> str:
        """A short name for the model card, without the folders of its path."""
        return " + ".join(Path(name).name for name in _as_list(self.dataset_name or self.questions_file))

    @property
    def held_out(self) -> str:
        """The evaluation data, in words for the model card."""
        source = self.eval_dataset_name or self.eval_questions_file
        if source:
            return Path(source).name + (f", split {self.eval_split}" if self.eval_split else "")
        if self.eval_split or self.dataset_name == "demo":
            return f"split {self.eval_split or 'validation'}"
        return f"{self.eval_fraction:.0%} of the images of {self.train_split}"

    @property
    def tested_on(self) -> str | None:
        """The test data in words; None if there is none."""
        if self.test_dataset_name:
            return Path(self.test_dataset_name).name + (f", split {self.test_split}" if self.test_split else "")
        return f"split {self.test_split}" if self.test_split else None


def _only_one(value: str | list[str] | None) -> str | list[str] | None:
    """The entry of a list with one entry; a longer list, as a list; other values as they are."""
    several = _as_list(value)
    return several if len(several) > 1 else next(iter(several), None)


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
