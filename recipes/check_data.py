"""Check a data set and print what would be trained on, without loading a model.

    python recipes/check_data.py --dataset_name FOLDER
        checks questions if the rows have a column of questions, otherwise captions
    python recipes/check_data.py --config recipes/configs/captioning_base.yaml --dataset_name FILE --task captioning
        accepts the YAML and the flags of any recipe

Rows that cannot be used are listed in bad_rows.jsonl in output_dir, or in the current folder if output_dir is not
given. The exit code is 0 if a recipe would train. With --streaming, the whole data set is read nevertheless.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset
from transformers.hf_argparser import HfArg

from blip_ft.arguments import (
    BlipTrainingArguments,
    CaptioningArguments,
    DataArguments,
    ModelArguments,
    PeftArguments,
    RetrievalArguments,
    VqaArguments,
)
from blip_ft.cli import parse, start_recipe
from blip_ft.data.loading import load_captions, load_vqa
from blip_ft.data.sampling import require_whole_batch
from blip_ft.data.splits import read_column_names
from blip_ft.data.tables import CaptionRows, number_images
from blip_ft.metrics.vqa import answer_type, most_frequent_answer


# --help leaves out the flags that only training reads; they are parsed so that each recipe's YAML is understood
@dataclass
class Model(ModelArguments):
    help_groups = {}


@dataclass
class Peft(PeftArguments):
    help_groups = {}


@dataclass
class AnyTask(VqaArguments, CaptioningArguments, RetrievalArguments):
    """The keys of all recipes, so that each one's YAML is understood."""

    _argument_group_name = "Tasks"
    help_groups = {"Task": ("task",)}

    task: Literal["vqa", "captioning", "retrieval"] | None = HfArg(
        default=None, help="Task to check the rows for. Default: vqa, or captioning if rows have only captions."
    )

    def unread(self) -> dict[str, str]:
        return {}  # the settings of another task are no mistake


@dataclass
class Training(BlipTrainingArguments):
    help_groups = {
        "Training": ("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
    }
    output_dir: str | None = HfArg(default=None, help="Folder for bad_rows.jsonl. Default: the current folder.")
    per_device_train_batch_size: int | None = HfArg(
        default=None, help="Training rows per device and batch. Default: that of the task's recipe."
    )


# task -> default batch size of its recipe
BATCH_SIZES = {"vqa": 16, "captioning": 32, "retrieval": 32}


def main() -> None:
    # nothing is trained; without --use_cpu, `bf16: true` is refused on a machine without a GPU
    _, data_args, task_args, _, training_args = parse(
        *(Model, DataArguments, AnyTask, Peft, Training),
        argv=[*sys.argv[1:], "--use_cpu"],
    )
    data_args = replace(data_args, streaming=False)
    bad_rows_file = Path(training_args.output_dir if training_args.output_dir_was_given else ".") / "bad_rows.jsonl"
    bad_rows_file.unlink(missing_ok=True)
    columns = read_column_names(data_args)
    task = task_args.task or choose_task(columns, data_args)
    require_columns(task, columns, data_args)
    load = load_vqa if task == "vqa" else load_captions
    try:
        train, held_out = load(data_args, bad_rows_file, training_args.seed)
    finally:
        print_bad_rows(bad_rows_file)

    print(f"\nrecipes/{task}.py would read these rows of {data_args.label}:\n")
    print_counts({"train": train, "evaluate": held_out})
    if task == "vqa" and len(data_args.sources()) > 1:  # captions of an image are merged
        print_sources(train, data_args.sources())
    print_questions(train) if task == "vqa" else print_captions(train)
    print_first_rows(train)
    batch_size = training_args.per_device_train_batch_size or BATCH_SIZES[task]
    require_whole_batch(len(train), batch_size * training_args.gradient_accumulation_steps)
    print(f"\nTraining is possible, with at most {len(train)} rows per step.")


def choose_task(columns: list[str], data_args: DataArguments) -> str:
    """captioning if the rows have captions but no questions, otherwise vqa."""
    has_captions = {data_args.caption_column, "caption", "captions"} & set(columns)
    return "captioning" if has_captions and data_args.question_column not in columns else "vqa"


def require_columns(task: str, columns: list[str], data_args: DataArguments) -> None:
    """Raise ValueError if the rows are for another task."""
    if task == "vqa" and choose_task(columns, data_args) == "captioning":
        raise ValueError(
            f"The rows have captions, but no column {data_args.question_column}. Check them with --task captioning or "
            "--task retrieval. If another column has the questions, set --question_column NAME"
        )
    captions = {data_args.caption_column, "caption", "captions"} & set(columns)
    if task != "vqa" and not captions and data_args.question_column in columns:
        raise ValueError(
            "The rows have questions, but no captions. Check them with --task vqa. If another column has the captions, "
            "set --caption_column NAME"
        )


def print_bad_rows(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    print(f"{len(rows)} rows cannot be used" + (f", all listed in {file}:" if rows else "."))
    # in "image cannot be read: FileNotFoundError: ...", the last part differs from row to row
    reasons = Counter(": ".join(row["reason"].split(": ")[:2]) for row in rows)
    for reason, number in reasons.most_common():
        first = next(row for row in rows if row["reason"].startswith(reason))
        print(f"{number:8}  {reason:.100}, first in {first['split']} row {first['row']} ({first['image_id']:.60})")


def print_counts(parts: dict[str, Dataset | CaptionRows]) -> None:
    print(f"{'':12}{'rows':>10}{'images':>10}")
    for name, rows in parts.items():
        print(f"{name:12}{len(rows):10}{len(np.unique(number_images(rows))):10}")


def print_sources(rows: Dataset, sources: Iterable[str]) -> None:
    """The share of each source in the rows to train on; question ids begin with its name."""
    ids = rows["question_id"][:]
    counts = Counter({name: sum(one.startswith(f"{name}:") for one in ids) for name in sources})
    print_shares("\nsources to train on", counts)


def print_questions(rows: Dataset) -> None:
    answers = rows["answers"][:]
    texts = {"question": rows["question"][:], "answer": [answer for given in answers for answer in given]}
    print_lengths(texts)
    types = rows["answer_type"][:] if "answer_type" in rows.column_names else map(answer_type, answers)
    print_shares("\nanswer types", Counter(types))
    print_shares("most frequent answers", Counter(map(most_frequent_answer, answers)))
    if "weight" in rows.column_names:
        print_shares("weights of rows", Counter(rows["weight"][:]))


def print_captions(rows: CaptionRows) -> None:
    print_lengths({"caption": rows.captions()})


def print_lengths(texts: dict[str, list[str]]) -> None:
    print(f"\n{'words':12}{'median':>10}{'95 %':>10}{'maximum':>10}")
    for name, column in texts.items():
        lengths = [len(text.split()) for text in column]
        print(f"{name:12}{np.median(lengths):10.4g}{np.percentile(lengths, 95):10.4g}{max(lengths):10}")


def print_shares(name: str, counts: Counter) -> None:
    total = counts.total()
    print(f"{name}: " + ", ".join(f"{value} {number / total:.1%}" for value, number in counts.most_common(10)))


def print_first_rows(rows: Dataset | CaptionRows) -> None:
    print("\nfirst rows")
    for position in range(min(3, len(rows))):
        row = rows[position]
        print("  " + ", ".join(f"{name}: {value!r:.80}" for name, value in row.items() if name != "image"))


if __name__ == "__main__":
    start_recipe(main)
