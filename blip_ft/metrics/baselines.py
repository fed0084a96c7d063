"""Baselines that do not use the images, and the lowest possible loss."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from blip_ft.metrics.retrieval import both_directions


def answer_without_images(
    questions: Iterable[str], answers: Iterable[Sequence[str]], asked: Sequence[str]
) -> list[str]:
    """Guess the answer to each question from its words alone.

    The guess is the most frequent training answer to the same question. If the question is not in the training data, it
    is the most frequent answer to questions that begin with the same two words, or else to all questions.

    Args:
        questions, answers: training data, each question with its answers.
        asked: the questions to answer.
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
    """Expected retrieval_scores of a random ranking, in percent. right: (num_images, num_texts), as in recall_at_k."""

    def chance(right: np.ndarray) -> dict[str, float]:
        num_queries, num_candidates = right.shape
        wrong = num_candidates - right.sum(axis=1)  # (num_queries,)
        recalls, missed = {}, np.ones(num_queries)
        for drawn in range(10):
            # probability that this candidate is wrong if all earlier ones were wrong
            odds = np.clip((wrong - drawn) / max(1, num_candidates - drawn), 0, 1)
            missed *= np.where(wrong == num_candidates, 1, odds)
            recalls[f"recall@{drawn + 1}"] = 100 * float(1 - missed.mean())
        return {f"recall@{k}": recalls[f"recall@{k}"] for k in (1, 5, 10)}

    return both_directions(chance(right), chance(right.T))


def smoothing_floor(num_words: int, label_smoothing: float) -> float:
    """The lowest possible cross-entropy of a token with label smoothing, which is the entropy of the smoothed labels.

    label_smoothing, 0-1, is spread evenly over all num_words, as in torch's cross_entropy.
    """
    other = label_smoothing / num_words
    own = 1 - label_smoothing + other
    return -sum(times * share * math.log(share) for times, share in ((1, own), (num_words - 1, other)) if share)
