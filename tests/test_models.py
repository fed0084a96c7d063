"""Loading, freezing, counting, adapters."""

import json

import pytest
import torch
from PIL import Image

from blip_ft.arguments import PeftArguments
from blip_ft.collators import encode_images
from blip_ft.modeling import BlipForConditionalGeneration, BlipForQuestionAnswering
from blip_ft.models import ModelLoader, add_lora, count_parameters, freeze_model, load_model, unfreeze_model


def answers_of(model):
    inputs = {
        "pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32),
        "input_ids": torch.tensor([[101, 6, 7, 102], [101, 8, 5, 102]]),
        "labels": torch.tensor([[126, 28, 102], [126, 9, 102]]),
    }
    return model(**inputs).loss.item()


def test_load_gives_model_processor_and_its_parts(checkpoint):
    loaded = load_model(str(checkpoint), device="cpu")
    assert type(loaded["model"]) is BlipForQuestionAnswering and not loaded["model"].training
    assert loaded["tokenizer"] is loaded["processor"].tokenizer
    assert loaded["image_processor"] is loaded["processor"].image_processor
    assert list(load_model(str(checkpoint), load_processor=False)) == ["model"]


def test_task_chooses_the_class(golden, checkpoint, processor, tmp_path):
    BlipForConditionalGeneration.from_pretrained(golden / "captioning").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path))["model"]) is BlipForConditionalGeneration
    assert type(load_model(str(checkpoint), task="conditional_generation")["model"]) is BlipForConditionalGeneration


def test_resized_model_and_processor_agree(checkpoint):
    loaded = load_model(str(checkpoint), image_size=48)
    pixels = encode_images([Image.new("RGB", (10, 20))], loaded["image_processor"])
    assert pixels.shape == (1, 3, 48, 48)
    assert loaded["model"].encode_images(pixels).last_hidden_state.shape[1] == 37


def test_adapter_folder_loads_with_its_base_and_merges_without_changing_the_loss(checkpoint, tmp_path):
    model = load_model(str(checkpoint))["model"]
    base_loss = answers_of(model)
    adapted = add_lora(model, PeftArguments(use_peft=True))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.eval().save_pretrained(tmp_path)
    loss = answers_of(adapted)
    assert abs(loss - base_loss) > 1e-3
    assert answers_of(load_model(str(tmp_path))["model"]) == pytest.approx(loss, abs=1e-5)
    merged = load_model(str(tmp_path), merge=True)["model"]
    assert type(merged) is BlipForQuestionAnswering
    assert answers_of(merged) == pytest.approx(loss, abs=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"]["parent_library"] == "transformers.models.blip.modeling_blip"


def test_default_lora_leaves_the_tied_head_alone(checkpoint):
    adapted = add_lora(load_model(str(checkpoint))["model"], PeftArguments(use_peft=True))
    touched = {
        name.split(".lora_")[0].split("model.", 1)[1] for name, _ in adapted.named_parameters() if "lora_" in name
    }
    assert not any(".cls." in name for name in touched)
    # 2 vision layers x 4, and 2 layers of encoder and decoder x (2 attentions x 4 + 2)
    assert len(touched) == 2 * 4 + 2 * 2 * 10


def test_lora_target_that_is_not_there_is_refused(checkpoint):
    with pytest.raises(ValueError, match="lora_target_modules must name linear layers"):
        add_lora(load_model(str(checkpoint))["model"], PeftArguments(use_peft=True, lora_target_modules=["q_proj"]))


def test_freezing_matches_whole_dotted_parts_and_counts(checkpoint, caplog):
    model = load_model(str(checkpoint))["model"]
    total = count_parameters(model)["total"]
    assert total == sum(p.numel() for p in model.parameters()) == count_parameters(model)["trainable"]
    freeze_model(model, ["encoder.layer.0"])
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(".encoder.layer.0." in name for name in frozen)
    freeze_model(model)
    assert count_parameters(model) == {
        "total": total,
        "trainable": 0,
        "frozen": total,
        "total_millions": total / 1e6,
        "trainable_millions": 0.0,
    }
    unfreeze_model(model, ["text_decoder"])
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"text_decoder"}
    unfreeze_model(model, ["classifier"])
    assert "No parameter is named classifier; the parts are vision_model, text_encoder, text_decoder" in caplog.text


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_model_answers_and_keeps_its_tied_head(checkpoint, bits):
    loaded = load_model(str(checkpoint), **{f"load_in_{bits}bit": True}, device="cpu")
    model = loaded["model"]
    head = model.text_decoder.cls.predictions.decoder
    assert type(head) is torch.nn.Linear
    assert head.weight is model.text_decoder.bert.embeddings.word_embeddings.weight
    # parameters counted as if unpacked
    assert count_parameters(model)["total"] == count_parameters(load_model(str(checkpoint))["model"])["total"]
    ids = model.generate(torch.tensor([[101, 6, 7, 102]]), torch.randn(1, 3, 32, 32), max_length=6)
    assert ids[0, 0] == 126 and ids.shape[1] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, "Choose one width"),
        ({"task": "detection"}, "task must be one of vqa"),
        ({"model_type": "vilt"}, "model_type must be one of auto, blip"),
    ],
)
def test_arguments_that_cannot_work_are_refused(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_model(str(checkpoint), **arguments)


def test_loading_failures_say_what_to_check(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        load_model("/no/such/folder")
    with pytest.raises(ValueError, match="spelling .*network"):
        load_model("owner/no-such-model")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="found: notes.txt"):
        load_model(str(tmp_path))


def test_parts_asked_for_before_load_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"call load\(\) first"):
        ModelLoader(str(checkpoint)).get_model()
