"""Shared by the tests of BLIP-2 and InstructBLIP: the golden checkpoints, and questions about their images."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.models.blip_2 import modeling_blip_2
from transformers.models.instructblip import modeling_instructblip

from blip_ft.modeling import inference
from blip_ft.models import generate_answer_blip

STOCK = {
    "blip2_opt": modeling_blip_2.Blip2ForConditionalGeneration,
    "blip2_t5": modeling_blip_2.Blip2ForConditionalGeneration,
    "instructblip_vicuna": modeling_instructblip.InstructBlipForConditionalGeneration,
    "instructblip_t5": modeling_instructblip.InstructBlipForConditionalGeneration,
}
T5 = ("blip2_t5", "instructblip_t5")
DECODER_ONLY = ("blip2_opt", "instructblip_vicuna")
every_family = pytest.mark.parametrize("family", STOCK)
RED, BLUE = (Image.new("RGB", (40, 36), color) for color in ("red", "blue"))


def expected_of(golden, family):
    return json.loads((golden / family / "expected.json").read_text())


def questions_of(golden, family):
    prompts = expected_of(golden, family)["vqa"]["prompts"]
    return [prompt.removeprefix("Question: ").rsplit(" Short", 1)[0] for prompt in prompts]


def answers_of(golden, monkeypatch, family, model, processor, num_beams=5, max_length=10):
    """Answers to the golden questions. The golden pixels are noise, which no image file contains."""
    inputs = load_file(golden / family / "inputs.safetensors")
    monkeypatch.setattr(inference, "open_image", lambda image, size: int(image))
    monkeypatch.setattr(
        inference, "resize_to_uint8", lambda rows, _: inputs["pixel_values"][rows].to(model.vision_model.dtype)
    )
    images = [str(index) for index in inputs["vqa_image_index"].tolist()]
    questions = questions_of(golden, family)
    return generate_answer_blip(model, processor, images, questions, max_length=max_length, num_beams=num_beams)


def change_json(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


def stock_batch(golden, family, device="cpu"):
    """Two questions as transformers takes them: the placeholders of the image, the prompt, and for T5 the answer."""
    inputs, image_token = (
        load_file(golden / family / "inputs.safetensors"),
        expected_of(golden, family)["image_token_id"],
    )
    rows = {name: inputs[f"vqa_{name}"][[0, 3]] for name in ("input_ids", "attention_mask", "labels")}
    placeholders = torch.full((2, 4), image_token)
    batch = {
        "pixel_values": inputs["pixel_values"][:2],
        "input_ids": torch.cat([placeholders, rows["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(placeholders), rows["attention_mask"]], 1),
    }
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        if f"vqa_{name}" in inputs:
            batch[name] = inputs[f"vqa_{name}"][[0, 3]]
    if family in T5:
        batch["labels"] = rows["labels"]
    else:  # teach the prompt: any target does
        ids = batch["input_ids"]
        batch["labels"] = ids.masked_fill((ids == image_token) | (batch["attention_mask"] == 0), -100)
        batch["labels"][:, :6] = -100
    return batch


def logits_of(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def randomize_adapter(adapted):
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()
