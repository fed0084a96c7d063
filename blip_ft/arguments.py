"""The dataclasses that every recipe shares, and parse(): a YAML file first, the command line over it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, get_args, get_type_hints

import torch
import yaml
from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import distributed
from transformers import HfArgumentParser, Seq2SeqTrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_torch_bf16_gpu_available

from blip_ft.data.secrets import hide_secrets
from blip_ft.results.files import release_folders

logger = logging.getLogger(__name__)


AT_LEAST_ONE = (1, math.inf)
NOT_NEGATIVE = (0, math.inf)
SHARE = (0, 1)
TOKENS = (3, 512)  # the first, a word and [SEP]; BERT's positions
# setting -> the least and the largest value that it may have, in whatever program
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("label_smoothing", "dropout", "max_bad_fraction", "lora_dropout", "momentum", "alpha"), SHARE),
    **dict.fromkeys(
        (
            *("image_size", "lora_alpha", "max_train_samples", "max_eval_samples", "shuffle_buffer"),
            *("k_test", "top_texts", "per_device_train_batch_size", "per_device_eval_batch_size"),
            *("gradient_accumulation_steps", "generation_num_beams", "save_total_limit"),
        ),
        AT_LEAST_ONE,
    ),
    **dict.fromkeys(("max_question_tokens", "max_answer_tokens", "max_caption_tokens"), TOKENS),
    "generation_max_length": TOKENS,
    "generation_min_length": (0, 512),
    **dict.fromkeys(
        (
            *("queue_size", "sample_steps", "dataloader_num_workers", "learning_rate", "weight_decay"),
            *("cache_limit_gb", "max_grad_norm", "warmup_steps", "logging_steps", "eval_delay"),
        ),
        NOT_NEGATIVE,
    ),
    "lora_r": (1, 1024),  # the width of the largest BLIP; above it an adapter holds more than its layer
    "adam_epsilon": (1e-20, math.inf),  # at 0 the step of a weight without gradient is 0 / 0
    "num_train_epochs": (1e-6, math.inf),
    "save_steps": (1e-6, math.inf),
    "eval_steps": (1e-6, math.inf),  # 0 would mean logging_steps
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}
WITHOUT_LARGEST = ("dropout", "lora_dropout")  # with 1 nothing would be left to train on


class Settings:
    """What the argument classes of all programs share: checks of single values, and of settings that nothing reads."""

    # settings of a base class that no program of this class reads -> why; refused, and not in --help
    without_effect: ClassVar[dict[str, str]] = {}
    # help in the place of a base class's, where that would not be true here
    help_texts: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        self.check_values()

    def check_values(self) -> None:
        """Raise ValueError for a value outside RANGES, for NaN and for infinity."""
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            least, most = RANGES.get(entry.name, (-math.inf, math.inf))
            is_excluded = entry.name in WITHOUT_LARGEST and value == most
            if math.isfinite(value) and least <= value <= most and not is_excluded:
                continue
            wanted = f"between {least} and {most}" if most < math.inf else f"at least {least}"
            wanted = "a finite number" if least == -math.inf else wanted
            excluded = f", {most} excluded" if entry.name in WITHOUT_LARGEST else ""
            raise ValueError(f"{entry.name} must be {wanted}{excluded}, found {value}.")

    def require_effect(self) -> None:
        """Raise ValueError for a setting that is without_effect and has another value than its default."""
        for name in changed_settings(self):
            if name in self.without_effect:
                raise ValueError(f"{name} has no effect here. {self.without_effect[name]}")

    def unread(self) -> dict[str, str]:
        """Settings that nothing reads because of the values of others -> "without ..." or "beside ..."."""
        return {}


def _default(entry: dataclasses.Field) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


@dataclass
class ModelArguments(Settings):
    """Which checkpoint, and what to change in it before training."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of a BLIP checkpoint or PEFT adapter; `demo`: a small new model."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels a side. The position table is resized once and stored. Default: the checkpoint's."},
    )
    label_smoothing: float = field(
        default=0.1, metadata={"help": "Of the language-modelling loss, 0 to 1. Paper: 0.1. Stored in text_config."}
    )
    dropout: float | None = field(
        default=None,
        metadata={"help": "Of text states and attention. Paper: 0.1. Default: the checkpoint's (0 on the Hub)."},
    )
    freeze: str | None = field(
        default=None,
        metadata={
            "help": "Comma-separated parts that are not trained, e.g. vision_model or text_encoder.encoder.layer.0"
        },
    )
    allow_pickle: bool = field(
        default=False,
        metadata={"help": "Also take weights that lie there as .bin only, a pickle; they are read with weights_only."},
    )
    allow_new_weights: bool = field(
        default=False,
        metadata={"help": "Also take a checkpoint that lacks weights, which start from random numbers, or has others."},
    )

    def unread(self) -> dict[str, str]:
        # DataPipeline's and the recipes' default lies on the Hub
        is_local = self.model_name_or_path is not None and self.hub_id is None
        return {"model_revision": "without a checkpoint of the Hub"} if is_local else {}

    @property
    def hub_id(self) -> str | None:
        """The checkpoint's id where it lies on the Hub, None for a folder and for the demo."""
        name = self.model_name_or_path
        return None if name == "demo" or Path(name).exists() else name

    @property
    def frozen_parts(self) -> list[str]:
        return [name.strip() for name in (self.freeze or "").split(",") if name.strip()]


@dataclass
class PeftArguments(Settings):
    """Train an adapter instead of the model, and hold the model in few bits. Names as in TRL's ModelConfig."""

    _argument_group_name = "PEFT and quantization"

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter; it is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of linear layers. Default: all of attention and feed-forward, never the tied head."},
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "8-bit weights (bitsandbytes); needs --use_peft."})
    load_in_4bit: bool = field(default=False, metadata={"help": "4-bit NF4 weights (bitsandbytes); needs --use_peft."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("Choose one width: load_in_8bit and load_in_4bit are both on.")
        if (self.load_in_8bit or self.load_in_4bit) and not self.use_peft:
            bits = "load_in_8bit" if self.load_in_8bit else "load_in_4bit"
            raise ValueError(f"{bits} needs an adapter, for weights of few bits cannot be trained. Add --use_peft.")

    def unread(self) -> dict[str, str]:
        names = () if self.use_peft else ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        return dict.fromkeys(names, "without --use_peft")


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
            "json, jsonl, csv or parquet file with a column of picture paths."
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
        default=None, metadata={"help": "Folder that picture paths start from. Default: that of the data file."}
    )
    train_split: str = field(default="train", metadata={"help": "Split, or value of the column `split`, to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: eval_fraction of the pictures of train_split."}
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
        default=0.1, metadata={"help": "Share of the pictures (not rows) held out where there is no eval_split."}
    )
    allow_image_overlap: bool = field(
        default=False,
        metadata={"help": "Evaluate on the rows that are trained on, if both are named the same. Default: refused."},
    )
    image_column: str | None = field(default=None, metadata={"help": "Default: `image`, else `file_name`."})
    image_id_column: str = field(
        default="image_id",
        metadata={"help": "Same id, same picture. Made from the path or the bytes where it is missing."},
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
        metadata={
            "help": "Before training decode every picture at reduced size, or read its header only (large sets)."
        },
    )
    max_bad_fraction: float = field(
        default=0.01,
        metadata={"help": "Stop when a larger share of all rows has a picture that cannot be read, 0 to 1."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the rows to train on as they are needed, without a copy on disk. Takes --max_steps, which is "
            "then one epoch, and something to evaluate on; a bad picture is met in training and counts for nothing."
        },
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={"help": "Pictures that each worker holds of a stream, to draw the next one from."},
    )
    group_questions: bool | None = field(
        default=None,
        metadata={
            "help": "Keep a picture's questions or captions in one batch. Default: on for questions and captions, "
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
            raise ValueError("questions_file needs image_folder: the folder that holds the COCO pictures.")
        if self.streaming and not (self.eval_split or self.eval_dataset_name or self.eval_questions_file):
            raise ValueError("From a stream no picture can be held out. Give --eval_split or --eval_dataset_name.")
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
            raise ValueError("cache_image_features needs to know all pictures before training: leave out --streaming.")

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
        return f"{self.eval_fraction:.0%} of the pictures of {self.train_split}"

    @property
    def tested_on(self) -> str | None:
        """What the final model is evaluated on once, in words; None if nothing is named."""
        if self.test_dataset_name:
            return Path(self.test_dataset_name).name + (f", split {self.test_split}" if self.test_split else "")
        return f"split {self.test_split}" if self.test_split else None


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


NOT_ADAM = ("adafactor", "adagrad", "rmsprop", "sgd")
_EVALUATION = "Leave it out: evaluation always generates texts, in the precision of training, and scores all of them."
_ORDER = "Leave it out: each epoch is shuffled by image and cut to whole batches."
# the Trainer's settings that BlipTrainer does not read, or reads in vain -> what to do
WITHOUT_EFFECT = {
    **dict.fromkeys(
        (
            *("bf16_full_eval", "fp16_full_eval", "predict_with_generate", "prediction_loss_only", "label_names"),
            *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "batch_eval_metrics"),
            "include_for_metrics",
        ),
        _EVALUATION,
    ),
    **dict.fromkeys(
        ("train_sampling_strategy", "length_column_name", "sortish_sampler", "dataloader_drop_last"), _ORDER
    ),
    "do_eval": "Leave it out: a run ends with an evaluation.",
    "do_predict": "Leave it out: recipes/predict.py predicts.",
    "generation_config": "Use --generation_max_length and --generation_num_beams.",
    "use_cache": "Leave it out: generation decides for itself.",
    "use_liger_kernel": "Leave it out: Liger has no kernels for BLIP.",
    "liger_kernel_config": "Leave it out: Liger has no kernels for BLIP.",
    "include_num_input_tokens_seen": "Leave it out: it would count pixels as tokens.",
    "enable_jit_checkpoint": "Leave it out: SIGTERM saves a checkpoint in any case.",
    "parallelism_config": "Leave it out: BLIP is not cut up among devices.",
    "label_smoothing_factor": "It would smooth the wrong tokens, for the Trainer does not shift BLIP's labels. Use "
    "--label_smoothing, which goes into the model's own loss.",
    "logging_nan_inf_filter": "Leave it out: a loss that is not finite stops the run.",
    "remove_unused_columns": "It would drop image, question and answers. Leave it off.",
    "hub_token": "It would be pickled into training_args.bin. Set the environment variable HF_TOKEN instead.",
}
HELP_TEXTS = {
    "weight_decay": "Weight decay of all parameters, biases and norms included, as in the paper.",
    "metric_for_best_model": "Metric that chooses the best checkpoint. Default: the loss if it is measured, else the "
    "recipe's first metric.",
    "resume_from_checkpoint": "`last`: the newest complete checkpoint of output_dir; or a checkpoint-... folder.",
    "eval_on_start": "Evaluate once before training; the results are named before_training_...",
    "report_to": "tensorboard, trackio or wandb, each installed with pip, or none.",
    "average_tokens_across_devices": "Divide the loss by what all processes together have to learn in a step: "
    "questions, or tokens of captions.",
    "data_seed": "Seed of the order of rows. Default: seed. Not for --streaming.",
    "debug": "Without a value: show the traceback of a mistake. With underflow_overflow: find where numbers overflow.",
    "push_to_hub": "Push the result to the Hub at the end, and on the way as hub_strategy says.",
    "hub_private_repo": "Make the repository private. It has no effect on one that exists.",
    "bf16": "Compute in bfloat16 where that is safe. Needs a GPU that has it, or --use_cpu.",
    "fp16": "Compute in float16 where that is safe. Needs a GPU; bf16 is the safer choice where there is one.",
    "optim_target_modules": "Layers that GaLore or APOLLO train at low rank.",
}


@dataclass
class BlipTrainingArguments(Seq2SeqTrainingArguments, Settings):
    """The Trainer's arguments, with the defaults of the BLIP paper where it has one."""

    _argument_group_name = "Training"
    without_effect = WITHOUT_EFFECT
    help_texts = HELP_TEXTS
    metrics: ClassVar[tuple[str, ...]] = ()  # what the recipe's evaluation gives; () is not checked

    output_dir: str | None = field(
        default=None, metadata={"help": "Default: outputs/<recipe>, or the next free outputs/<recipe>-2, -3, ..."}
    )
    # of questions, also for DataPipeline; each recipe sets its own
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 64
    do_train: bool = field(
        default=True,
        metadata={
            "help": "false: evaluate model_name_or_path, on the rows to evaluate on and those to test on; nothing is "
            "trained, and no weights are written."
        },
    )
    do_eval: bool = True
    include_num_input_tokens_seen: str = "no"  # as a bool, which the parser would make of it, it is not its default
    # train_vqa.py: AdamW(lr, weight_decay=0.05) on all parameters, no clipping, cosine
    weight_decay: float = 0.05
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "0: no clipping, as the paper. The summed loss has norms over 10."}
    )
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 50
    logging_nan_inf_filter: bool = False  # it would hide them, and wait for the device in each step
    eval_strategy: str | None = field(
        default=None,
        metadata={
            "help": "Evaluate while training: no, epoch or steps. Default: with each checkpoint under "
            "load_best_model_at_end, else no."
        },
    )
    save_strategy: str | None = None  # as eval_strategy under load_best_model_at_end, else epoch
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = field(
        default=False,
        metadata={
            "help": "Evaluate with each checkpoint, and end with the best of them instead of the last one. Default: as "
            "the originals, on for captions (CIDEr-D) and retrieval (mean recall), off for questions."
        },
    )
    dataloader_num_workers: int = field(
        default_factory=lambda: min(4, os.cpu_count() or 1),
        metadata={"help": "Processes that read and resize pictures. Default: one a core, at most 4."},
    )
    # every column is the collator's business, and all heads are used in each step
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    cache_image_features: bool = field(
        default=False,
        metadata={
            "help": "With --freeze vision_model, for questions and captions: encode each training picture once, before "
            "the first epoch, and keep the result on disk for this and later runs. Evaluation still encodes."
        },
    )
    cache_dtype: Literal["bf16", "fp32"] = field(
        default="bf16",
        metadata={"help": "Of the kept features. fp32: the loss of a run without cache, twice the size."},
    )
    cache_limit_gb: float = field(
        default=50.0,
        metadata={"help": "Of all features kept under HF_HOME. A picture of 384 pixels takes 0.9 MB in bf16."},
    )
    skip_dry_run: bool = field(
        default=False,
        metadata={
            "help": "Train at once. Default: first run all stages (loss, evaluation, report, card) on a few rows, so "
            "that what fails in one of them is found before training. Not if a run is resumed."
        },
    )
    allow_changed_settings: bool = field(
        default=False,
        metadata={
            "help": "Resume although settings, data or base checkpoint are not those that the checkpoint was saved "
            "with; the differences are listed. Default: refused."
        },
    )
    sample_steps: int = field(
        default=500,
        metadata={"help": "Log a few predictions every so many steps. 0: never; retrieval has none."},
    )

    def __post_init__(self) -> None:
        self.output_dir_was_given = self.output_dir is not None
        self.strategy_was_given = bool(self.eval_strategy or self.save_strategy)
        self._settle_strategies()
        self.check_values()
        self.require_effect()
        self._check_objects()
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps must be at least 1, or -1 to train num_train_epochs; found {self.max_steps}.")
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ValueError("save_strategy best saves after an evaluation. Add --eval_strategy epoch or steps.")
        for name in ("push_to_hub", "resume_from_checkpoint"):
            if not self.do_train and getattr(self, name):
                raise ValueError(
                    f"{name} has no effect with --do_train false, which evaluates model_name_or_path and saves no "
                    "weights. Leave it out; a checkpoint-... folder can be the --model_name_or_path."
                )
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise ValueError("dataloader_persistent_workers needs workers: set --dataloader_num_workers above 0.")
        needs_bf16 = self.bf16 and not self.use_cpu
        if needs_bf16 and not is_torch_bf16_gpu_available():
            raise ValueError(
                "bf16 needs a GPU that computes in bfloat16, and none is found. Leave it out (--bf16 false), or add "
                "--use_cpu to compute in bfloat16 on the CPU."
            )
        follows_metric = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        if follows_metric and self.eval_strategy == "no":
            raise ValueError(
                f"lr_scheduler_type {self.lr_scheduler_type} follows a metric. Add --eval_strategy epoch or steps."
            )
        # for load_best_model_at_end and these schedulers the Trainer takes the loss, for save_strategy best nothing
        takes_loss = self.load_best_model_at_end or follows_metric
        without_default = self.save_strategy == "best" or (takes_loss and "loss" not in self.metrics)
        if self.metrics and without_default:
            self.metric_for_best_model = self.metric_for_best_model or self.metrics[0]
        best = self.metric_for_best_model
        # a longer name is that of an answer type or a k
        if self.metrics and best and not best.removeprefix("eval_").startswith(self.metrics):
            raise ValueError(
                f"metric_for_best_model must be one of {', '.join(self.metrics)}; found {self.metric_for_best_model}."
            )
        if self.hub_model_id:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise ValueError(f"hub_model_id is OWNER/NAME, found {self.hub_model_id!r}. {error}") from error
        # torch warns in each epoch where there is nothing to pin for
        self.dataloader_pin_memory &= torch.cuda.is_available() and not self.use_cpu
        try:
            super().__post_init__()
        except (TypeError, AttributeError) as error:  # of an object with unknown keys, e.g. accelerator_config
            raise ValueError(
                f"The training settings hold an unknown key or a value of the wrong kind: {error}"
            ) from error
        if self.torch_compile_mode:
            modes = torch._inductor.list_mode_options()
            if self.torch_compile_mode not in modes:
                raise ValueError(
                    f"torch_compile_mode must be one of {', '.join(sorted(modes))}; found {self.torch_compile_mode!r}."
                )
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU, and this run is on the CPU. Leave it out, or use --bf16 --use_cpu.")
        if follows_metric and self.greater_is_better:
            # torch's default, min, would lower the learning rate while the score rises
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches:
            raise ValueError(
                "split_batches and dispatch_batches of accelerator_config cut a batch by its rows, and one of pictures "
                "and their questions cannot be. Leave them out: each process makes batches of its own."
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs and one process: start with `accelerate launch --multi_gpu` or `torchrun "
                "--nproc_per_node`, or hide the other cards with CUDA_VISIBLE_DEVICES=0."
            )
        try:
            # the Trainer would make them after the model is loaded
            for make_callback in get_reporting_integration_callbacks(self.report_to):
                make_callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(
                f"report_to takes tensorboard, trackio, wandb or none, each installed with pip: {error}"
            ) from error

    def _settle_strategies(self) -> None:
        """Evaluate and save at the same steps if the best checkpoint is to be the result.

        Raises: ValueError if it could not be: an evaluation of weights that are not kept may be the best one.
        """
        if not self.load_best_model_at_end:
            self.eval_strategy, self.save_strategy = self.eval_strategy or "no", self.save_strategy or "epoch"
            return
        if self.eval_strategy is None:
            self.eval_strategy = "epoch" if self.save_strategy in (None, "best") else self.save_strategy
        by_steps = self.eval_strategy == "steps"
        if by_steps:
            self.eval_steps = self.eval_steps or self.save_steps
        if self.save_strategy is None:
            self.save_strategy = self.eval_strategy
            if by_steps and self.save_steps == type(self).save_steps:
                self.save_steps = self.eval_steps
        together = self.eval_strategy == self.save_strategy and (not by_steps or self.eval_steps == self.save_steps)
        if self.eval_strategy == "no" or not (together or self.save_strategy == "best"):
            evaluated = f"{self.eval_strategy}{f' ({self.eval_steps})' if by_steps else ''}"
            saved = f"{self.save_strategy}{f' ({self.save_steps})' if self.save_strategy == 'steps' else ''}"
            raise ValueError(
                "load_best_model_at_end ends with the best checkpoint, so each one must be both evaluated and kept. "
                f"Found eval_strategy {evaluated} and save_strategy {saved}. Name one of the two alone, and the other "
                "follows; or add --load_best_model_at_end false, to end with the last weights."
            )

    def go_by_steps(self) -> None:
        """For a stream, which is one epoch: evaluate and save ten times in a run, if the best is to be the result."""
        if self.load_best_model_at_end and not self.strategy_was_given:
            self.eval_strategy, self.save_strategy = IntervalStrategy.STEPS, SaveStrategy.STEPS
            self.eval_steps = self.save_steps = 0.1  # of max_steps

    def _check_objects(self) -> None:
        """Raise ValueError for text in the place of an object, where no file is taken either."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str) or not (value.startswith("{") or name.endswith("_kwargs")):
                continue
            try:
                is_object = isinstance(json.loads(value), dict)
            except ValueError:
                is_object = False
            if not is_object:
                raise ValueError(f"{name} needs a JSON object like '{{\"name\": 1}}', found {value!r}.")

    def unread(self) -> dict[str, str]:
        cache = () if self.cache_image_features else ("cache_dtype", "cache_limit_gb")
        optim = str(self.optim.value)
        of_optim = ("adam_beta1", "adam_beta2", "adam_epsilon") if optim in NOT_ADAM else ()
        of_optim += ("optim_args",) if optim in ("adamw_torch", "adamw_torch_fused", "adafactor") else ()
        of_optim += () if optim.startswith(("galore", "apollo")) else ("optim_target_modules",)
        # gradient_checkpointing, the older name, is mirrored in both
        of_checkpointing = () if self.activation_checkpointing else ("activation_checkpointing_kwargs",)
        of_trackio = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
        hub = () if self.push_to_hub else ("hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision")
        by_step = {
            f"{what}_steps": f"without --{what}_strategy steps"
            for what in ("eval", "save", "logging")
            if getattr(self, f"{what}_strategy") != "steps"
        }
        return {
            **dict.fromkeys(cache, "without --cache_image_features"),
            **dict.fromkeys(hub, "without --push_to_hub"),
            **dict.fromkeys(of_checkpointing, "without --activation_checkpointing"),
            **dict.fromkeys(() if "trackio" in self.report_to else of_trackio, "without --report_to trackio"),
            **dict.fromkeys(of_optim, f"beside --optim {optim}"),
            **by_step,
            **({"eval_delay": "without --eval_strategy epoch or steps"} if self.eval_strategy == "no" else {}),
            **({} if self.resume_from_checkpoint else {"allow_changed_settings": "without --resume_from_checkpoint"}),
        }


def parse(
    *dataclass_types: type,
    argv: Sequence[str] | None = None,
    demo_config: str | Path | None = None,
) -> tuple[Any, ...]:
    """One object for each dataclass: defaults, then the YAML of --config, then the command line.

    Args:
        argv: flags; default the process's own.
        demo_config: YAML read first when neither a model nor data is named anywhere.
    Raises: ValueError for an unknown or malformed key or flag, and for what the dataclasses refuse.
    """
    parser = _Parser(dataclass_types, allow_abbrev=False)
    parser.add_argument("--config", action="append", help="YAML file of any of these arguments; flags override it.")
    flags = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    configs = first.parse_known_args(flags)[0].config
    if len(configs) > 1:
        raise ValueError(f"One --config is read, found {', '.join(configs)}. Put them together, or give flags.")
    settings = _settings_of_yaml(configs[0], parser) if configs else {}
    named = {name for name, value in settings.items() if value is not None}
    named |= {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}
    if "model_name_or_path" in named and not named & {"dataset_name", "questions_file"} and demo_config:
        raise ValueError("A model is named and no data. Give --dataset_name FOLDER_OR_HUB_ID, or --dataset_name demo.")
    if demo_config and not named & {"model_name_or_path", "dataset_name", "questions_file"}:
        logger.info(
            "No model and no data named: training the built-in small model on built-in pictures (%s).\n"
            "For a real checkpoint and your own pictures: accelerate launch --quiet %s --dataset_name FOLDER",
            *(demo_config, sys.argv[0]),
        )
        settings = _settings_of_yaml(demo_config, parser) | settings
    elif demo_config and _is_demo_model(settings, flags):
        demo_settings = _settings_of_yaml(demo_config, parser)
        taken = {name: demo_settings[name] for name in DEMO_MODEL_SETTINGS if name not in named}
        if taken:
            logger.info(
                "The demo model learns from nothing: taking %s from %s, where the recipe's are for a checkpoint.",
                *(" and ".join(f"{name} {value}" for name, value in taken.items()), demo_config),
            )
        settings = taken | settings
    settings_flags = _as_flags(settings, parser)
    # look_for_args_file=False: a file recipes/vqa.args would be read without a word
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        settings_flags + flags, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(_unknown_key(unknown[0], parser, "the command line"))
    # not in __post_init__: where rows are read, one value of several that belong together is replaced
    for part in parsed:
        part.require_effect()
        changed = changed_settings(part)
        for name, reason in part.unread().items():
            if name in changed:
                raise ValueError(f"{name} {changed[name]} has no effect {reason}. Leave it out, or change the other.")
    return tuple(parsed)


def changed_settings(part: Settings) -> dict[str, Any]:
    """Those fields that have another value than their default."""
    values = {entry: getattr(part, entry.name) for entry in dataclasses.fields(part)}
    return {entry.name: value for entry, value in values.items() if value != _default(entry)}


def read_text(setting: str, path: str) -> str:
    """The content of a text file that a setting names.

    Raises: ValueError for a file that is not there, is a folder, or is not text in UTF-8.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{setting} needs a text file; {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{setting} {path} is not text in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error


def start_recipe(main: Callable[[], None]) -> None:
    """Run main(); a user's mistake ends in one message and exit code 1, with a traceback only under --debug."""
    # the Trainer has a --debug of its own, which takes a value
    debug = any(
        flag == "--debug" and following.startswith("--")
        for flag, following in zip(sys.argv, [*sys.argv[1:], "--"], strict=True)
    )
    if debug:
        sys.argv.remove("--debug")
    first_process = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("blip_ft").setLevel(logging.INFO if first_process else logging.ERROR)
    # an exit, unlike a kill, removes temporary files
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
        if distributed.is_initialized():
            distributed.destroy_process_group()  # a process that ends first would break the connections of the others
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        logger.error("\n%s: %s\n(--debug shows where)", type(error).__name__, hide_secrets(str(error)))
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        # of the CPU torch says so in a RuntimeError, numpy and Python in a MemoryError
        if debug or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        logger.error(
            "\nThere is too little memory. Lower --per_device_train_batch_size and raise "
            "--gradient_accumulation_steps by as much, which gives the same steps; or add --gradient_checkpointing, "
            "--bf16, --use_peft, or take a smaller --image_size or --queue_size if these were raised. In evaluation "
            "lower --per_device_eval_batch_size. Checkpoints are kept: --resume_from_checkpoint last\n%s",
            str(error).partition("\n")[0] or type(error).__name__,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        release_folders()
        signal.signal(signal.SIGTERM, previous)


class _Parser(HfArgumentParser):
    def _add_dataclass_arguments(self, dataclass_type: type) -> None:
        before = len(self._actions)
        super()._add_dataclass_arguments(dataclass_type)
        for action in self._actions[before:]:
            if action.dest in dataclass_type.without_effect:
                action.help = argparse.SUPPRESS
            elif action.dest in dataclass_type.help_texts:
                action.help = dataclass_type.help_texts[action.dest]
            elif action.help is None:
                # a recipe that overrides a default need not repeat the help
                bases = (base.__dict__.get("__dataclass_fields__", {}) for base in dataclass_type.__mro__[1:])
                inherited = (fields[action.dest].metadata.get("help") for fields in bases if action.dest in fields)
                action.help = next(filter(None, inherited), None)

    def names(self) -> set[str]:
        """The fields of all dataclasses: what a YAML may hold."""
        return {entry.name for part in self.dataclass_types for entry in dataclasses.fields(part) if entry.init}

    def may_be_none(self, name: str) -> bool:
        hints = next(hints for part in self.dataclass_types if name in (hints := get_type_hints(part)))
        return type(None) in get_args(hints[name])

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.rstrip('.')}. {self.prog} --help lists the flags.")


class _Loader(yaml.BaseLoader):
    """Scalars as written, for 1e-4 is no string then and `no` no boolean; only a plain null is None, and "" is not.

    Refuses a key that stands twice: PyYAML would keep the last value without a word.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            # the parser takes both spellings of a flag
            name = str(self.construct_object(key, deep=True)).replace("-", "_")
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {name!r} stands twice, and one of the two would be lost. Remove one",
                    problem_mark=key.start_mark,
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


NULL = "tag:yaml.org,2002:null"
_Loader.add_implicit_resolver(NULL, re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_constructor(NULL, lambda loader, node: None)


def _settings_of_yaml(path: str | Path, parser: _Parser) -> dict[str, Any]:
    """The YAML's keys and values, all keys known."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ValueError(f"--config needs a YAML file that can be read; {path}: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path} is not valid YAML{line}: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content or {}, dict):
        raise ValueError(f"{path} must hold `key: value` lines, found a {type(content).__name__}.")
    for key, value in (content or {}).items():
        if key not in parser.names():
            raise ValueError(_unknown_key(str(key), parser, path))
        if value is None and not parser.may_be_none(key):
            raise ValueError(f"{path}: {key} needs a value. Leave the line out for the default.")
    return content or {}


def _as_flags(settings: dict[str, Any], parser: _Parser) -> list[str]:
    """The settings of a YAML as flags, so that one parser gives every value its type; None becomes the default."""
    flags = []
    for key, value in settings.items():
        if value is None:
            parser.set_defaults(**{key: None})  # no flag says None
            continue
        if isinstance(value, dict):
            value = json.dumps(_typed(value))
        if isinstance(value, list) and parser._option_string_actions[f"--{key}"].nargs is None:
            value = ",".join(map(str, value))  # freeze: [vision_model, text_encoder]
        # `=`: a value may begin with a dash
        flags += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return flags


# what the demo's YAML says of the model rather than of the demo's data
DEMO_MODEL_SETTINGS = ("learning_rate", "warmup_steps")


def _is_demo_model(settings: dict[str, Any], flags: list[str]) -> bool:
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--model_name_or_path", "--model-name-or-path", default=settings.get("model_name_or_path"))
    return only.parse_known_args(flags)[0].model_name_or_path == "demo"


def _typed(value: Any) -> Any:
    """What the parser gives no type, the values of lr_scheduler_kwargs and the like, as JSON and YAML read it."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {key: _typed(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_typed(entry) for entry in value]
    try:
        return json.loads(value)  # 1e-4 is a number, which it is not to YAML
    except ValueError:
        return yaml.safe_load(value)


# what people call a setting elsewhere -> its name here
ALIASES = {
    **dict.fromkeys(("lr", "rate", "base_lr"), "learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "max_epochs", "epoch"), "num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps", "num_train_steps", "max_train_steps"), "max_steps"),
    **dict.fromkeys(("batch_size", "bs", "train_batch_size", "per_device_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("eval_batch_size", "val_batch_size", "test_batch_size"), "per_device_eval_batch_size"),
    **dict.fromkeys(("grad_accum", "grad_accum_steps", "accumulation_steps"), "gradient_accumulation_steps"),
    **dict.fromkeys(
        ("model", "model_name", "model_id", "model_path", "checkpoint", "base_model"), "model_name_or_path"
    ),
    **dict.fromkeys(("dataset", "data", "data_path", "data_dir", "dataset_path", "train_file"), "dataset_name"),
    **dict.fromkeys(("eval_dataset", "eval_data", "validation_file", "val_data"), "eval_dataset_name"),
    **dict.fromkeys(("test_data", "test_dataset", "test_file"), "test_dataset_name"),
    **dict.fromkeys(("val_split", "validation_split"), "eval_split"),
    **dict.fromkeys(("val_fraction", "test_size", "val_size"), "eval_fraction"),
    **dict.fromkeys(("image_dir", "images_dir", "image_root", "img_dir"), "image_folder"),
    **dict.fromkeys(("lora", "peft", "use_lora"), "use_peft"),
    **dict.fromkeys(("lora_rank", "rank", "r"), "lora_r"),
    **dict.fromkeys(("target_modules", "lora_targets"), "lora_target_modules"),
    **dict.fromkeys(("4bit", "use_4bit", "qlora"), "load_in_4bit"),
    **dict.fromkeys(("8bit", "use_8bit"), "load_in_8bit"),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("grad_clip", "clip_grad", "clip_grad_norm", "gradient_clipping"), "max_grad_norm"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "schedule"), "lr_scheduler_type"),
    **dict.fromkeys(("optimizer", "optimiser"), "optim"),
    **dict.fromkeys(("output", "out", "out_dir", "save_dir", "output_path"), "output_dir"),
    **dict.fromkeys(("resume", "resume_from"), "resume_from_checkpoint"),
    **dict.fromkeys(("workers", "num_workers", "num_proc"), "dataloader_num_workers"),
    **dict.fromkeys(("beams", "num_beams", "beam_size"), "generation_num_beams"),
    **dict.fromkeys(("max_length", "max_new_tokens"), "generation_max_length"),
    **dict.fromkeys(("min_length", "min_new_tokens"), "generation_min_length"),
    **dict.fromkeys(("img_size", "resolution", "size"), "image_size"),
    **dict.fromkeys(("evaluation_strategy", "eval_every"), "eval_strategy"),
    **dict.fromkeys(("no_cuda", "cpu", "device"), "use_cpu"),
    **dict.fromkeys(("frozen", "freeze_layers", "freeze_vision"), "freeze"),
    **dict.fromkeys(("early_stopping", "early_stopping_patience", "patience"), "load_best_model_at_end"),
    **dict.fromkeys(("random_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("image", "image_path"), "images"),
    **dict.fromkeys(("fp32", "mixed_precision", "precision"), "bf16"),
}


def _unknown_key(key: str, parser: _Parser, where: str | Path) -> str:
    name = key.split("=")[0].lstrip("-").replace("-", "_")
    hidden = {entry for part in parser.dataclass_types for entry in part.without_effect}
    known = parser.names() - hidden
    # below 0.75 difflib takes --lr for lora_r
    nearest = [ALIASES[name]] if ALIASES.get(name) in known else difflib.get_close_matches(name, known, 1, cutoff=0.75)
    hint = f" Did you mean {nearest[0]}?" if nearest else f" {parser.prog} --help lists the keys there are."
    if nearest == ["load_best_model_at_end"] and name in ALIASES:
        hint = " There is no early stopping; --load_best_model_at_end keeps the best checkpoint."
    return f"{where} has the unknown key {name!r}.{hint}"
