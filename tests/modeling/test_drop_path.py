"""Stochastic depth: numbers of the original, and where it is off."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from test_contrastive import pairs_of
from test_golden import CLASSES, batch_of, expected_of
from transformers import BlipVisionConfig, BlipVisionModel

from blip_ft.arguments import PeftArguments
from blip_ft.modeling.adapters import add_lora, freeze_model
from blip_ft.modeling.blip import drop_path
from blip_ft.modeling.blip.contrastive import Contrastive
from blip_ft.modeling.blip.drop_path import drop_images, set_drop_path
from blip_ft.models import load_model, save_model
from blip_ft.training.feature_cache import require_constant_features

# (rate, seed) -> loss of the original in train mode, models/vit.py with timm 0.4.12
LOSSES = {
    **{(0.1, 0): 4.780005, (0.1, 1): 5.012943, (0.1, 2): 5.034690},
    **{(0.5, 0): 4.201720, (0.5, 1): 5.601803, (0.5, 2): 4.292269},
}


def load(golden: Path, rate: float | None = 0.5, task: str = "vqa", **settings):
    model = load_model(str(golden / task), drop_path=rate, device="cpu", load_processor=False, **settings)["model"]
    return model.train()


def loss_of(model, batch, seed=0) -> float:
    torch.manual_seed(seed)
    return model(**batch).loss.item()


@pytest.fixture
def draws(monkeypatch):
    """How many images each call has dropped states of, in a list."""
    calls = []

    def drop(states, rate, run=drop_images):
        calls.append(len(states))
        return run(states, rate)

    monkeypatch.setattr(drop_path, "drop_images", drop)
    return calls


@pytest.mark.parametrize(("rate", "seed"), LOSSES)
def test_losses_equal_the_original(golden, rate, seed):
    assert loss_of(load(golden, rate), batch_of(golden, "vqa"), seed) == pytest.approx(LOSSES[rate, seed], abs=1e-5)


@pytest.mark.parametrize(("layers", "second", "middle"), [(12, 0.009091, 0.045455), (24, 0.004348, 0.047826)])
def test_rates_rise_linearly_as_in_the_original(layers, second, middle):
    config = BlipVisionConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=layers)
    with torch.device("meta"):
        vision = BlipVisionModel(config)
        set_drop_path(vision, 0.1)
    rates = [layer.drop_path for layer in vision.encoder.layers]
    assert [rates[0], rates[1], rates[layers // 2 - 1], rates[-1]] == pytest.approx([0, second, middle, 0.1], abs=1e-6)
    assert rates == pytest.approx([0.1 * number / (layers - 1) for number in range(layers)], abs=1e-8)
    assert {type(layer).__name__ for layer in vision.encoder.layers} == {"BlipEncoderLayer"}  # FSDP looks for it


def test_an_image_is_drawn_for_once_for_all_its_questions(golden, draws):
    model, batch = load(golden), batch_of(golden, "vqa")
    twice = {name: batch[name].repeat_interleave(2, 0) for name in ("input_ids", "attention_mask")}
    answers = {"labels": batch["labels"][:6], "question_index": torch.arange(6)}
    model(batch["pixel_values"], image_index=torch.arange(3).repeat_interleave(2), **twice, **answers)
    assert draws == [3, 3]  # before attention and before the feed-forward of the second layer; the first has rate 0


def test_evaluation_and_rate_zero_draw_nothing(golden, draws):
    batch = batch_of(golden, "vqa")
    expected = pytest.approx(expected_of(golden, "vqa")["loss"], abs=1e-5)
    assert loss_of(load(golden).eval(), batch) == loss_of(load(golden, 0.0), batch) == expected
    assert loss_of(load(golden, None), batch) == expected
    assert draws == []


def test_frozen_layers_drop_nothing(golden, draws):
    model = load(golden)
    freeze_model(model, ["vision_model"])
    loss_of(model, batch_of(golden, "vqa"))
    assert require_constant_features(model) == "vision" and draws == []


@pytest.mark.parametrize(("layers", "dropped"), [(["qkv", "query"], [3, 3]), (["query"], [])])
def test_a_layer_with_an_adapter_counts_as_trained(golden, draws, layers, dropped):
    model = add_lora(load(golden), PeftArguments(use_peft=True, lora_target_modules=layers))
    loss_of(model.train(), batch_of(golden, "vqa"))
    assert draws == dropped


def test_kept_images_are_scaled_and_dropped_ones_are_zero_in_any_precision():
    states = torch.ones(2000, 2, 3, dtype=torch.bfloat16)
    dropped = drop_images(states, 0.1)
    assert dropped.dtype == torch.bfloat16
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.9, dtype=torch.bfloat16).item()}
    of_image = dropped.flatten(1)
    assert (of_image == of_image[:, :1]).all()
    # 200 expected, with a standard deviation of 13
    assert 150 < (of_image[:, 0] == 0).sum() < 250


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_leaves_loss_and_gradient_unchanged(golden, use_reentrant):
    results = []
    for enabled in (False, True):
        model, batch = load(golden), batch_of(golden, "vqa")
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        loss = model(**batch).loss
        torch.rand(7)  # recomputing must restore the random state
        loss.backward()
        results.append((loss.item(), model.vision_model.encoder.layers[0].mlp.fc1.weight.grad))
    assert results[0][0] == results[1][0] == pytest.approx(LOSSES[0.5, 1], abs=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-6, rtol=0)


def test_momentum_encoder_of_retrieval_drops_with_draws_of_its_own(golden, draws):
    model, batch = load(golden, task="retrieval"), pairs_of([1, 1, 2])
    batch["pixel_values"] = batch["pixel_values"].float()
    model.contrastive = Contrastive(model, queue_size=7)
    output = model(**batch)
    assert draws == [3, 3, 3, 3]
    keys = model.contrastive.image_queue[:4]
    # the momentum weights are still those of the model, so without other draws its features would be the same
    assert not torch.allclose(keys, output.image_features[batch["image_index"]], atol=1e-4)
    draws.clear()
    freeze_model(model, ["vision_model"])
    model.contrastive = Contrastive(model, queue_size=7)
    model(**batch)
    assert draws == []


@pytest.mark.parametrize("task", [*CLASSES, "retrieval"])
def test_rate_is_saved_and_stock_transformers_loads_the_folder(golden, tmp_path, task):
    model = load(golden, 0.25, task)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vision_config"]["drop_path"] == 0.25
    again = load(tmp_path, None, ".")
    assert [layer.drop_path for layer in again.vision_model.encoder.layers] == [0.0, 0.25]
    stock_class = getattr(transformers, type(model).__name__)
    stock, info = stock_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = torch.rand(2, 3, 32, 32)
    ours = model.eval().vision_model(pixels).last_hidden_state
    torch.testing.assert_close(stock.vision_model(pixels).last_hidden_state, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rate", [1, -0.1, None])
def test_impossible_rate_in_a_config_is_refused(golden, copied, rate):
    folder = copied("vqa")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["drop_path"] = rate
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json"):
        load(folder, None, ".")
