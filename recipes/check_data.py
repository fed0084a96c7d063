"""Check a data set without training or loading a model, and say what would be trained on.

    python recipes/check_data.py --dataset_name FOLDER
        questions where the rows have a column of questions, else captions
    python recipes/check_data.py --config recipes/configs/captioning_base.yaml --dataset_name FILE --task captioning
        takes the YAML and the flags of any recipe

Rows that cannot be used are listed in bad_rows.jsonl, in output_dir where that is given, else here. The exit code is 0
where a recipe would train. With --streaming the data set is read as a whole all the same.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

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
from blip_ft.data.tables import number_images
from blip_ft.metrics.vqa import answer_type, most_frequent_answer


@dataclass
class AnyTask(VqaArguments, CaptioningArguments, RetrievalArguments):
    """The keys of all recipes, so that each one's YAML is understood."""

    _argument_group_name = "Tasks"

    task: Literal["vqa", "captioning", "retrieval"] | None = field(
        default=None,
        metadata={"help": "What the rows are for. Default: vqa, or captioning if they have captions only."},
    )

    def unread(self) -> dict[str, str]:
        return {}  # a YAML of any recipe is right here


@dataclass
class Training(BlipTrainingArguments):
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Rows a step and device. Default: that of the task's recipe."}
    )


# task -> the default of its recipe
BATCH_SIZES = {"vqa": 16, "captioning": 32, "retrieval": 32}


def main() -> None:
    # nothing is trained: without --use_cpu `bf16: true` is refused where there is no GPU
    _, data_args, task_args, _, training_args = parse(
        *(ModelArguments, DataArguments, AnyTask, PeftArguments, Training),
        argv=[*sys.argv[1:], "--use_cpu"],
    )
    data_args = replace(data_args, streaming=False)
    bad_rows_file = Path(training_args.output_dir if training_args.output_dir_was_given else ".") / "bad_rows.jsonl"
    bad_rows_file.unlink(missing_ok=True)
    columns = read_column_names(data_args)
    task = task_args.task or task_of(columns, data_args)
    require_columns_of(task, columns, data_args)
    load = load_vqa if task == "vqa" else load_captions
    try:
        train, held_out = load(data_args, bad_rows_file, training_args.seed)
    finally:
        print_bad_rows(bad_rows_file)

    print(f"\nWhat recipes/{task}.py would read of {data_args.label}:\n")
    print(f"{'':12}{'rows':>10}{'images':>10}")
    for name, rows in (("train", train), ("evaluate", held_out)):
        print(f"{name:12}{len(rows):10}{len(np.unique(number_images(rows))):10}")
    print(f"\n{'words':12}{'median':>10}{'95 %':>10}{'largest':>10}")
    if task == "vqa":
        answers = train["answers"][:]
        print_lengths("question", train["question"][:])
        print_lengths("answer", [answer for given in answers for answer in given])
        types = train["answer_type"][:] if "answer_type" in train.column_names else map(answer_type, answers)
        print_shares("\nanswer types", Counter(types))
        print_shares("most frequent answers", Counter(map(most_frequent_answer, answers)))
    else:
        print_lengths("caption", train.captions())
    print("\nfirst rows")
    for position in range(min(3, len(train))):
        row = train[position]
        print("  " + ", ".join(f"{name}: {value!r:.80}" for name, value in row.items() if name != "image"))
    batch_size = training_args.per_device_train_batch_size or BATCH_SIZES[task]
    step = batch_size * training_args.gradient_accumulation_steps
    require_whole_batch(len(train), step)
    print(f"\nThis can be trained on, with at most {len(train)} rows a step.")


def task_of(columns: list[str], data_args: DataArguments) -> str:
    has_captions = {data_args.caption_column, "caption", "captions"} & set(columns)
    return "captioning" if has_captions and data_args.question_column not in columns else "vqa"


def require_columns_of(task: str, columns: list[str], data_args: DataArguments) -> None:
    """Raise ValueError if the rows are for the other kind of task."""
    fits = task_of(columns, data_args)
    if fits == "captioning" and task == "vqa":
        raise ValueError(
            f"The rows have captions and no column {data_args.question_column}. Check them with --task captioning or "
            "--task retrieval; if another column has the questions, name it: --question_column NAME"
        )
    captions = {data_args.caption_column, "caption", "captions"} & set(columns)
    if task != "vqa" and not captions and data_args.question_column in columns:
        raise ValueError(
            "The rows have questions and no captions. Check them with --task vqa; if another column has the captions, "
            "name it: --caption_column NAME"
        )


def print_bad_rows(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    print(f"{len(rows)} rows cannot be used" + (f", all listed in {file}:" if rows else "."))
    # "image cannot be read: FileNotFoundError: ...": what follows is the row's own
    reasons = Counter(": ".join(row["reason"].split(": ")[:2]) for row in rows)
    for reason, number in reasons.most_common():
        first = next(row for row in rows if row["reason"].startswith(reason))
        print(f"{number:8}  {reason:.100}, first {first['split']} row {first['row']} ({first['image_id']:.60})")


def print_lengths(name: str, texts: list[str]) -> None:
    lengths = [len(text.split()) for text in texts]
    print(f"{name:12}{np.median(lengths):10.4g}{np.percentile(lengths, 95):10.4g}{max(lengths):10}")


def print_shares(name: str, counts: Counter) -> None:
    total = counts.total()
    print(f"{name}: " + ", ".join(f"{value} {number / total:.1%}" for value, number in counts.most_common(10)))


if __name__ == "__main__":
    start_recipe(main)
