"""predictions.jsonl: its lines, their scores, and how recipes/predict.py writes and resumes it.

Training runs and recipes/predict.py write the same format, one JSON object per row of the data, in its order:

    image           path of the image, null if the data contains the image itself
    image_id, question, question_id, answers or captions, answer_type
                    what the data says about the row; empty values are left out
    prediction      the answer, the caption, or the best text for the image; "" if the image cannot be read
    probability     of an answer or caption, 0 to 1; null for an answer chosen from a list
    score           of a text, instead of probability: cosine + matching logit, without bounds
    texts           recipes/predict.py only, for retrieval: the best texts, [{"text", "score"}, ...]
    accuracy        of an answer or text, 0 to 1, if the data has references
    rouge_l         of a caption, 0 to 1, if the data has references
    loss            training runs only, of an answer: summed over the reference answers, weighted
    unreadable_image
                    true if the image cannot be read; probability, score, texts and loss are missing then

recipes/predict.py appends predictions batch by batch, and each process writes its own file, so that a stopped run can
resume.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
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

# --format -> its task; the column with the ids that the evaluation server uses, and the number in one; the server's
# name for a prediction
FORMATS = {
    # eval-7 is the eighth row of data without ids
    "vqa": ("vqa", "question_id", r"(?:eval-)?(\d+)", "answer"),
    # also matches a file: COCO_val2014_000000000042.jpg is 42
    "coco": ("conditional_generation", "image_id", r"(?:.*\D)?(\d+)(?:\.\w+)?", "caption"),
}

UNREADABLE: Line = {"prediction": "", "unreadable_image": True}


def build_lines(rows: Dataset, results: Sequence[Line | None]) -> list[Line]:
    """The lines of predictions.jsonl.

    Args:
        results: what was predicted for each row, with the names above; None if its image cannot be read.
    """
    # a wrong answer, in the same terms as the answers to other rows
    graded = {name for result in results if result for name in ("accuracy", "rouge_l") if name in result}
    unreadable = UNREADABLE | dict.fromkeys(graded, 0.0)
    # without the bytes of the images, which can be gigabytes
    known = rows.flatten().remove_columns("image.bytes").rename_column("image.path", "image")
    always = ("image", "image_id", "question")
    return [
        {name: value for name, value in row.items() if value or name in always} | (result or unreadable)
        for row, result in zip(known, results, strict=True)
    ]


def samples_of(lines: Iterable[Line]) -> list[Sample]:
    """The lines as the report shows them."""
    return [
        Sample(
            line["prediction"],
            line.get("question", ""),
            line.get("answers") or line.get("captions", ()),
            accuracy=line.get("accuracy"),
            quality=line.get("rouge_l"),
            score=line.get("score", line.get("probability")),
            score_name="score" if "score" in line else "probability",
            kind=line.get("answer_type", ""),
            readable="unreadable_image" not in line,
        )
        for line in lines
    ]


def settle_folder(given: str | None, settings: Line) -> tuple[Path, set[int]]:
    """The folder to write to, and the positions of the rows that an unfinished run has predicted there.

    The default is outputs/predict, or the next free one of outputs/predict-2, -3, ... No other program can write to
    the folder until this process ends.

    Args:
        settings: a run can resume another one only if all of these are equal.
    Raises: ValueError, in all processes, if the folder contains anything but such a run, or is in use.
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
            raise ValueError(f"output_dir {given} contains {found}. Choose another --output_dir, or remove it.")
        return Path(given)
    for folder in numbered_folders("predict"):
        # checked again after claim(), when no other program can write there
        if not _what_is_in_the_way(folder, settings) and claim(folder) and not _what_is_in_the_way(folder, settings):
            return folder


def _what_is_in_the_way(folder: Path, settings: Line) -> str | None:
    if is_free(folder):
        return None
    if not (folder / SETTINGS_FILE).is_file() or (folder / FILE).exists():
        return "other files"
    earlier = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    other = [name for name in settings if earlier.get(name) != settings[name]]
    return f"an unfinished run with different settings: {', '.join(other)}" if other else None


def append_part(folder: Path, batches: Iterable[dict[int, Line]]) -> None:
    """Write the predictions of this process, with their positions, after each batch."""
    with (folder / f"predictions.part{PartialState().process_index}.jsonl").open("a", encoding="utf-8") as file:
        for batch in batches:
            for position, line in batch.items():
                file.write(to_json({"position": position, **line}, ensure_ascii=False) + "\n")
            file.flush()


def read_parts(folder: Path) -> dict[int, Line]:
    """Position -> what all processes have written. A last line that a kill has cut is removed from its file."""
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


def grade(lines: Sequence[Line], task: str) -> tuple[list[Line], dict[str, float]]:
    """The lines, with an accuracy or rouge_l if they have references; and the scores of those lines, in percent."""
    references_name = "answers" if task == "vqa" else "captions"
    known = [line for line in lines if references_name in line]
    if not known:
        return list(lines), {}
    pairs = {
        "predictions": [line["prediction"] for line in known],
        "references": [line[references_name] for line in known],
    }
    if task == "vqa":
        types = [line.get("answer_type") or answer_type(line["answers"]) for line in known]
        scores = VqaAccuracy().compute(**pairs, answer_types=types)
        grades = [
            {"accuracy": vqa_accuracy(*pair), "answer_type": kind}
            for *pair, kind in zip(*pairs.values(), types, strict=True)
        ]
    elif task == "conditional_generation":
        scores = {**CaptionScores().compute(**pairs), "exact_match": caption_exact_match(**pairs)}
        grades = [{"rouge_l": caption_rouge_l(*pair)} for pair in zip(*pairs.values(), strict=True)]
    else:
        ranked = [[entry["text"] in line["captions"] for entry in line.get("texts", ())] for line in known]
        shown = max(map(len, ranked))
        scores = {f"text_recall@{k}": 100 * fmean(any(right[:k]) for right in ranked) for k in (1, 5, 10) if k <= shown}
        grades = [{"accuracy": float(any(right[:1]))} for right in ranked]
    of_known = iter(grades)
    graded = [line | next(of_known) if references_name in line else line for line in lines]
    return graded, {**scores, "scored_rows": len(known)}


def finish(folder: Path, lines: list[Line]) -> None:
    """Write predictions.jsonl, and remove the files that only an unfinished run needs."""
    write_lines(folder / FILE, lines)
    for path in (*folder.glob("predictions.part*.jsonl"), folder / SETTINGS_FILE):
        path.unlink()


def official_ids(form: str, task: str, rows: Dataset) -> list[int]:
    """The ids of the rows on the evaluation server.

    Raises: ValueError if the format is for another task, or if the rows have no such ids or share some.
    """
    wanted, column, pattern, _ = FORMATS[form]
    if task != wanted:
        raise ValueError(f"--format {form} is for {wanted}; this checkpoint does {task}.")
    texts = rows[column][:]
    found = [re.fullmatch(pattern, text) for text in texts]
    if None in found:
        raise ValueError(
            f"--format needs a number in each {column}, found {texts[found.index(None)]!r}. Leave --format out."
        )
    ids = [int(match[1]) for match in found]
    if len(set(ids)) < len(ids):
        raise ValueError(f"--format needs a unique {column} for each row, and some rows share one. Leave --format out.")
    return ids


def official_results(form: str, ids: list[int], lines: list[Line]) -> list[Line]:
    """What evaluation servers accept: the results JSON of VQA, or that of COCO captions."""
    _, id_name, _, text_name = FORMATS[form]
    return [{id_name: number, text_name: line["prediction"]} for number, line in zip(ids, lines, strict=True)]
