"""The dataclasses that every recipe shares, and parse(): a YAML file first, the command line over it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import torch
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser, Seq2SeqTrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

logger = logging.getLogger(__name__)


def _check_ranges(arguments: Any, **ranges: tuple[float, float]) -> None:
    """Raise ValueError for a value outside its (least, most), and for infinity; None passes."""
    for name, (least, most) in ranges.items():
        value = getattr(arguments, name)
        if value is not None and not (least <= value <= most and value < math.inf):
            wanted = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise ValueError(f"{name} must be {wanted}, found {value}.")


@dataclass
class ModelArguments:
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

    def __post_init__(self) -> None:
        _check_ranges(self, image_size=(1, math.inf), label_smoothing=(0, 1), dropout=(0, 1))

    @property
    def hub_id(self) -> str | None:
        """The checkpoint's id where it lies on the Hub, None for a folder and for the demo."""
        name = self.model_name_or_path
        return None if name == "demo" or Path(name).exists() else name

    @property
    def frozen_parts(self) -> list[str]:
        return [name.strip() for name in (self.freeze or "").split(",") if name.strip()]


@dataclass
class PeftArguments:
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
        _check_ranges(self, lora_r=(1, math.inf), lora_dropout=(0, 1))
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("Choose one width: load_in_8bit and load_in_4bit are both on.")
        if (self.load_in_8bit or self.load_in_4bit) and not self.use_peft:
            bits = "load_in_8bit" if self.load_in_8bit else "load_in_4bit"
            raise ValueError(f"{bits} needs an adapter, for weights of few bits cannot be trained. Add --use_peft.")


@dataclass
class DataArguments:
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
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first rows only."})
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
        if self.dataset_name and self.questions_file:
            raise ValueError("Give dataset_name or questions_file, not both.")
        if self.eval_dataset_name and not self.dataset_name:
            raise ValueError("eval_dataset_name goes with dataset_name; for VQA v2 files give eval_questions_file.")
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
        at_least_one = (1, math.inf)
        _check_ranges(self, max_train_samples=at_least_one, max_eval_samples=at_least_one, shuffle_buffer=at_least_one)
        _check_ranges(self, max_bad_fraction=(0, 1))

    def require_end(self, training_args: BlipTrainingArguments) -> None:
        """Raise ValueError where rows are streamed and training_args do not go with that."""
        if self.streaming and training_args.max_steps < 1:
            raise ValueError("A stream has no end: --streaming needs --max_steps, the optimiser steps to train for.")
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


@dataclass
class VqaArguments:
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
        # [CLS], a word and [SEP]
        _check_ranges(self, max_question_tokens=(3, 512), max_answer_tokens=(3, 512), k_test=(1, math.inf))
        if (self.answer_mode == "rank") != (self.answer_list is not None):
            raise ValueError(
                "answer_mode rank and answer_list go together: give --answer_mode rank --answer_list FILE."
            )


@dataclass
class CaptioningArguments:
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
        _check_ranges(self, max_caption_tokens=(3, 512), generation_min_length=(0, 512))
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, found {self.repetition_penalty}; 1 changes nothing.")


@dataclass
class RetrievalArguments:
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

    def __post_init__(self) -> None:
        _check_ranges(
            self,
            queue_size=(0, math.inf),
            momentum=(0, 1),
            alpha=(0, 1),
            max_caption_tokens=(3, 512),
            k_test=(1, math.inf),
        )


@dataclass
class BlipTrainingArguments(Seq2SeqTrainingArguments):
    """The Trainer's arguments, with the defaults of the BLIP paper where it has one."""

    _argument_group_name = "Training"
    metrics: ClassVar[tuple[str, ...]] = ()  # what the recipe's evaluation gives; () is not checked

    output_dir: str | None = field(
        default=None, metadata={"help": "Default: outputs/<recipe>, or the next free outputs/<recipe>-2, -3, ..."}
    )
    # train_vqa.py: AdamW(lr, weight_decay=0.05) on all parameters, no clipping, cosine
    weight_decay: float = 0.05
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "0: no clipping, as the paper. The summed loss has norms over 10."}
    )
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 50
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
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
    sample_steps: int = field(
        default=500, metadata={"help": "Log a few questions with answer and prediction every so many steps. 0: never."}
    )

    def __post_init__(self) -> None:
        self.output_dir_was_given = self.output_dir is not None
        at_least_one = (1, math.inf)
        _check_ranges(
            self,
            per_device_train_batch_size=at_least_one,
            per_device_eval_batch_size=at_least_one,
            gradient_accumulation_steps=at_least_one,
            generation_num_beams=at_least_one,
            generation_max_length=(3, 512),  # the start, a token and [SEP]
            sample_steps=(0, math.inf),
            dataloader_num_workers=(0, math.inf),
            learning_rate=(0, math.inf),
            weight_decay=(0, math.inf),
            num_train_epochs=(1e-6, math.inf),
            cache_limit_gb=(0, math.inf),
            seed=(0, 2**32 - 1),
            data_seed=(0, 2**32 - 1),
        )
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ValueError("save_strategy best saves after an evaluation. Add --eval_strategy epoch or steps.")
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise ValueError("dataloader_persistent_workers needs workers: set --dataloader_num_workers above 0.")
        if self.generation_config:
            raise ValueError("generation_config is not read. Use --generation_max_length and --generation_num_beams.")
        # for load_best_model_at_end the Trainer takes the loss, for save_strategy best nothing
        without_default = self.save_strategy == "best" or (self.load_best_model_at_end and "loss" not in self.metrics)
        if self.metrics and without_default:
            self.metric_for_best_model = self.metric_for_best_model or self.metrics[0]
        best = self.metric_for_best_model
        # a longer name is that of an answer type or a k
        if self.metrics and best and not best.removeprefix("eval_").startswith(self.metrics):
            raise ValueError(
                f"metric_for_best_model must be one of {', '.join(self.metrics)}; found {self.metric_for_best_model}."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor smooths the wrong tokens for BLIP: the Trainer does not shift its labels. "
                "Use --label_smoothing, which goes into the model's own loss."
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns would drop image, question and answers. Leave it off.")
        if self.hub_token:
            raise ValueError(
                "hub_token is pickled into training_args.bin. Set the environment variable HF_TOKEN instead."
            )
        if self.hub_model_id:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise ValueError(f"hub_model_id is OWNER/NAME, found {self.hub_model_id!r}. {error}") from error
        # torch warns in each epoch where there is nothing to pin for
        self.dataloader_pin_memory &= torch.cuda.is_available() and not self.use_cpu
        super().__post_init__()
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
    parser.add_argument("--config", help="YAML file of any of these arguments; flags override it.")
    flags = list(sys.argv[1:] if argv is None else argv)
    config, _ = parser.parse_known_args(flags)
    settings = _flags_of_yaml(config.config, parser) if config.config else []
    named = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in settings + flags if flag.startswith("--")}
    if "model_name_or_path" in named and not named & {"dataset_name", "questions_file"} and demo_config:
        raise ValueError("A model is named and no data. Give --dataset_name FOLDER_OR_HUB_ID, or --dataset_name demo.")
    if demo_config and not named & {"model_name_or_path", "dataset_name", "questions_file"}:
        logger.info(
            "No model and no data named: training the built-in small model on built-in pictures (%s).\n"
            "For a real checkpoint and your own pictures: accelerate launch --quiet %s --dataset_name FOLDER",
            *(demo_config, sys.argv[0]),
        )
        settings = _flags_of_yaml(demo_config, parser) + settings
    # look_for_args_file=False: a file recipes/vqa.args would be read without a word
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        settings + flags, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(_unknown_key(unknown[0], parser, "the command line"))
    return tuple(parsed)


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
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        logger.error("\n%s: %s\n(--debug shows where)", type(error).__name__, error)
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        if debug:
            raise
        logger.error(
            "\nThe device has too little memory. Lower --per_device_train_batch_size and raise "
            "--gradient_accumulation_steps by as much, which gives the same steps; or add --gradient_checkpointing, "
            "--bf16, --use_peft. Checkpoints are kept: --resume_from_checkpoint last\n%s",
            error,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Parser(HfArgumentParser):
    def _add_dataclass_arguments(self, dataclass_type: type) -> None:
        # a recipe that overrides a default need not repeat the help
        for entry in dataclasses.fields(dataclass_type):
            if not entry.metadata:
                inherited = (base.__dataclass_fields__.get(entry.name) for base in dataclass_type.__mro__[1:-1])
                entry.metadata = next((other.metadata for other in inherited if other and other.metadata), {})
        super()._add_dataclass_arguments(dataclass_type)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. {self.prog} --help lists the flags.")


class _UniqueKeyLoader(yaml.BaseLoader):
    """Refuses a key that stands twice. PyYAML would keep the last value without a word."""

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


def _flags_of_yaml(path: str | Path, parser: HfArgumentParser) -> list[str]:
    """The YAML's keys as flags, so that one parser gives every value its type."""
    try:
        # BaseLoader leaves scalars as written: 1e-4 is no string then, and `no` no boolean
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"--config needs a YAML file that can be read; {path}: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path} is not valid YAML{line}: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content or {}, dict):
        raise ValueError(f"{path} must hold `key: value` lines, found a {type(content).__name__}.")
    flags = []
    for key, value in (content or {}).items():
        if f"--{key}" not in parser._option_string_actions:
            raise ValueError(_unknown_key(key, parser, path))
        if value in ("", "null", "~"):
            continue
        if isinstance(value, dict):
            value = json.dumps(_typed(value))
        if isinstance(value, list) and parser._option_string_actions[f"--{key}"].nargs is None:
            value = ",".join(map(str, value))  # freeze: [vision_model, text_encoder]
        # `=`: a value may begin with a dash
        flags += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return flags


def _typed(value: Any) -> Any:
    """What the parser gives no type, the values of lr_scheduler_kwargs and the like, as JSON and YAML read it."""
    if isinstance(value, dict):
        return {key: _typed(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_typed(entry) for entry in value]
    try:
        return json.loads(value)  # 1e-4 is a number, which it is not to YAML
    except ValueError:
        return yaml.safe_load(value)


def _unknown_key(key: str, parser: HfArgumentParser, where: str | Path) -> str:
    name = key.split("=")[0].lstrip("-").replace("-", "_")
    known = {
        option[2:] for option in parser._option_string_actions if option.startswith("--") and "-" not in option[2:]
    }
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]}?" if nearest else f" {parser.prog} --help lists the keys there are."
    return f"{where} has the unknown key {name!r}.{hint}"
