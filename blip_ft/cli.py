"""Parse a command line and a YAML file into argument objects; turn a user's mistake into one message."""

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
import traceback
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from accelerate.utils.memory import should_reduce_batch_size
from datasets import disable_progress_bars as disable_dataset_bars
from torch import distributed
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.utils.logging import disable_progress_bar as disable_model_bars

from blip_ft.arguments.aliases import ALIASES
from blip_ft.data.secrets import hide_secrets
from blip_ft.results.files import release_folders

logger = logging.getLogger(__name__)


def parse(
    *dataclass_types: type,
    argv: Sequence[str] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    demo_config: str | Path | None = None,
) -> tuple[Any, ...]:
    """One object for each dataclass: defaults, then the YAML of --config, then the command line.

    Args:
        argv: flags; default the process's own.
        config: path of a YAML file, or its content, in place of --config.
        demo_config: YAML that is read first if the user names neither a model nor data.
    Raises: ValueError for an unknown or malformed key or flag, and for what the dataclasses refuse.
    """
    parser = _Parser(dataclass_types)
    flags = list(sys.argv[1:] if argv is None else argv)
    parser.print_help_if_asked(flags)
    _refuse_bare_debug(flags)
    settings = _read_config(parser, flags, config)
    if demo_config:
        settings = _add_demo_settings(settings, flags, parser, demo_config)
    # look_for_args_file=False: a file recipes/vqa.args would be read silently
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        _as_flags(settings, parser) + flags, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(_unknown_key(unknown[0], parser, "the command line"))
    for part in parsed:
        part.require_effect()
        part.require_use()
    return tuple(parsed)


def read_text(setting: str, path: str) -> str:
    """The content of the text file at path.

    Args:
        setting: the setting that names the file, for messages.
    Raises: ValueError if the file does not exist, is a folder, or is not text in UTF-8.
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
    """Run main(); a user's mistake ends in one message and exit code 1, and in a traceback only with --traceback."""
    show_traceback = "--traceback" in sys.argv
    first_process = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("blip_ft").setLevel(logging.INFO if first_process else logging.ERROR)
    if not sys.stderr.isatty():  # each update of a bar is a line of a log file
        disable_model_bars()
        disable_dataset_bars()
    # unlike a kill, an exit removes temporary files
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
        if distributed.is_initialized():
            distributed.destroy_process_group()  # a process that ends first would break the connections of the others
    except (ValueError, OSError, ImportError) as error:
        if show_traceback:
            raise
        where = _last_frame_of_ours(error, main.__code__.co_filename)
        message = "\n%s: %s\n(raised at %s; --traceback shows the full traceback)"
        logger.error(message, type(error).__name__, hide_secrets(str(error)), where)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        # on the CPU, torch raises a RuntimeError, numpy and Python a MemoryError
        if show_traceback or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        logger.error(
            "\nThere is too little memory. Lower --per_device_train_batch_size and raise "
            "--gradient_accumulation_steps by the same factor: the steps stay the same. Or add "
            "--gradient_checkpointing, --bf16 or --use_peft, or reduce --image_size or --queue_size if you raised "
            "them. If evaluation failed, lower --per_device_eval_batch_size. Checkpoints are kept: resume with "
            "--resume_from_checkpoint last\n%s",
            str(error).partition("\n")[0] or type(error).__name__,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        release_folders()
        signal.signal(signal.SIGTERM, previous)


def _last_frame_of_ours(error: BaseException, recipe: str) -> str:
    """The last line of this package or of the recipe that led to the error, as blip_ft/data/sources.py:123."""
    package = Path(__file__).parent
    ours = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(package):
            ours = f"{file.relative_to(package.parent).as_posix()}:{line}"
        elif str(file) == recipe:
            ours = f"{file.parent.name}/{file.name}:{line}"
    return ours


class _Parser(HfArgumentParser):
    """Flags of the argument dataclasses; --help prints those that people set, --help-all prints every flag."""

    def __init__(self, dataclass_types: Sequence[type]) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, add_help=False)
        self.add_argument("--config", action="append", metavar="YAML", help="YAML file of settings. Flags override it.")
        self.add_argument("--traceback", action="store_true", help="Show the traceback of an error.")
        # print_help_if_asked answers both before anything else is parsed
        self.add_argument("--help", "-h", action="store_true", help="Show the flags that people set most.")
        self.add_argument("--help-all", "--help_all", action="store_true", help="Show all flags, explained in full.")

    def _add_dataclass_arguments(self, dataclass_type: type) -> None:
        before = len(self._actions)
        super()._add_dataclass_arguments(dataclass_type)
        for action in self._actions[before:]:
            action.help = _help_of(action, dataclass_type)
            if action.type is string_to_bool:  # also of a flag whose default is None
                action.nargs, action.const = "?", True

    def print_help_if_asked(self, flags: Sequence[str]) -> None:
        """Print help and exit, before files are read or values are checked."""
        self.everything = not {"--help-all", "--help_all"}.isdisjoint(flags)
        if self.everything or not {"-h", "--help"}.isdisjoint(flags):
            self.print_help()
            self.exit()

    def format_help(self) -> str:
        actions = {action.dest: action for action in reversed(self._actions)}  # the first of --bf16 and --no_bf16
        formatter = _Formatter(self.prog)
        formatter.add_text(f"usage: {self.prog} [--config YAML] [--flag value ...]")
        formatter.add_text(HOW_TO_READ)
        for title, names in self._help_groups().items():
            formatter.start_section(title)
            for name in names:
                action = copy(actions[name])
                action.help = action.help if self.everything else _first_sentence(action.help)
                formatter.add_argument(action)
            formatter.end_section()
        return formatter.format_help()

    def _help_groups(self) -> dict[str, list[str]]:
        """Title -> flags below it."""
        groups, refused = {"General": ["config", "help", "help_all", "traceback"]}, []
        for part in self.dataclass_types:
            title, names = part._argument_group_name, [entry.name for entry in dataclasses.fields(part) if entry.init]
            refused += [name for name in names if name in part.without_effect]
            names = [name for name in names if name not in part.without_effect]
            shown = {title: names} if part.help_groups is None else part.help_groups
            shown = {title: [name for name in group if name in names] for title, group in shown.items()}
            further = [name for name in names if not any(name in group for group in shown.values())]
            groups |= shown | ({f"{title}, further flags": further} if self.everything else {})
        groups |= {"Refused, because they have no effect here": refused} if self.everything else {}
        return {title: names for title, names in groups.items() if names}

    def names(self) -> set[str]:
        """The fields of all dataclasses: the keys that a YAML may have."""
        return {entry.name for part in self.dataclass_types for entry in dataclasses.fields(part) if entry.init}

    def may_be_none(self, name: str) -> bool:
        hints = next(hints for part in self.dataclass_types if name in (hints := get_type_hints(part)))
        return type(None) in get_args(hints[name])

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.rstrip('.')}. {self.prog} --help lists the flags.")


HOW_TO_READ = (
    "Each flag is followed by its default, or by N, TEXT or choices. A flag followed by nothing turns something "
    "on; true or false may follow. YAML files have the same names without dashes."
)


class _Formatter(argparse.HelpFormatter):
    """Shows a flag in one spelling, followed by its default or a placeholder."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag, value = action.option_strings[0], _simple_default(action)
        if value is None and action.nargs in (0, "?"):
            return flag
        if value is None:
            value = {int: "N", float: "N"}.get(action.type, action.metavar or "TEXT")
            value = "|".join(map(str, action.choices)) if action.choices and len(action.choices) < 10 else value
        return f"{flag} {value}" + (" ..." if action.nargs == "+" else "")


def _simple_default(action: argparse.Action) -> str | None:
    """The default as one word to show after the flag; None without a default, and if choices are shown there."""
    default = getattr(action.default, "value", action.default)  # of an Enum
    if default is None or default is False or default == [] or (action.choices and len(action.choices) < 10):
        return None
    return json.dumps(default) if isinstance(default, bool) or default == "" or " " in str(default) else str(default)


def _first_sentence(text: str) -> str:
    """The first sentence, and the one that names the default."""
    first, *others = re.split(r"(?<=[^.]\.) (?=[A-Z`])", text)
    return " ".join([first, *(sentence for sentence in others if sentence.startswith("Default"))])


def _help_of(action: argparse.Action, part: type) -> str:
    """Help for a flag of a dataclass, its default last; the reason for refusing it if it has no effect."""
    if action.dest in part.without_effect:
        return part.without_effect[action.dest]
    # a recipe that overrides a default need not repeat the help
    fields = [base.__dict__.get("__dataclass_fields__", {}).get(action.dest) for base in part.__mro__]
    helps = [field.metadata["help"] for field in fields if field is not None and "help" in field.metadata]
    text = part.help_texts.get(action.dest) or " ".join(helps[0].split())
    if action.choices:
        is_long = len(action.choices) > 9
        text += f" One of {', '.join(action.choices)}." if is_long else ""
        text += f" Default: {action.default}." if not is_long and action.default else ""
    return text


class _Loader(yaml.BaseLoader):
    """Reads scalars as written, so that 1e-4 can be a number and `no` a word. A plain null is None, "" is not.

    Refuses a key that appears twice: PyYAML would silently keep the last value.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            # the parser takes both spellings of a flag
            name = str(self.construct_object(key, deep=True)).replace("-", "_")
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {name!r} appears twice, and one of its values would be lost. Remove one",
                    problem_mark=key.start_mark,
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


NULL = "tag:yaml.org,2002:null"

_Loader.add_implicit_resolver(NULL, re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])

_Loader.add_constructor(NULL, lambda loader, node: None)


def _refuse_bare_debug(flags: Sequence[str]) -> None:
    for flag, following in pairwise([*flags, "--"]):
        if flag == "--debug" and following.startswith("--"):
            raise ValueError(
                "--debug needs a value: it is the Trainer's flag, as in --debug underflow_overflow. To see the "
                "traceback of an error, use --traceback."
            )


def _read_config(
    parser: _Parser, flags: Sequence[str], config: str | Path | Mapping[str, Any] | None
) -> dict[str, Any]:
    """The settings of the one config that the program or --config names; {} if there is none."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    paths = first.parse_known_args(flags)[0].config
    if isinstance(config, Mapping) and not paths:
        return _known_settings(config, parser, "The config")
    paths += [] if config is None else [config]
    if len(paths) > 1:
        raise ValueError(f"One --config is read, found {', '.join(map(str, paths))}. Merge them, or use flags.")
    return _settings_of_yaml(paths[0], parser) if paths else {}


def _settings_of_yaml(path: str | Path, parser: _Parser) -> dict[str, Any]:
    """The YAML's keys and values; all keys are known."""
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
        raise ValueError(f"{path} needs `key: value` lines, found a {type(content).__name__}.")
    return _known_settings(content or {}, parser, path)


def _known_settings(content: Mapping[str, Any], parser: _Parser, where: str | Path) -> dict[str, Any]:
    """The content itself. Raises: ValueError for an unknown key, and for None where a value is needed."""
    for key, value in content.items():
        if key not in parser.names():
            raise ValueError(_unknown_key(str(key), parser, where))
        if value is None and not parser.may_be_none(key):
            raise ValueError(f"{where}: {key} needs a value. Leave the line out for the default.")
    return dict(content)


def _as_flags(settings: dict[str, Any], parser: _Parser) -> list[str]:
    """The settings of a YAML as flags, so that one parser gives every value its type; None becomes the default."""
    flags = []
    for key, value in settings.items():
        if value is None:
            parser.set_defaults(**{key: None})  # no flag can say None
            continue
        if isinstance(value, Mapping):
            value = json.dumps(_typed(value))
        if isinstance(value, (list, tuple)) and parser._option_string_actions[f"--{key}"].nargs is None:
            value = ",".join(map(str, value))  # freeze: [vision_model, text_encoder]
        # `=`: a value may begin with a dash
        flags += [f"--{key}", *map(str, value)] if isinstance(value, (list, tuple)) else [f"--{key}={value}"]
    return flags


# those settings of the demo's YAML that suit its model, whatever the data
DEMO_MODEL_SETTINGS = ("learning_rate", "warmup_steps")


def _add_demo_settings(
    settings: dict[str, Any], flags: list[str], parser: _Parser, demo_config: str | Path
) -> dict[str, Any]:
    """Settings with those of demo_config below them: all if no model and no data are named, some for the demo model."""
    named = {name for name, value in settings.items() if value is not None}
    named |= {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}
    names_data = bool(named & {"dataset_name", "questions_file"})
    if "model_name_or_path" in named and not names_data:
        raise ValueError("A model is given, but no data. Add --dataset_name FOLDER_OR_HUB_ID, or --dataset_name demo.")
    demo_settings = _settings_of_yaml(demo_config, parser)
    if not names_data:
        logger.info(
            "No model and no data given: training the built-in small model on built-in images (%s).\n"
            "For a real checkpoint and your own images: accelerate launch --quiet %s --dataset_name FOLDER",
            *(demo_config, sys.argv[0]),
        )
        return demo_settings | settings
    if not _is_demo_model(settings, flags):
        return settings
    taken = {name: demo_settings[name] for name in DEMO_MODEL_SETTINGS if name not in named}
    if taken:
        logger.info(
            "The demo model is randomly initialized: taking %s from %s, since the recipe's defaults suit a pretrained "
            "checkpoint.",
            *(" and ".join(f"{name} {value}" for name, value in taken.items()), demo_config),
        )
    return taken | settings


def _is_demo_model(settings: dict[str, Any], flags: list[str]) -> bool:
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--model_name_or_path", "--model-name-or-path", default=settings.get("model_name_or_path"))
    return only.parse_known_args(flags)[0].model_name_or_path == "demo"


def _typed(value: Any) -> Any:
    """Values that the parser gives no type, as those of lr_scheduler_kwargs, typed as JSON and YAML would."""
    if isinstance(value, Mapping):
        return {key: _typed(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_typed(entry) for entry in value]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)  # 1e-4 is a number in JSON and a string in YAML
    except ValueError:
        return yaml.safe_load(value)


def _unknown_key(key: str, parser: _Parser, where: str | Path) -> str:
    name = key.split("=")[0].lstrip("-").replace("-", "_")
    hidden = {entry for part in parser.dataclass_types for entry in part.without_effect}
    known = parser.names() - hidden
    # below 0.75 difflib would suggest lora_r for lr
    nearest = [ALIASES[name]] if ALIASES.get(name) in known else difflib.get_close_matches(name, known, 1, cutoff=0.75)
    hint = f" Did you mean {nearest[0]}?" if nearest else f" {parser.prog} --help-all lists all keys."
    return f"{where} has the unknown key {key.split('=')[0].lstrip('-')!r}.{hint}"
