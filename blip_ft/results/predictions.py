"""predictions.jsonl: its lines, and their scores.

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

results/parts.py writes it in recipes/predict.py, and resumes a stopped run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import fmean

from datasets import Dataset

from blip_ft.metrics.captions import CaptionScores, caption_exact_match, caption_rouge_l
from blip_ft.metrics.vqa import VqaAccuracy, answer_type, vqa_accuracy
from blip_ft.results.parts import UNREADABLE, Line, Output
from blip_ft.results.samples import Sample

OUTPUT = Output("predict", "predictions.jsonl")

# --format -> its task; the column with the ids that the evaluation server uses, and the number in one; the server's
# name for a prediction
FORMATS = {
    # eval-7 is the eighth row of data without ids
    "vqa": ("vqa", "question_id", r"(?:eval-)?(\d+)", "answer"),
    # also matches a file: COCO_val2014_000000000042.jpg is 42
    "coco": ("conditional_generation", "image_id", r"(?:.*\D)?(\d+)(?:\.\w+)?", "caption"),
}


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
