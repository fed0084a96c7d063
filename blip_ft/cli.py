"""From a command line and a YAML file to argument objects, and from a mistake to one message."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from accelerate.utils.memory import should_reduce_batch_size
from torch import distributed
from transformers import HfArgumentParser

from blip_ft.arguments import changed_settings
from blip_ft.data.secrets import hide_secrets
from blip_ft.results.files import release_folders

logger = logging.getLogger(__name__)


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
            "No model and no data named: training the built-in small model on built-in images (%s).\n"
            "For a real checkpoint and your own images: accelerate launch --quiet %s --dataset_name FOLDER",
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
