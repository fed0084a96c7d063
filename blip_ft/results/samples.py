"""Which predictions to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from blip_ft.data.tables import number_images
from blip_ft.metrics.vqa import answer_type

MAX_WRONG, MAX_RIGHT = 120, 80  # samples on a page

BANDS = tuple(f"ROUGE-L {least} to {least + 25}" for least in (0, 25, 50, 75))


@dataclass
class Sample:
    """One prediction.

    question: "" for captions and retrieval. references: empty if unknown.
    accuracy: 0 to 1, None without references; 0.5 or more counts as right.
    quality: ROUGE-L, 0 to 1, for captions. It takes the place of accuracy, because a caption is not right or wrong.
    score, score_name: how certain the model was, larger is more certain; None if unknown.
    kind: a property to filter the page by, e.g. the type of the answer.
    """

    prediction: str
    question: str = ""
    references: Sequence[str] = ()
    accuracy: float | None = None
    score: float | None = None
    score_name: str = "probability"
    kind: str = ""
    readable: bool = True
    quality: float | None = None

    @property
    def band(self) -> str:
        """The quarter of the range of quality, as the page names it."""
        if self.quality is None:
            return ""
        return BANDS[min(int(self.quality * len(BANDS)), len(BANDS) - 1)]

    @property
    def verdict(self) -> str:
        if self.accuracy is None:
            return "unknown"
        return "right" if self.accuracy >= 0.5 else "wrong"


def choose_samples(samples: Sequence[Sample]) -> list[int]:
    """Positions of the samples to show: first the wrong ones, most certain first, then the others, least certain first.

    Captions are ordered by quality, lowest first, and taken evenly from all of them.
    """

    def certainty(position: int) -> float:
        score = samples[position].score
        return float("-inf") if score is None else score

    positions = range(len(samples))
    if any(sample.quality is not None for sample in samples):
        ranked = sorted(positions, key=lambda position: samples[position].quality or 0)
        return _spread(ranked, MAX_WRONG + MAX_RIGHT)
    wrong = sorted((p for p in positions if samples[p].verdict == "wrong"), key=certainty, reverse=True)
    others = sorted((p for p in positions if samples[p].verdict != "wrong"), key=certainty)
    # if one list is short, the other gets its room
    num_wrong = min(len(wrong), max(MAX_WRONG, MAX_WRONG + MAX_RIGHT - len(others)))
    num_others = min(len(others), MAX_WRONG + MAX_RIGHT - num_wrong)
    # taken evenly: the least certain ones alone would make the model look worse than it is
    return wrong[:num_wrong] + _spread(others, num_others)


def _spread(positions: list[int], most: int) -> list[int]:
    number = min(len(positions), most)
    return [positions[place * len(positions) // number] for place in range(number)]


def choose_rows(rows: Dataset, number: int) -> list[int]:
    """Positions of rows to show, in order: from different images and, if possible, of each answer type."""
    images = number_images(rows)
    if "answer_type" in rows.column_names:
        kinds = rows["answer_type"][:]
    else:
        kinds = list(map(answer_type, rows["answers"][:])) if "answers" in rows.column_names else [""] * len(rows)
    kinds = np.unique(kinds, return_inverse=True)[1]
    chosen: list[int] = []
    for _ in range(min(number, len(rows))):
        # prefer the image shown least, then the type shown least, then the first row
        shown = [np.bincount(part[chosen], minlength=len(rows))[part] for part in (images, kinds)]
        order = len(rows) * shown[0] + shown[1]
        order[chosen] = np.iinfo(order.dtype).max
        chosen.append(int(order.argmin()))
    return sorted(chosen)
