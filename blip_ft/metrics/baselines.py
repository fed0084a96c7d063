"""What a guess reaches that does not look at the image, and the lowest possible loss."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from blip_ft.metrics.retrieval import both_directions


def answer_without_images(
    questions: Iterable[str], answers: Iterable[Sequence[str]], asked: Sequence[str]
) -> list[str]:
    """The answer to each question asked that its words alone suggest.

    It is the most frequent training answer to the same question; if it was not trained on, to questions that begin
    with the same two words; else of all.

    Args:
        questions, answers: of the rows trained on, one question and its answers each.
    """
    wanted = {key for question in asked for key in _keys_of(question)}
    counts: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for question, given in zip(questions, answers, strict=True):
        for key in wanted.intersection(_keys_of(question)):
            counts[key].update(given)
    best = {key: count.most_common(1)[0][0] for key, count in counts.items()}
    return [next(best[key] for key in _keys_of(question) if key in best) for question in asked]


def _keys_of(question: str) -> list[tuple[str, ...]]:
    words = tuple(question.lower().rstrip(" ?").split())
    return [("is", *words), ("begins with", *words[:2]), ()]


def chance_scores(right: np.ndarray) -> dict[str, float]:
    """What retrieval_scores gives on average for a random order, in percent. right: (num_images, num_texts)."""

    def chance(right: np.ndarray) -> dict[str, float]:
        num_queries, num_candidates = right.shape
        wrong = num_candidates - right.sum(axis=1)  # (num_queries,)
        recalls, missed = {}, np.ones(num_queries)
        for drawn in range(10):
            # the odds that no right one is drawn now, after as many wrong ones
            odds = np.clip((wrong - drawn) / max(1, num_candidates - drawn), 0, 1)
            missed *= np.where(wrong == num_candidates, 1, odds)
            recalls[f"recall@{drawn + 1}"] = 100 * float(1 - missed.mean())
        return {f"recall@{k}": recalls[f"recall@{k}"] for k in (1, 5, 10)}

    return both_directions(chance(right), chance(right.T))


def smoothing_floor(num_words: int, label_smoothing: float) -> float:
    """The least cross-entropy of a token under smoothed labels: the entropy of the labels.

    label_smoothing, 0 to 1, is spread evenly over all num_words, as torch's cross_entropy does.
    """
    other = label_smoothing / num_words
    own = 1 - label_smoothing + other
    return -sum(times * share * math.log(share) for times, share in ((1, own), (num_words - 1, other)) if share)
