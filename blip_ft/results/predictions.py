"""What recipes/predict.py writes, and its scores.

Predictions are appended batch by batch, by each process to a file of its own, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from blip_ft.data.tables import to_json, write_lines
from blip_ft.metrics.captions import CaptionScores, caption_exact_match, caption_rouge_l
from blip_ft.metrics.vqa import VqaAccuracy, answer_type, vqa_accuracy
from blip_ft.results.files import claim, decided_by_main, is_free, numbered_folders, require_claim
from blip_ft.results.samples import Sample

Line = dict[str, Any]

FILE = "predictions.jsonl"

SETTINGS_FILE = "predict_settings.json"

# --format -> the task that it is for; the column with the ids by which an evaluation server knows the rows, and the
# number in one; what a prediction is called
FORMATS = {
    # eval-7 is the seventh row after the first, of data without ids
    "vqa": ("vqa", "question_id", r"(?:eval-)?(\d+)", "answer"),
    # also of a file: COCO_val2014_000000000042.jpg is 42
    "coco": ("conditional_generation", "image_id", r"(?:.*\D)?(\d+)(?:\.\w+)?", "caption"),
}

# what is written of an image that cannot be read
NOTHING: dict[str, Line] = {
    "vqa": {"answer": "", "score": None},
    "conditional_generation": {"caption": "", "score": None},
    "image_text_retrieval": {"texts": []},
}


def settle_folder(given: str | None, settings: Line) -> tuple[Path, set[int]]:
    """The folder to write to, and the positions of the rows that an unfinished run has left there.

    Not given: outputs/predict, else the next free outputs/predict-2, -3, ... It is this program's until it ends.

    Args:
        settings: what two runs must have in common for the one to go on with the predictions of the other.
    Raises: ValueError, in all processes, if the folder holds anything else than such a run, or is in use.
    """

    def settle() -> tuple[Path, set[int]]:
        folder = _choose_folder(given, settings)
        write_lines(folder / SETTINGS_FILE, [settings])
        return folder, set(read_parts(folder))

    return decided_by_main(settle)


def _choose_folder(given: str | None, settings: Line) -> Path:
    if given:
        require_claim(Path(given))
        if found := _what_is_in_the_way(Path(given), settings):
            raise ValueError(f"output_dir {given} holds {found}. Choose another --output_dir, or remove it.")
        return Path(given)
    for folder in numbered_folders("predict"):
        # asked again once no other program can write there
        if not _what_is_in_the_way(folder, settings) and claim(folder) and not _what_is_in_the_way(folder, settings):
            return folder


def _what_is_in_the_way(folder: Path, settings: Line) -> str | None:
    if is_free(folder):
        return None
    if not (folder / SETTINGS_FILE).is_file() or (folder / FILE).exists():
        return "other files"
    earlier = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    other = [name for name in settings if earlier.get(name) != settings[name]]
    return f"an unfinished run with another {', '.join(other)}" if other else None


def append_part(folder: Path, batches: Iterable[dict[int, Line]]) -> None:
    """Write what this process predicts, by position, as soon as a batch is there."""
    with (folder / f"predictions.part{PartialState().process_index}.jsonl").open("a", encoding="utf-8") as file:
        for batch in batches:
            for position, line in batch.items():
                file.write(to_json({"position": position, **line}, ensure_ascii=False) + "\n")
            file.flush()


def read_parts(folder: Path) -> dict[int, Line]:
    """What all processes have written, by position. A last line that a kill has cut is taken out of its file."""
    lines = {}
    for path in folder.glob("predictions.part*.jsonl"):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            path.write_bytes(whole)
        for text in whole.splitlines():
            line = json.loads(text)
            lines[line.pop("position")] = line
    return lines


def describe(row: Line, predicted: Line, task: str) -> Line:
    """A line of predictions.jsonl: what the data says of a row, without its image, and what was predicted."""
    known = {name: value for name, value in row.items() if value or name in ("image_id", "question")}
    return {**known, "image": row["image"]["path"], **NOTHING[task], **predicted}


def score(lines: list[Line], task: str) -> tuple[dict[str, float], list[Sample]]:
    """Scores in percent of the lines with references, and all lines as the report shows them."""
    text_name, references_name = {
        "vqa": ("answer", "answers"),
        "conditional_generation": ("caption", "captions"),
        "image_text_retrieval": ("text", "captions"),
    }[task]
    accuracy = {
        "vqa": vqa_accuracy,
        "conditional_generation": caption_rouge_l,
        "image_text_retrieval": lambda text, own: float(text in own),
    }[task]
    samples = []
    for line in lines:
        own, best = line.get(references_name, []), line.get("texts", [line])[:1] or [{text_name: "", "score": None}]
        text = best[0][text_name]
        sample = Sample(text, line.get("question", ""), own, score=best[0]["score"])
        if own:
            setattr(sample, "quality" if task == "conditional_generation" else "accuracy", accuracy(text, own))
        sample.score_name = "score" if "texts" in line else "probability"
        sample.readable = "unreadable_image" not in line
        if task == "vqa" and own:
            sample.kind = line.get("answer_type") or answer_type(own)
        samples.append(sample)
    known = [sample for sample in samples if sample.references]
    if not known:
        return {}, samples
    pairs = {
        "predictions": [sample.prediction for sample in known],
        "references": [sample.references for sample in known],
    }
    if task == "vqa":
        scores = VqaAccuracy().compute(**pairs, answer_types=[sample.kind for sample in known])
    elif task == "conditional_generation":
        scores = {**CaptionScores().compute(**pairs), "exact_match": caption_exact_match(**pairs)}
    else:
        ranked = [
            [entry["text"] in line["captions"] for entry in line["texts"]] for line in lines if "captions" in line
        ]
        shown = max(map(len, ranked))
        scores = {f"text_recall@{k}": 100 * fmean(any(right[:k]) for right in ranked) for k in (1, 5, 10) if k <= shown}
    return {**scores, "scored_rows": len(known)}, samples


def finish(folder: Path, lines: list[Line]) -> None:
    """Write predictions.jsonl, and remove what only an unfinished run needs."""
    write_lines(folder / FILE, lines)
    for path in (*folder.glob("predictions.part*.jsonl"), folder / SETTINGS_FILE):
        path.unlink()


def official_ids(form: str, task: str, rows: Dataset) -> list[int]:
    """The numbers by which an evaluation server knows the rows.

    Raises: ValueError for another task's format, and where the rows have no such numbers or some twice.
    """
    wanted, column, pattern, _ = FORMATS[form]
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
    """What evaluation servers take: VQA's results JSON, or COCO's of captions."""
    _, id_name, _, text_name = FORMATS[form]
    return [{id_name: number, text_name: line[text_name]} for number, line in zip(ids, lines, strict=True)]
