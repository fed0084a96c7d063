"""Recall of image retrieval and of text retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

_QUERIES_AT_ONCE = 256  # limits the memory: without it, a large similarity matrix would be copied several times


def _right_pairs(similarity: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """(num_images, num_texts), True if the text belongs to the image. For `owner` see recall_at_k."""
    num_images, num_texts = similarity.shape
    if not similarity.size:
        found = f"{num_images} images and {num_texts} texts"
        raise ValueError(f"Recall needs at least one image and one text, found {found}. Check eval_split and its rows.")
    if owner.shape == similarity.shape:
        return owner.astype(bool)
    if owner.shape != (num_texts,):
        found = f"{owner.shape} for a similarity of {similarity.shape}"
        raise ValueError(f"owner needs one image row per text, or one boolean per image and text, found {found}.")
    if not 0 <= owner.min() <= owner.max() < num_images:
        found = f"{owner.min()} to {owner.max()}"
        raise ValueError(f"owner must contain row numbers of similarity, 0 to {num_images - 1}, found {found}.")
    return owner == np.arange(num_images)[:, None]


def _recall(similarity: np.ndarray, right: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """recall@k over the queries. similarity, right: (num_queries, num_candidates)."""
    wrong_ahead = []
    for start in range(0, len(similarity), _QUERIES_AT_ONCE):
        scores = similarity[start : start + _QUERIES_AT_ONCE]
        is_right = right[start : start + _QUERIES_AT_ONCE]
        best = np.where(is_right, scores, -np.inf).max(axis=1, keepdims=True)
        # not "scores >= best", which is False for NaN: a diverged model would be right everywhere
        ahead = (~(scores < best) & ~is_right).sum(axis=1)
        wrong_ahead.append(np.where(is_right.any(axis=1), ahead, np.inf))
    return {f"recall@{k}": 100 * float(np.mean(np.concatenate(wrong_ahead) < k)) for k in ks}


def recall_at_k(similarity: np.ndarray, owner: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Percentage of texts whose own image is among the k most similar images.

    Args:
        similarity: (num_images, num_texts); a larger value is more similar.
        owner: (num_texts,); owner[j] is the row of text j's image. Several texts can have the same image. If a text
            fits several images, as an identical caption does, use (num_images, num_texts) with owner[i, j] True if
            text j fits image i; the most similar of these images counts.
    Returns: "recall@k" in percent, 0-100.
    Raises: ValueError if the shape of owner is different, or if it contains a row that similarity does not have.
    Source: BLIP train_retrieval.py itm_eval. Unlike there, ties and NaN count as the worst rank.
    """
    return _recall(similarity.T, _right_pairs(similarity, owner).T, ks)


def text_recall_at_k(similarity: np.ndarray, owner: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Percentage of images with at least one of their own texts among the k most similar texts.

    An image without a text counts as wrong. Arguments, result and errors as in `recall_at_k`.
    """
    return _recall(similarity, _right_pairs(similarity, owner), ks)


def same_caption(captions: Sequence[str], owner: np.ndarray) -> np.ndarray:
    """(num_images, num_texts), True if one of the image's captions is identical to the text.

    Args:
        captions: (num_texts,).
        owner: (num_texts,), the row of each caption's image.
    """
    kinds = np.unique(np.asarray(captions), return_inverse=True)[1]
    has_kind = np.zeros((owner.max() + 1, kinds.max() + 1), bool)
    has_kind[owner, kinds] = True
    return has_kind[:, kinds]


def retrieval_scores(
    similarity: np.ndarray, right: np.ndarray, for_images: np.ndarray | None = None
) -> dict[str, float]:
    """Compute text_recall@1, 5, 10, image_recall@1, 5, 10, and their mean recall_mean, in percent.

    text_recall counts images for which one of their captions is found; image_recall counts captions for which their
    image is found.

    Args:
        similarity: (num_images, num_texts).
        right: (num_images, num_texts), True if the text fits the image.
        for_images: the similarity for image_recall, if it differs from that for text_recall.
    """
    found_images = recall_at_k(similarity if for_images is None else for_images, right)
    return both_directions(text_recall_at_k(similarity, right), found_images)


def both_directions(texts: dict[str, float], images: dict[str, float]) -> dict[str, float]:
    """Join the recalls of text and image retrieval, with a prefix for each, and add recall_mean."""
    recalls = {f"text_{name}": value for name, value in texts.items()}
    recalls |= {f"image_{name}": value for name, value in images.items()}
    return {**recalls, "recall_mean": fmean(recalls.values())}
