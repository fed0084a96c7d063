"""Ranking pictures and texts against each other."""

import numpy as np
import pytest
import torch

from blip_ft.inference import rank_pairs
from blip_ft.modeling import BlipForImageTextRetrieval

OWNER = np.array([0, 0, 1, 2, 2, 2, 3])  # the picture of each of seven texts


@pytest.fixture
def ranked(golden):
    """Runs rank_pairs as the trainer does, two pictures a batch, and gives what a slow computation is made of."""
    model = BlipForImageTextRetrieval.from_pretrained(golden / "retrieval")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 90, (7, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(3, 7, (7, 1), generator=generator)).long()

    def collect(predict, description, unreadable=()):
        with torch.no_grad():
            batches = [predict(model, {"pixel_values": pixels[rows]}, rows) for rows in ([0, 1], [2, 3])]
        return [
            None if row in unreadable else result for row, result in enumerate(result for b in batches for result in b)
        ]

    return model, pixels, ids * mask, mask, collect


def test_ranking_equals_scoring_every_pair(ranked):
    model, pixels, ids, mask, collect = ranked
    with torch.no_grad():
        stock = [
            model(pixels[[image]].repeat(7, 1, 1, 1), ids, mask, use_itm_head=True).itm_score[:, 1]
            for image in range(4)
        ]
        wanted = model(pixels, ids, mask, image_index=torch.arange(4), use_itm_head=False).itm_score.numpy()
    logits = torch.stack(stock).numpy()
    cosines, for_texts, for_images = rank_pairs(collect, OWNER, ids, mask, k=2)
    np.testing.assert_allclose(cosines, wanted, atol=1e-6)
    for image in range(4):
        best = np.argsort(-wanted[image])[:2]
        np.testing.assert_allclose(for_texts[image, best], (wanted + logits)[image, best], atol=1e-5)
        assert np.isneginf(np.delete(for_texts[image], best)).all()
    for text in range(7):
        best = np.argsort(-wanted[:, text])[:2]
        np.testing.assert_allclose(for_images[best, text], (wanted + logits)[best, text], atol=1e-5)
        assert np.isneginf(np.delete(for_images[:, text], best)).all()


def test_unreadable_picture_is_found_by_nothing_and_finds_nothing(ranked):
    _, _, ids, mask, collect = ranked
    scores = rank_pairs(lambda *args: collect(*args, unreadable=(2,)), OWNER, ids, mask, k=100)
    for matrix in scores:
        assert np.isneginf(matrix[2]).all() and np.isneginf(matrix[:, 3:6]).all()
        assert np.isfinite(np.delete(matrix, 2, axis=0)[:, [0, 1, 2, 6]]).all()
    with pytest.raises(ValueError, match="No picture to evaluate on can be read"):
        rank_pairs(lambda *args: collect(*args, unreadable=range(4)), OWNER, ids, mask, k=1)
