"""Baselines without images, and the lowest possible loss."""

import numpy as np
import pytest
import torch

from blip_ft.metrics.baselines import answer_without_images, chance_scores, smoothing_floor
from blip_ft.metrics.retrieval import retrieval_scores


def test_answer_without_images_goes_by_the_question_then_its_beginning_then_all():
    rows = [
        ("what color is the cat ?", ["red"]),
        ("What color is the cat", ["red", "blue"]),
        ("what color is the dog ?", ["blue"] * 3),
        ("is it a dog ?", ["yes"] * 5),
    ]
    asked = ["what color is the cat?", "what color is it ?", "how many ?", "what color", ""]
    assert answer_without_images(*zip(*rows, strict=True), asked) == ["red", "blue", "yes", "blue", "yes"]


def test_chance_is_the_mean_over_random_orders():
    # three texts, two of image 0 and one of image 1, and a text that fits both
    right = np.array([[True, True, False, True], [False, False, True, True]])
    generator = np.random.default_rng(0)
    drawn = [retrieval_scores(generator.random(right.shape), right) for _ in range(4000)]
    chance = chance_scores(right)
    for name, value in chance.items():
        assert value == pytest.approx(np.mean([scores[name] for scores in drawn]), abs=2)
    assert chance["text_recall@1"] == pytest.approx(100 * (3 / 4 + 2 / 4) / 2)
    assert chance["image_recall@1"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 1 / 2 + 1) / 4)
    assert chance_scores(np.eye(20, dtype=bool))["recall_mean"] == pytest.approx((5 + 25 + 50) / 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothing_floor_is_the_loss_of_the_best_logits(smoothing):
    logits = torch.zeros(1, 126, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(logits, torch.tensor([3]), label_smoothing=smoothing)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(loss)
    assert smoothing_floor(126, smoothing) == pytest.approx(loss().item(), abs=1e-4)
