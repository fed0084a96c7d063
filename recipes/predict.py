"""Let a checkpoint answer questions about pictures, write their captions, or rank texts for them.

    python recipes/predict.py --model_name_or_path outputs/vqa --images cat.jpg --question "what is it?"
        one picture, several, or folders of them; without --question a captioning checkpoint writes captions
    accelerate launch --quiet recipes/predict.py --model_name_or_path outputs/vqa --dataset_name FOLDER_OR_FILE
        rows as in training, with references or without
    accelerate launch --quiet recipes/predict.py --model_name_or_path outputs/vqa --format vqa \\
        --questions_file v2_OpenEnded_mscoco_test2015_questions.json --image_folder coco
        writes results.json as the evaluation server takes it

The task is the checkpoint's. predictions.jsonl and report.html are written, scores.json where there are references, and
bad_rows.jsonl where a picture cannot be read. A run that was stopped goes on when it is started again.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import BlipProcessor

from blip_ft import inference, metrics
from blip_ft.arguments import DataArguments, parse, start_recipe
from blip_ft.collators import clean_caption, encode_row_images, encode_texts, open_image
from blip_ft.data_pipeline import list_pictures, load_to_predict, number_pictures
from blip_ft.models import TASK_OF_CLASS, load_model
from blip_ft.report import THUMBNAIL_PIXELS, Sample, write_report

logger = logging.getLogger("blip_ft.predict")

Line = dict[str, Any]
# a batch to what is to be written of each of its rows
Predict = Callable[[dict[str, torch.Tensor]], list[Line]]

SETTINGS_FILE = "predict_settings.json"
# what may change when a run goes on
NOT_SETTINGS = ("output_dir", "format", "per_device_eval_batch_size", "dataloader_num_workers", "use_cpu")


@dataclass
class Data(DataArguments):
    """Which pictures; of the training arguments those that choose and name columns count."""

    _needs_annotations = False

    images: list[str] | None = field(
        default=None, metadata={"help": "Pictures and folders of pictures, in place of dataset_name."}
    )
    question: str | None = field(
        default=None, metadata={"help": "Asked of every picture, in place of the data's questions."}
    )
    texts: str | None = field(
        default=None,
        metadata={"help": "File of texts to rank for each picture, one a line. Default: the data's captions."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(map(bool, (self.images, self.dataset_name, self.questions_file))) != 1:
            raise ValueError("Name the pictures by one of --images, --dataset_name and --questions_file.")


@dataclass
class Prediction:
    """How to predict, and what to write."""

    _argument_group_name = "Prediction"

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of a BLIP checkpoint or PEFT adapter."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Default: outputs/predict, or the next free outputs/predict-2, -3, ..."}
    )
    format: Literal["vqa", "coco"] | None = field(
        default=None, metadata={"help": "Also results.json: official VQA results, or COCO caption results."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Questions, or pictures, at once."})
    dataloader_num_workers: int = field(
        default_factory=lambda: min(4, os.cpu_count() or 1), metadata={"help": "Processes that read pictures."}
    )
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})
    max_question_tokens: int = field(default=35, metadata={"help": "Longer questions are cut."})
    generation_max_length: int | None = field(
        default=None, metadata={"help": "Tokens of an answer or caption, first and last included. Default: 10 and 20."}
    )
    generation_min_length: int = field(default=5, metadata={"help": "Tokens of a caption at least, prompt included."})
    generation_num_beams: int = field(default=3, metadata={"help": "Beams of generation."})
    prompt: str = field(default="a picture of ", metadata={"help": "What captions begin with; it is not written."})
    max_caption_tokens: int = field(default=35, metadata={"help": "Longer texts to rank are cut."})
    clean_captions: bool = field(default=True, metadata={"help": "Rank texts in lower case, without punctuation."})
    k_test: int = field(default=256, metadata={"help": "Texts of each picture that the matching head ranks."})
    top_texts: int = field(default=10, metadata={"help": "Texts written for each picture."})


def main() -> None:
    args, data_args = parse(Prediction, Data)
    state = PartialState(cpu=args.use_cpu)
    loaded = load_model(args.model_name_or_path, device=state.device, revision=args.model_revision)
    model, processor = loaded["model"], loaded["processor"]
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    task = TASK_OF_CLASS[type(model).__name__]
    rows, bad_rows = read_rows(data_args, task)
    ids = official_ids(args.format, rows, task) if args.format else []
    texts = read_texts(data_args.texts, rows) if task == "image_text_retrieval" else []

    folder, done = settle_output_dir(args, settings_of(args, data_args, rows, texts))
    order = np.argsort(number_pictures(rows), kind="stable")
    share = np.array_split(order[~np.isin(order, list(done))], state.num_processes)[state.process_index]
    with torch.autocast(state.device.type, torch.bfloat16, enabled=args.bf16), torch.no_grad():
        predict_share(rows, share.tolist(), make_predict(model, processor, args, task, texts), processor, args, folder)
    state.wait_for_everyone()
    if state.is_main_process:
        found = read_parts(folder)
        lines = [found[position] for position in range(len(rows))]
        finish(folder, args, data_args, rows, lines, bad_rows, task, ids)
        logger.info("%d predictions: %s, to look at: %s", len(lines), folder / "predictions.jsonl", "report.html")


# ---- what to predict on ----


def read_rows(args: Data, task: str) -> tuple[Dataset, list[Line]]:
    """Rows, with references where the data has them, and those that cannot be used."""
    asks = task == "vqa"
    if args.question and not asks:
        raise ValueError(f"--question needs a checkpoint that answers questions; this one does {task}.")
    if args.images and asks and not args.question:
        raise ValueError('Pictures alone ask nothing. Give --question "what is it?", or --dataset_name with questions.')
    if args.images:
        rows, bad_rows = list_pictures(args.images), []
    else:
        rows, bad_rows = load_to_predict(args, "vqa" if asks and not args.question else "pictures")
    if args.question:
        rows = rows.select_columns(["image", "image_id"]).add_column("question", [args.question] * len(rows))
        rows = rows.add_column("question_id", rows["image_id"][:])
    return rows, bad_rows


def read_texts(path: str | None, rows: Dataset) -> list[str]:
    """Each text once."""
    if path is not None:
        texts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    else:
        texts = [text for own in rows["captions"][:] for text in own] if "captions" in rows.column_names else []
    texts = list(dict.fromkeys(filter(None, texts)))
    if not texts:
        raise ValueError("There is no text to rank. Give --texts FILE with one a line, or data with captions.")
    return texts


# ---- the three tasks ----


def make_predict(model: Any, processor: BlipProcessor, args: Prediction, task: str, texts: list[str]) -> Predict:
    """The score of an answer or caption is its probability as written (inference.sequence_probabilities). That of a
    text is cosine + matching logit: it has no bounds, and compares texts of one picture."""
    tokenizer = processor.tokenizer
    cleaned = [clean_caption(text) for text in texts] if args.clean_captions else texts
    tokens = encode_texts(cleaned, tokenizer, args.max_caption_tokens) if texts else {}
    features: list[torch.Tensor] = []  # filled with the first batch: a run with nothing left to do encodes no text

    def answer(batch: dict[str, torch.Tensor]) -> list[Line]:
        images = model.encode_images(batch["pixel_values"]).last_hidden_state
        mask = batch["attention_mask"]
        states = model.encode_questions(images, batch["input_ids"], mask, batch["image_index"])
        limits = (args.generation_max_length or 10, args.generation_num_beams)
        answers = inference.answer(model, tokenizer, states, mask, *limits)
        return [{"answer": text, "score": score} for text, score in zip(*answers, strict=True)]

    def caption(batch: dict[str, torch.Tensor]) -> list[Line]:
        limits = (args.generation_max_length or 20, args.generation_num_beams, args.generation_min_length)
        captions = inference.caption(model, tokenizer, batch["pixel_values"], args.prompt, *limits)
        return [{"caption": text, "score": score} for text, score in zip(*captions, strict=True)]

    def rank(batch: dict[str, torch.Tensor]) -> list[Line]:
        if not features:
            features.append(inference.embed_texts(model, **tokens))
        ranked = inference.rank_texts(model, batch["pixel_values"], features[0], **tokens, k=args.k_test)
        best = [ranking[: args.top_texts] for ranking in ranked]
        return [{"texts": [{"text": texts[place], "score": score} for place, score in ranking]} for ranking in best]

    return {"vqa": answer, "conditional_generation": caption, "image_text_retrieval": rank}[task]


EMPTY = {
    "vqa": {"answer": "", "score": None},
    "conditional_generation": {"caption": "", "score": None},
    "image_text_retrieval": {"texts": []},
}


def collate(rows: list[Line], processor: BlipProcessor, max_question_tokens: int) -> dict[str, torch.Tensor]:
    """Each picture once, and the questions where there are any."""
    batch = encode_row_images(rows, processor.image_processor)
    if "question" in rows[0]:
        batch |= encode_texts([row["question"] for row in rows], processor.tokenizer, max_question_tokens)
    return batch


def predict_share(
    rows: Dataset, share: list[int], predict: Predict, processor: BlipProcessor, args: Prediction, folder: Path
) -> None:
    """Append a line for each row to this process's part file, batch by batch."""
    state, pictures = PartialState(), number_pictures(rows)[share]
    loader = DataLoader(
        Subset(rows, share),
        args.per_device_eval_batch_size,
        collate_fn=partial(collate, processor=processor, max_question_tokens=args.max_question_tokens),
        num_workers=args.dataloader_num_workers,
    )
    progress = tqdm(total=len(set(pictures)), unit=" pictures", disable=not state.is_local_main_process)
    with (folder / f"predictions.part{state.process_index}.jsonl").open("a", encoding="utf-8") as file:
        done, seen = 0, set()
        for batch in loader:
            readable = batch.pop("readable").tolist()
            predicted = predict({name: tensor.to(state.device) for name, tensor in batch.items()})
            for position, line, good in zip(share[done:], predicted, readable, strict=False):
                row = {"position": position, "readable": good, **line}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            before, seen = len(seen), seen | set(pictures[done : done + len(readable)].tolist())
            done += len(readable)
            progress.update(len(seen) - before)
    progress.close()


# ---- files ----


def settings_of(args: Prediction, data_args: Data, rows: Dataset, texts: list[str]) -> Line:
    """What two runs must have in common for the one to go on with the predictions of the other."""
    digest = hashlib.sha1()
    for name in ("image_id", "question"):
        if name in rows.column_names:
            digest.update(json.dumps(rows[name][:]).encode())
    digest.update(json.dumps(texts).encode())
    weights = Path(args.model_name_or_path).glob("*.safetensors")
    settings = {name: value for name, value in asdict(args).items() if name not in NOT_SETTINGS}
    written = sorted(file.stat().st_mtime_ns for file in weights)
    return {**settings, "dataset_name": data_args.dataset_name, "weights": written, "rows": digest.hexdigest()}


def settle_output_dir(args: Prediction, settings: Line) -> tuple[Path, set[int]]:
    """The folder to write to, and the positions of the rows that an unfinished run has left there."""
    choice: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            folder = choose_output_dir(args.output_dir, settings)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")
            choice = [(folder, set(read_parts(folder)))]
        except ValueError as error:
            choice = [error]
    broadcast_object_list(choice)
    if isinstance(choice[0], ValueError):
        raise choice[0]
    folder, done = choice[0]
    if done:
        logger.info("Going on in %s: %d rows are done.", folder, len(done))
    return folder, done


def choose_output_dir(given: str | None, settings: Line) -> Path:
    number = 1
    while True:
        folder = Path(given or ("outputs/predict" if number == 1 else f"outputs/predict-{number}"))
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return folder
        unfinished = (folder / SETTINGS_FILE).is_file() and not (folder / "predictions.jsonl").exists()
        earlier = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")) if unfinished else {}
        other = [name for name in settings if earlier.get(name) != settings[name]]
        if unfinished and not other:
            return folder
        if given and unfinished:
            raise ValueError(
                f"output_dir {given} holds an unfinished run with another {', '.join(other)}. Start that run again to "
                "finish it, choose another --output_dir, or remove it."
            )
        if given:
            raise ValueError(f"output_dir {given} is not empty. Choose another, or remove it.")
        number += 1


def read_parts(folder: Path) -> dict[int, Line]:
    """Lines by position. A last line that a kill has cut is taken out of its file."""
    lines = {}
    for path in sorted(folder.glob("predictions.part*.jsonl")):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            path.write_bytes(whole)
        for text in whole.decode().splitlines():
            line = json.loads(text)
            lines[line.pop("position")] = line
    return lines


def finish(
    folder: Path,
    args: Prediction,
    data_args: Data,
    rows: Dataset,
    lines: list[Line],
    bad_rows: list[Line],
    task: str,
    ids: list[int],
) -> None:
    """report.html, scores.json, bad_rows.jsonl, results.json and predictions.jsonl; the part files go last."""
    texts = rows.remove_columns("image")
    for position, (line, row) in enumerate(zip(lines, texts, strict=True)):
        path = rows[position]["image"]["path"]
        known = {name: value for name, value in row.items() if value or name in ("image_id", "question")}
        if not line.pop("readable"):
            line |= {**EMPTY[task], "unreadable_picture": True}
            reason = why_unreadable(rows[position]["image"])
            bad_rows.append({"split": "eval", "row": position, "image_id": row["image_id"], "reason": reason})
        predicted = dict(line)
        line.clear()
        line |= {"image": path, **known, **predicted}
    scores, samples = score(lines, task)
    name = data_args.dataset_name or data_args.questions_file or ", ".join(data_args.images)
    write_report(
        folder / "report.html",
        f"{Path(args.model_name_or_path).name}: {Path(name).name}",
        scores,
        samples,
        lambda position: open_image(rows[position]["image"], THUMBNAIL_PIXELS),
    )
    if scores:
        (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        logger.info("Scores: %s", json.dumps(scores, indent=2))
    if bad_rows:
        write_lines(folder / "bad_rows.jsonl", bad_rows)
        logger.warning("%d rows have no prediction: %s", len(bad_rows), folder / "bad_rows.jsonl")
    if args.format:
        results = official_results(args.format, ids, lines)
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    write_lines(folder / "predictions.jsonl", lines)
    for path in (*folder.glob("predictions.part*.jsonl"), folder / SETTINGS_FILE):
        path.unlink()


def write_lines(path: Path, lines: list[Line]) -> None:
    """All of them or no file."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    unfinished.replace(path)


def why_unreadable(image: Line) -> str:
    try:
        open_image(image)
    except Exception as error:  # decoders raise what they like on broken input
        return f"picture cannot be read: {type(error).__name__}: {error}"
    return "picture could not be read at first, and now can"


def official_ids(form: str, rows: Dataset, task: str) -> list[int]:
    """The numbers by which an evaluation server knows the rows."""
    wanted, column, pattern = {
        "vqa": ("vqa", "question_id", r"(\d+)"),
        # also of a file: COCO_val2014_000000000042.jpg is 42
        "coco": ("conditional_generation", "image_id", r"(?:.*\D)?(\d+)(?:\.\w+)?"),
    }[form]
    if task != wanted:
        raise ValueError(f"--format {form} is for {wanted}; this checkpoint does {task}.")
    texts = rows[column][:]
    found = [re.fullmatch(pattern, text) for text in texts]
    if None in found:
        raise ValueError(f"--format needs ids that are numbers, found {texts[found.index(None)]!r}. Leave it out.")
    ids = [int(match[1]) for match in found]
    if len(set(ids)) < len(ids):
        raise ValueError("--format needs an id of its own for each row; here some are the same. Leave it out.")
    return ids


def official_results(form: str, ids: list[int], lines: list[Line]) -> list[Line]:
    id_name, text_name = {"vqa": ("question_id", "answer"), "coco": ("image_id", "caption")}[form]
    return [{id_name: number, text_name: line[text_name]} for number, line in zip(ids, lines, strict=True)]


# ---- scores ----


def score(lines: list[Line], task: str) -> tuple[dict[str, float], list[Sample]]:
    """Scores of the lines with references, in percent, and all lines for the report."""
    references = [line.get("answers" if task == "vqa" else "captions", []) for line in lines]
    known = [position for position, own in enumerate(references) if own]
    texts = [line.get("answer", line.get("caption")) for line in lines]
    if task == "image_text_retrieval":
        texts = [line["texts"][0]["text"] if line["texts"] else "" for line in lines]
    samples = []
    for line, text, own in zip(lines, texts, references, strict=True):
        sample = Sample(text, line.get("question", ""), own, score=line.get("score"))
        sample.readable = "unreadable_picture" not in line
        if task == "vqa" and own:
            sample.accuracy = metrics.vqa_accuracy(text, own)
            sample.kind = line.get("answer_type") or metrics.answer_type(own)
        elif task == "conditional_generation" and own:
            sample.accuracy = metrics.caption_scores([text], [own])["rouge_l"] / 100
        elif task == "image_text_retrieval":
            sample.accuracy = float(text in own) if own else None
            sample.score, sample.score_name = (line["texts"][0]["score"] if line["texts"] else None), "score"
        samples.append(sample)
    if not known:
        return {}, samples
    pairs = {"predictions": [texts[p] for p in known], "references": [references[p] for p in known]}
    if task == "vqa":
        scores = metrics.VqaAccuracy().compute(**pairs, answer_types=[samples[p].kind for p in known])
    elif task == "conditional_generation":
        scores = {**metrics.CaptionScores().compute(**pairs), "exact_match": metrics.caption_exact_match(**pairs)}
    else:
        ranked = [[entry["text"] in references[p] for entry in lines[p]["texts"]] for p in known]
        scores = {
            f"text_recall@{k}": 100 * sum(any(right[:k]) for right in ranked) / len(ranked)
            for k in (1, 5, 10)
            if k <= max(map(len, ranked))
        }
    return {**scores, "scored_rows": len(known)}, samples


if __name__ == "__main__":
    start_recipe(main)
