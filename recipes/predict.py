"""Answer questions about images, write captions, or rank texts for images, with a trained checkpoint.

    python recipes/predict.py --model_name_or_path outputs/vqa --images cat.jpg --question "what is it?"
        takes images and folders of images; a captioning checkpoint needs no --question
    accelerate launch --quiet recipes/predict.py --model_name_or_path outputs/vqa --dataset_name FOLDER_OR_FILE
        reads the same data as training, with references or without
    accelerate launch --quiet recipes/predict.py --model_name_or_path outputs/vqa --format vqa \\
        --questions_file v2_OpenEnded_mscoco_test2015_questions.json --image_folder coco
        also writes results.json in the format of the evaluation server

The checkpoint determines the task. Writes predictions.jsonl and report.html, scores.json if the data has references,
and bad_rows.jsonl if an image cannot be read. To resume a run that was stopped, start the same command again.
"""

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import ProcessorMixin
from transformers.hf_argparser import HfArg

from blip_ft.arguments import Settings, changed_settings
from blip_ft.arguments.families import family_of, fill_defaults
from blip_ft.arguments.images import ImageArguments
from blip_ft.cli import parse, read_text, start_recipe
from blip_ft.data.images import encode_row_images, open_image
from blip_ft.data.loading import load_to_predict
from blip_ft.data.sampling import share_of_process
from blip_ft.data.sources import list_images
from blip_ft.data.tables import number_images, to_json
from blip_ft.data.text_formats import Texts, texts_of_checkpoint
from blip_ft.data.texts import clean_caption, encode_texts
from blip_ft.modeling import inference
from blip_ft.modeling.checkpoint_files import longest_text, require_positions
from blip_ft.modeling.registry import task_of_model
from blip_ft.models import load_model
from blip_ft.results import predictions
from blip_ft.results.parts import Line, Predict, predict_batches, report_unreadable, require_readable, settings_of
from blip_ft.results.report import THUMBNAIL_PIXELS, write_report
from blip_ft.training.signals import explain_lost_worker

logger = logging.getLogger("blip_ft.predict")

SHOWN = 10  # predictions on the screen

# settings that a resumed run may change
FREE = ("output_dir", "format", "per_device_eval_batch_size", "dataloader_num_workers", "use_cpu")


@dataclass
class Data(ImageArguments):
    """Which images, and the names of their columns."""

    help_texts = {
        "questions_file": "Official VQA v2 questions JSON to answer.",
        "annotations_file": "Official VQA v2 annotations JSON, to score the answers.",
        "eval_split": "Split to predict on. Default: all rows.",
        "max_eval_samples": "Predict on the first N rows only.",
    }
    question: str | None = HfArg(default=None, help="Question about every image, instead of the data's questions.")
    texts: str | None = HfArg(
        default=None, help="File of texts to rank for each image, one per line. Default: the data's captions."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.question is not None and not self.question.strip():
            raise ValueError('--question is empty. Give --question "what is it?", or leave it out.')


@dataclass
class Prediction(Settings):
    """How to predict, and what to write."""

    _argument_group_name = "Prediction"

    model_name_or_path: str = HfArg(help="Hub id or folder of a checkpoint or PEFT adapter.")
    task: Literal["vqa", "captioning"] | None = HfArg(
        default=None, help="Task of a checkpoint of BLIP-2 or InstructBLIP. Default: that of its training, else vqa."
    )
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the checkpoint.")
    allow_pickle: bool = HfArg(default=False, help="Also load weights that exist only as .bin.")
    output_dir: str | None = HfArg(
        default=None,
        help="Folder for results. Default: outputs/predict, or the next free outputs/predict-2, -3, ...",
    )
    format: Literal["vqa", "coco"] | None = HfArg(
        default=None, help="Also write results.json. With vqa official VQA results, with coco COCO caption results."
    )
    per_device_eval_batch_size: int = HfArg(default=64, help="Questions or images per device and batch.")
    dataloader_num_workers: int = HfArg(
        default_factory=lambda: min(4, os.cpu_count() or 1),
        help="Processes that read and resize images. By default one per core, at most 4.",
    )
    bf16: bool = HfArg(default=False, help="Mixed precision in bfloat16.")
    use_cpu: bool = HfArg(default=False, help="Use the CPU even if there is a GPU.")
    question_prompt: str | None = HfArg(
        default=None, help="Text that the model reads, with {} for the question. Default: as in training."
    )
    clean_questions: bool | None = HfArg(default=None, help="Clean questions as the original. Default: as in training.")
    max_question_tokens: int | None = HfArg(
        default=None, help="Truncate longer questions. Default: that of the model's recipe."
    )
    generation_max_length: int | None = HfArg(
        default=None, help="Maximum tokens of an answer or caption. Default: that of the model's recipe."
    )
    generation_min_length: int | None = HfArg(
        default=None, help="Minimum tokens of a caption. Default: that of the model's recipe."
    )
    generation_num_beams: int | None = HfArg(
        default=None, help="Beams of beam search. Default: that of the model's recipe."
    )
    repetition_penalty: float | None = HfArg(
        default=None, help="Above 1, make repeated words less likely. Default: that of the model's recipe."
    )
    prompt: str | None = HfArg(
        default=None, help="Text before every caption; it is not part of the result. Default: as in training."
    )
    max_caption_tokens: int = HfArg(default=35, help="Truncate longer texts to rank.")
    clean_captions: bool = HfArg(default=True, help="Rank texts in lowercase, without most punctuation.")
    k_test: int = HfArg(default=256, help="Texts per image that the matching head ranks again.")
    top_texts: int = HfArg(default=10, help="Texts per image that are written.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path == "demo":
            raise ValueError(
                "The demo model is randomly initialized. Train it with a recipe, and pass the recipe's output_dir."
            )

    def unread(self) -> dict[str, str]:
        is_local = Path(self.model_name_or_path).exists()
        return {"model_revision": "without a checkpoint of the Hub"} if is_local else {}


# setting -> the tasks that read it; all tasks read the other settings
OF_TASKS = {
    **dict.fromkeys(
        ("question", "question_column", "answer_column", "max_question_tokens", "question_prompt", "clean_questions"),
        ("vqa",),
    ),
    "caption_column": ("conditional_generation", "image_text_retrieval"),
    **dict.fromkeys(("prompt", "generation_min_length", "repetition_penalty"), ("conditional_generation",)),
    **dict.fromkeys(("generation_max_length", "generation_num_beams"), ("vqa", "conditional_generation")),
    **dict.fromkeys(
        ("texts", "max_caption_tokens", "clean_captions", "k_test", "top_texts"), ("image_text_retrieval",)
    ),
}


def main() -> None:
    args, data_args = parse(Prediction, Data)
    given_texts = read_text("texts", data_args.texts).splitlines() if data_args.texts else None
    state = PartialState(cpu=args.use_cpu)
    settings = {"revision": args.model_revision, "allow_pickle": args.allow_pickle, "merge": True}
    wanted = {"vqa": "vqa", "captioning": "conditional_generation"}.get(args.task)
    loaded = load_model(args.model_name_or_path, task=wanted, device=state.device, **settings)
    model, processor = loaded["model"], loaded["processor"]
    task = task_of_model(model)
    require_settings_of_task(args, data_args, task)
    fill_defaults(family_of(model.config), task, longest_text(model.config), args)
    require_positions(model.config, args)
    text_format = None if task == "image_text_retrieval" else settle_texts(model, processor, args, task)
    rows, bad_rows = read_rows(data_args, task)
    ids = predictions.official_ids(args.format, task, rows) if args.format else []
    texts = texts_to_rank(given_texts, rows) if task == "image_text_retrieval" else []

    read = [texts, *(rows[name][:] for name in ("image_id", "question") if name in rows.column_names)]
    settings = settings_of((data_args, args), FREE, [args.model_name_or_path], read)
    folder, done = predictions.OUTPUT.settle_folder(args.output_dir, settings)
    share = share_of_process(number_images(rows), state.process_index, state.num_processes, done)
    size = args.per_device_eval_batch_size
    batches = [share[start : start + size] for start in range(0, len(share), size)]
    encode = partial(
        collate, processor=processor, text_format=text_format, max_question_tokens=args.max_question_tokens
    )
    with torch.autocast(state.device.type, torch.bfloat16, enabled=args.bf16), torch.no_grad():
        predict = make_predict(model, processor, args, task, text_format, texts)
        lines = predict_batches(rows, batches, encode, predict, args.dataloader_num_workers)
        with explain_lost_worker(lambda: "Start the same command again: it resumes."):
            predictions.OUTPUT.append_part(folder, lines)
    state.wait_for_everyone()
    if state.is_main_process:
        predicted = predictions.OUTPUT.read_parts(folder)
        lines = predictions.build_lines(rows, [predicted[position] for position in range(len(rows))])
        write_results(folder, args, data_args, rows, lines, bad_rows, task, ids)


def require_settings_of_task(args: Prediction, data_args: Data, task: str) -> None:
    """Raise ValueError for a setting that has no effect on this task."""
    given = changed_settings(args) | changed_settings(data_args)
    if unread := [name for name in given if task not in OF_TASKS.get(name, (task,))]:
        raise ValueError(
            f"--{unread[0]} needs a checkpoint for {' or '.join(OF_TASKS[unread[0]])}; this one is for {task}."
        )


def settle_texts(model: Any, processor: ProcessorMixin, args: Prediction, task: str) -> Texts:
    """How the model reads and writes texts, with the prompt of training unless another one is given.

    Raises: ValueError if the prompt leaves no room for a question or a caption.
    """
    name = "question_prompt" if task == "vqa" else "prompt"
    texts = texts_of_checkpoint(processor, model.config, task, getattr(args, name), args.clean_questions)
    setattr(args, name, texts.prompt)
    if task == "conditional_generation":
        texts.require_room_for_captions(None, args.generation_max_length, args.generation_min_length)
    else:
        texts.require_room_for_questions(args.max_question_tokens, args.generation_max_length)
    return texts


def read_rows(args: Data, task: str) -> tuple[Dataset, list[Line]]:
    """Rows, with references if the data has them, and descriptions of the rows that cannot be used."""
    asks = task == "vqa"
    if args.images and asks and not args.question:
        raise ValueError('There is no question. Give --question "what is it?", or --dataset_name with questions.')
    if args.images:
        rows, bad_rows = list_images(args.images), []
    else:
        rows, bad_rows = load_to_predict(args, "vqa" if asks and not args.question else "images")
    if args.question:
        rows = rows.select_columns(["image", "image_id"]).add_column("question", [args.question] * len(rows))
        rows = rows.add_column("question_id", rows["image_id"][:])
    return rows, bad_rows


def texts_to_rank(given: list[str] | None, rows: Dataset) -> list[str]:
    """The distinct texts: the given ones, or by default the captions of the rows."""
    if given is None:
        given = [text for own in rows["captions"][:] for text in own] if "captions" in rows.column_names else []
    texts = list(dict.fromkeys(filter(None, map(str.strip, given))))
    if not texts:
        raise ValueError("There is no text to rank. Give --texts FILE with one text per line, or data with captions.")
    return texts


def make_predict(
    model: Any, processor: ProcessorMixin, args: Prediction, task: str, text_format: Texts | None, texts: list[str]
) -> Predict:
    """The function that predicts for a batch, as in results/predictions.py.

    The probability of an answer or caption is that of its tokens (inference.answer). The score of a text is cosine +
    matching logit; it has no bounds, and can only be compared between texts for one image.

    texts: to rank.
    """
    tokenizer = processor.tokenizer
    cleaned = [clean_caption(text) for text in texts] if args.clean_captions else texts
    tokens = encode_texts(cleaned, tokenizer, args.max_caption_tokens) if texts else {}
    features = inference.embed_texts(model, **tokens) if texts else None

    def answer(batch: dict[str, torch.Tensor], positions: list[int]) -> list[Line]:
        generation = text_format.generation(args.generation_max_length, args.generation_num_beams)
        answers = inference.answer(model, text_format, inference.encode_questions(model, batch), generation)
        return [{"prediction": text, "probability": number} for text, number in zip(*answers, strict=True)]

    def caption(batch: dict[str, torch.Tensor], positions: list[int]) -> list[Line]:
        generation = text_format.generation(
            *(args.generation_max_length, args.generation_num_beams),
            min_length=args.generation_min_length,
            repetition_penalty=args.repetition_penalty,
        )
        captions = inference.caption(model, text_format, batch["pixel_values"], generation)
        return [{"prediction": text, "probability": number} for text, number in zip(*captions, strict=True)]

    def rank(batch: dict[str, torch.Tensor], positions: list[int]) -> list[Line]:
        ranked = inference.rank_texts(model, batch["pixel_values"], features, **tokens, k=args.k_test)
        best = [
            [{"text": texts[place], "score": score} for place, score in ranking[: args.top_texts]] for ranking in ranked
        ]
        return [{"prediction": own[0]["text"], "score": own[0]["score"], "texts": own} for own in best]

    return {"vqa": answer, "conditional_generation": caption, "image_text_retrieval": rank}[task]


def collate(
    rows: list[Line], processor: ProcessorMixin, text_format: Texts | None, max_question_tokens: int | None
) -> dict[str, torch.Tensor]:
    """A batch with each image once, and with questions if the rows have them."""
    batch = encode_row_images(rows, processor.image_processor)
    if "question" in rows[0]:
        batch |= text_format.encode_questions([row["question"] for row in rows], max_question_tokens)
    return batch


def write_results(
    folder: Path,
    args: Prediction,
    data_args: Data,
    rows: Dataset,
    lines: list[Line],
    bad_rows: list[Line],
    task: str,
    ids: list[int],
) -> None:
    """Write report.html, scores.json, bad_rows.jsonl, results.json, and at the end predictions.jsonl.

    Raises: ValueError, after writing all of them, if no image could be read.
    """
    report_unreadable(rows, lines, bad_rows, folder)
    lines, scores = predictions.grade(lines, task)
    name = data_args.dataset_name or data_args.questions_file or ", ".join(data_args.images)
    write_report(
        folder / "report.html",
        f"{Path(args.model_name_or_path).name}: {Path(name).name}",
        scores,
        predictions.samples_of(lines),
        lambda position: open_image(rows[position]["image"], THUMBNAIL_PIXELS),
    )
    if scores:
        (folder / "scores.json").write_text(to_json(scores, indent=2) + "\n", encoding="utf-8")
        logger.info("Scores: %s", to_json(scores, indent=2))
    if args.format:
        results = predictions.official_results(args.format, ids, lines)
        (folder / "results.json").write_text(to_json(results), encoding="utf-8")
    predictions.OUTPUT.finish(folder, lines)
    more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    logger.info("Predicted:\n%s%s", "\n".join(map(in_words, lines[:SHOWN])), more)
    logger.info("%d predictions: %s, report: %s", len(lines), folder / predictions.OUTPUT.file, folder / "report.html")
    require_readable(rows, lines)


def in_words(line: Line) -> str:
    """A line of predictions.jsonl for the screen: image, question and prediction."""
    question = [line["question"]] if "question" in line else []
    if "unreadable_image" in line:
        predicted = "the image cannot be read"
    else:
        number = f"{line['score']:.2f}" if "score" in line else f"{line['probability']:.1%}"
        predicted = f"{line['prediction'] or '(nothing)'} ({number})"
    shown = " | ".join([line["image"] or line["image_id"], *question, predicted])
    # data and predictions may contain characters that move the cursor of a terminal
    return "  " + "".join(character if character.isprintable() else " " for character in shown)


if __name__ == "__main__":
    start_recipe(main)
