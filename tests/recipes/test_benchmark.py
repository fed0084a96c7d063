"""The benchmark compares equal work, and its table follows from what it measured."""

import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import RECIPES
from transformers import BlipConfig


@pytest.fixture(scope="module", autouse=True)
def files_beside_the_program():
    """`python recipes/benchmark.py` imports a file beside it; runpy does not look there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        yield


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


@pytest.fixture
def blip2_pair(benchmark):
    return benchmark["Blip2Pair"](benchmark["tiny_blip2"](), torch.device("cpu"), num_images=2)


def test_blip2_pair_has_the_same_weights_and_trains_only_lora(blip2_pair):
    stock, ours = (dict(model.named_parameters()) for model in (blip2_pair.stock, blip2_pair.ours))
    assert stock.keys() == ours.keys() and all(stock[name] is ours[name] for name in ours)
    assert type(blip2_pair.stock) is not type(blip2_pair.ours)
    trained = {name for name, parameter in ours.items() if parameter.requires_grad}
    assert trained == {name for name in ours if "lora_" in name}
    targets = {name.split(".lora_")[0] for name in trained}
    layers = [f"language_model.model.decoder.layers.{number}.self_attn" for number in range(2)]
    assert targets == {f"{layer}.{target}" for layer in layers for target in ("q_proj", "v_proj")}


def test_blip2_work_is_refused_when_the_losses_differ(blip2_pair):
    blip2_pair.require_equal_losses()
    losses = blip2_pair.ours.answer_losses
    blip2_pair.ours.answer_losses = lambda *batch: losses(*batch) * 1.01
    with pytest.raises(ValueError, match=r"The models do different work: the losses are .* \(stock\), .* \(ours\)"):
        blip2_pair.require_equal_losses()


def test_blip2_weights_without_image_encoder_are_those_of_the_other_parts(benchmark, blip2_pair):
    model = blip2_pair.ours
    total = benchmark["bytes_of"](model)
    freed = benchmark["bytes_of"](model.vision_model) + benchmark["bytes_of"](model.qformer)
    lines = benchmark["weights"](blip2_pair)
    assert benchmark["bytes_of"](model) == total - freed
    assert [line.split(";")[0] for line in lines] == ["| memory of the process", "| weights"]
    assert lines[1].endswith(f"| {100 * (total - freed) / total:.0f} % |")
    cached = blip2_pair.batches(5)["ours, cached features"]
    assert blip2_pair.step("ours, cached features", cached) > 0


def test_quick_blip2_benchmark_prints_and_writes_its_table(monkeypatch, capsys, tmp_path):
    flags = ["--family", "blip-2", "--quick", "--device", "cpu", "--output", str(tmp_path / "table.md")]
    program = str(RECIPES / "benchmark.py")
    started = []

    def run_in_this_process(command, **settings):
        started.append(command[1:])
        monkeypatch.setattr(sys, "argv", command[1:])
        runpy.run_path(program, run_name="__main__")
        assert float(capsys.readouterr().out.split()[-1]) >= 0  # 0 if the process has used as much memory before
        return SimpleNamespace(stdout="4\n" if command[-1] == "stock" else "1\n")

    monkeypatch.setattr("subprocess.run", run_in_this_process)
    monkeypatch.setattr(sys, "argv", [program, *flags])
    runpy.run_path(program, run_name="__main__")
    works = [line.split(" | ")[0] for line in (tmp_path / "table.md").read_text().splitlines()[4:]]
    ways = ["", ", cached features", ", not packed", ", cached features, not packed"]
    assert works == [
        *(f"| step, 1 question per image{way}, bf16, per question" for way in ways[:2]),
        *(f"| step, 5 questions per image{way}, bf16, per question" for way in ways),
        "| peak memory in addition to the model, step, 5 questions per image, bf16",
        "| memory of the process; ours: cached features, vision model and Q-Former freed",
        "| weights; ours: cached features, vision model and Q-Former freed",
    ]
    assert "| 0.00 GiB | 0.00 GiB | 25 % |" in (tmp_path / "table.md").read_text()
    same_pair = ["--family", "blip-2", "--device", "cpu", "--quick", "--images", "1", "--peak"]
    assert started == [[program, *same_pair, name] for name in ("stock", "ours")]
