"""The benchmark compares equal work, and its table follows from what it measured."""

import runpy

import pytest
import torch
from conftest import RECIPES
from transformers import BlipConfig


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(RECIPES / "benchmark.py"))


@pytest.fixture(scope="module")
def config():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 130, "bos_token_id": 128, "pad_token_id": 0, "sep_token_id": 102, "eos_token_id": 102}
    text = {**size, **ids, "encoder_hidden_size": 32, "label_smoothing": 0.1}
    return BlipConfig(vision_config={**size, "image_size": 32, "patch_size": 8}, text_config=text)


@pytest.fixture
def pair(benchmark, config):
    return benchmark["Pair"](config, torch.device("cpu"), num_images=2)


def test_work_is_refused_when_the_models_differ(pair):
    pair.require_equal_losses()
    with torch.no_grad():
        pair.stock.text_decoder.cls.predictions.bias.uniform_(0, 5)
    with pytest.raises(ValueError, match="The models do different work"):
        pair.require_equal_losses()


def test_each_group_gives_lines_of_the_table(benchmark, config, pair):
    device = torch.device("cpu")
    groups = [
        benchmark["steps"](pair, config, 1, (1, 5)),
        benchmark["frozen"](pair, 1),
        benchmark["answers"](pair, 1),
        benchmark["order"](),
    ]
    assert [len(lines) for lines in groups] == [6, 1, 1, 2]
    for line in (line for lines in groups for line in lines):
        assert line.startswith("| ") and line.count("|") == 5
    assert all(parameter.requires_grad for parameter in pair.stock.parameters())
    assert "torch" in benchmark["machine"](device)
    assert benchmark["peak_memory"]("ours", pair) >= 0


def test_row_gives_medians_spread_and_ratio(benchmark):
    taken = {"stock": [4.0, 2.0, 9.0], "ours": [1.0, 0.5, 2.0]}
    assert benchmark["row"]("x", taken, 0.5) == "| x | 2 s (1 to 4.5) | 0.5 s (0.25 to 1) | 4.00 x |"
