"""Rows are shared out among processes, and batches are matched with the rows that they are made of."""

import numpy as np
import pytest
import torch

from blip_ft.data.batches import match_rows
from blip_ft.data.sampling import share_of_process


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_each_row_belongs_to_one_process_and_rows_of_an_image_are_adjacent(num_processes):
    images = np.array([2, 0, 1, 2, 0, 3, 1])
    shares = [share_of_process(images, process, num_processes, done=[4]) for process in range(num_processes)]
    assert sum(shares, []) == [1, 2, 6, 0, 3, 5]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batches_keep_their_keys_if_the_last_one_is_smaller():
    batches = [{"readable": torch.tensor([True, False]), "x": torch.zeros(1)}, {"readable": torch.tensor([True])}]
    matched = list(match_rows(batches, ["a", "b", "c"]))
    assert [(keys, readable) for _, keys, readable in matched] == [(["a", "b"], [True, False]), (["c"], [True])]
    assert [list(batch) for batch, _, _ in matched] == [["x"], []]
