"""The order of an epoch: every row once, images together, cut to whole batches."""

import numpy as np
import pytest

from blip_ft.data.sampling import GroupedSampler

IMAGES = np.repeat(np.arange(6), [3, 1, 4, 1, 5, 2])


def test_grouped_order_has_every_row_once_and_images_together():
    order = list(GroupedSampler(IMAGES, global_batch_size=4, seed=0))
    assert len(order) == 16 and sorted(order) == list(range(16))
    images = [IMAGES[row] for row in order]
    changes = sum(one != other for one, other in zip(images, images[1:], strict=False))
    assert changes == len(set(IMAGES)) - 1


def test_order_differs_per_epoch_and_repeats_per_seed():
    sampler, same = GroupedSampler(IMAGES, 1, seed=5), GroupedSampler(IMAGES, 1, seed=5)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first == list(same)
    assert list(GroupedSampler(IMAGES, 1, seed=6)) != first


def test_order_is_cut_to_whole_steps_and_each_epoch_drops_other_rows():
    sampler = GroupedSampler(IMAGES, 5, seed=0, group=False)
    cut = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) == 15 == len(set(rows))
        cut += set(range(16)) - set(rows)
    assert len(set(cut)) > 1


def test_ungrouped_order_is_a_plain_shuffle():
    rows = list(GroupedSampler(IMAGES, 1, seed=0, group=False))
    images = [IMAGES[row] for row in rows]
    assert sorted(rows) == list(range(16))
    assert sum(one != other for one, other in zip(images, images[1:], strict=False)) > len(set(IMAGES)) - 1


def test_batch_larger_than_the_data_names_the_largest_that_fits():
    with pytest.raises(ValueError, match="Choose at most 16"):
        GroupedSampler(IMAGES, 17, seed=0)


def test_order_given_in_several_chunks_has_every_row_once():
    order = list(GroupedSampler(np.repeat(np.arange(40_000), 5), 256, seed=0))
    assert len(order) == 200_000 // 256 * 256 == len(set(order)) and max(order) < 200_000
