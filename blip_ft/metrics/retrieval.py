"""Recall of images by text and of texts by image."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

_QUERIES_AT_ONCE = 256  # so that no second copy of a large similarity is made


def _right_pairs(similarity: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """(num_images, num_texts), True where the text belongs to the image. For `owner` see recall_at_k."""
    num_images, num_texts = similarity.shape
    if not similarity.size:
        found = f"{num_images} images and {num_texts} texts"
        raise ValueError(f"Recall needs at least one image and one text; got {found}. Check eval_split and its rows.")
    if owner.shape == similarity.shape:
        return owner.astype(bool)
    if owner.shape != (num_texts,):
        found = f"{owner.shape} for a similarity of {similarity.shape}"
        raise ValueError(f"owner needs one image row per text, or a mark per (image, text); got {found}.")
    if not 0 <= owner.min() <= owner.max() < num_images:
        found = f"{owner.min()} to {owner.max()}"
        raise ValueError(f"owner holds rows of similarity, 0 to {num_images - 1}; got {found}.")
    return owner == np.arange(num_images)[:, None]


def _recall(similarity: np.ndarray, right: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """recall@k of the rows. similarity, right: (num_queries, num_candidates)."""
    wrong_ahead = []
    for start in range(0, len(similarity), _QUERIES_AT_ONCE):
        scores = similarity[start : start + _QUERIES_AT_ONCE]
        is_right = right[start : start + _QUERIES_AT_ONCE]
        best = np.where(is_right, scores, -np.inf).max(axis=1, keepdims=True)
        # not "scores >= best", which holds for no NaN: a diverged model would be right everywhere
        ahead = (~(scores < best) & ~is_right).sum(axis=1)
        wrong_ahead.append(np.where(is_right.any(axis=1), ahead, np.inf))
    return {f"recall@{k}": 100 * float(np.mean(np.concatenate(wrong_ahead) < k)) for k in ks}


def recall_at_k(similarity: np.ndarray, owner: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of texts whose own image is among the k most similar.

    Args:
        similarity: (num_images, num_texts); larger is closer.
        owner: (num_texts,); owner[j] is the row of text j's image. Several texts may share an image. Where a text fits
            several images, as identical captions do: (num_images, num_texts), owner[i, j] True if text j fits image i;
            the most similar of them counts.
    Returns: "recall@k" in percent, 0-100.
    Raises: ValueError if owner's length is not num_texts, or it names a row that similarity lacks.
    Source: BLIP train_retrieval.py itm_eval. Unlike it, a tie counts as the worst rank, and so does NaN.
    """
    return _recall(similarity.T, _right_pairs(similarity, owner).T, ks)


def text_recall_at_k(similarity: np.ndarray, owner: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of images of which any own text is among the k most similar; an image without a text counts as wrong.

    Arguments, result and errors as in `recall_at_k`.
    """
    return _recall(similarity, _right_pairs(similarity, owner), ks)


def same_caption(captions: Sequence[str], owner: np.ndarray) -> np.ndarray:
    """(num_images, num_texts), True where one of the image's captions is that text, word for word.

    captions: (num_texts,) and owner: (num_texts,), the image of each.
    """
    kinds = np.unique(np.asarray(captions), return_inverse=True)[1]
    has_kind = np.zeros((owner.max() + 1, kinds.max() + 1), bool)
    has_kind[owner, kinds] = True
    return has_kind[:, kinds]


def retrieval_scores(
    similarity: np.ndarray, right: np.ndarray, for_images: np.ndarray | None = None
) -> dict[str, float]:
    """text_recall@1, 5 and 10, image_recall@1, 5 and 10 and recall_mean, the mean of the six, in percent.

    text_recall: images one of whose captions is found; image_recall: captions whose image is found.

    Args:
        similarity, right: (num_images, num_texts), as in recall_at_k.
        for_images: another similarity to find images by; each direction has candidates of its own.
    """
    found_images = recall_at_k(similarity if for_images is None else for_images, right)
    return both_directions(text_recall_at_k(similarity, right), found_images)


def both_directions(texts: dict[str, float], images: dict[str, float]) -> dict[str, float]:
    """Recalls named by what is found, and recall_mean."""
    recalls = {f"text_{name}": value for name, value in texts.items()}
    recalls |= {f"image_{name}": value for name, value in images.items()}
    return {**recalls, "recall_mean": fmean(recalls.values())}
