"""Recall: values worked out by hand, and a slow reference."""

import numpy as np
import pytest

from blip_ft.metrics import retrieval
from blip_ft.metrics.retrieval import recall_at_k, retrieval_scores, same_caption, text_recall_at_k

# rows are images, columns texts; the texts belong to the images 0, 0, 1, 2
SIMILARITY = np.array([[0.9, 0.1, 0.3, 0.3], [0.2, 0.8, 0.4, 0.1], [0.5, 0.6, 0.2, 0.3]])
OWNER = np.array([0, 0, 1, 2])


def test_recall_of_texts_is_as_worked_out():
    # ranks 1, 3, 1 and 2; the last is a tie with image 0
    assert recall_at_k(SIMILARITY, OWNER, ks=(1, 2, 3)) == {"recall@1": 50, "recall@2": 75, "recall@3": 100}


def test_recall_of_images_counts_the_best_of_their_texts():
    # ranks 1 by text 0 (text 1 is last), 2 and 3
    scores = text_recall_at_k(SIMILARITY, OWNER, ks=(1, 2, 3))
    assert scores == pytest.approx({"recall@1": 100 / 3, "recall@2": 200 / 3, "recall@3": 100})


def test_recall_of_images_does_not_count_own_texts_against_each_other():
    similarity = np.array([[3.0, 3.0, 2.0], [0.0, 0.0, 1.0]])
    assert text_recall_at_k(similarity, np.array([0, 0, 1]), ks=(1,)) == {"recall@1": 100}


@pytest.mark.parametrize("recall", [recall_at_k, text_recall_at_k])
@pytest.mark.parametrize("value", [0, -np.inf, np.nan])
def test_recall_takes_ties_and_nan_as_worst_rank(recall, value):
    scores = recall(np.full((4, 4), value, dtype=np.float32), np.arange(4), ks=(1, 3, 4))
    assert scores == {"recall@1": 0, "recall@3": 0, "recall@4": 100}


def test_recall_takes_every_image_with_an_identical_caption_as_right():
    captions = np.array(["a cat", "a dog", "a dog"])
    similarity = np.array([[0.9, 0.1, 0.2], [0.3, 0.4, 0.5], [0.2, 0.6, 0.5]])
    # text 1 is closer to image 2, which has the same caption; text 2 ties between the two
    assert recall_at_k(similarity, np.arange(3), ks=(1,))["recall@1"] == pytest.approx(100 / 3)
    assert recall_at_k(similarity, captions[:, None] == captions, ks=(1,)) == {"recall@1": 100}


def test_texts_fit_every_image_that_has_the_same_caption():
    right = same_caption(["a cat", "a dog", "a dog", "a cow"], np.array([0, 1, 0, 2]))
    assert right.tolist() == [[True, True, True, False], [False, True, True, False], [False, False, False, True]]


def test_retrieval_scores_take_images_and_texts_from_their_own_ranking():
    scores = retrieval_scores(SIMILARITY, retrieval._right_pairs(SIMILARITY, OWNER))
    assert scores["image_recall@1"] == 50 and scores["text_recall@1"] == pytest.approx(100 / 3)
    assert scores["recall_mean"] == pytest.approx((50 + 100 * 3 + 100 * 2 + 100 / 3 - 100) / 6)
    other = retrieval_scores(SIMILARITY, retrieval._right_pairs(SIMILARITY, OWNER), for_images=-SIMILARITY)
    assert other["text_recall@1"] == scores["text_recall@1"] and other["image_recall@1"] == 25


def test_recall_of_image_without_text_is_zero_at_any_k():
    assert text_recall_at_k(np.ones((2, 1)), np.array([0]), ks=(1, 5)) == {"recall@1": 50, "recall@5": 50}


def test_recall_equals_sorting_each_query():
    similarity = np.random.default_rng(0).standard_normal(
        (300, 600), dtype=np.float32
    )  # more than one chunk of queries
    owner = np.arange(600) // 2
    images_by_text, texts_by_image = np.argsort(-similarity, axis=0), np.argsort(-similarity, axis=1)
    texts = np.mean([owner[text] in images_by_text[:100, text] for text in range(600)])
    images = np.mean([image in owner[texts_by_image[image, :100]] for image in range(300)])
    assert recall_at_k(similarity, owner, ks=(100,)) == pytest.approx({"recall@100": 100 * texts})
    assert text_recall_at_k(similarity, owner, ks=(100,)) == pytest.approx({"recall@100": 100 * images})


@pytest.mark.parametrize("recall", [recall_at_k, text_recall_at_k])
@pytest.mark.parametrize(
    ("num_texts", "owner", "message"),
    [
        (3, [0, 1], r"found \(2,\) for a similarity of \(2, 3\)"),
        (3, [[True], [False]], r"found \(2, 1\)"),
        (3, [0, 1, 2], "0 to 1, found 0 to 2"),
        (3, [0, 1, -1], "0 to 1, found -1 to 1"),
        (0, [], "found 2 images and 0 texts"),
    ],
)
def test_recall_refuses_owner_that_does_not_fit(recall, num_texts, owner, message):
    with pytest.raises(ValueError, match=message):
        recall(np.zeros((2, num_texts)), np.array(owner))
