"""The model card of BLIP-2 and InstructBLIP: its code runs with transformers alone, and its words are true."""

import re
import shutil

import pytest
import torch
from conftest import GOLDEN
from hub_server import front_matter_errors
from huggingface_hub import ModelCard

from blip_ft.arguments.families import family_of
from blip_ft.data.images import open_image, resize_to_uint8
from blip_ft.data.text_formats import texts_of
from blip_ft.models import load_model
from blip_ft.results.model_card import build_model_card

# task, checkpoint, further flags, tag, and words of the card
CASES = [
    ("vqa", "blip2_opt", ["--freeze", "none"], "blip-2", "OPT, under the OPT-175B license"),
    ("captioning", "blip2_t5", [], "blip-2", "Flan-T5, under Apache 2.0"),
    ("vqa", "instructblip_t5", [], "instructblip", "Flan-T5, under Apache 2.0"),
    ("captioning", "instructblip_vicuna", ["--use_peft"], "instructblip", "LLaMA, under the LLaMA license"),
]


def code_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize(("task", "name", "flags", "tag", "license"), CASES, ids=[case[1] for case in CASES])
def test_code_of_the_card_gives_with_transformers_alone_what_the_model_says_here(
    recipe, image_folder, monkeypatch, tmp_path, capsys, task, name, flags, tag, license
):
    data = ["--model_name_or_path", str(GOLDEN / name), "--dataset_name", str(image_folder), "--eval_split", "test"]
    few = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--learning_rate", "3e-3", "--warmup_steps", "0"]
    folder = recipe(*data, *few, *flags, "--skip_dry_run", task=task)
    card = ModelCard.load(folder / "README.md")
    family = "BLIP-2" if tag == "blip-2" else "InstructBLIP"
    words = {"vqa": "visual question answering", "captioning": "image captioning"}[task]
    assert f"{family} for {words}, " in card.text and f"{license}" in card.text
    assert {tag, "blip_ft"} <= set(card.data.tags) and "blip" not in card.data.tags
    assert front_matter_errors(str(card)) == []

    monkeypatch.chdir(tmp_path)  # the card names the model by the name of its folder, run
    shutil.copy(image_folder / "1.png", "cat.jpg")
    stock_code, own_code = code_of(card.text)
    stock: dict = {}
    capsys.readouterr()
    exec(compile(stock_code.replace('"BASE"', repr(str(GOLDEN / name))), "README.md", "exec"), stock)
    said = capsys.readouterr().out
    exec(compile(own_code, "README.md", "exec"), {})

    loaded = load_model(folder, device="cpu", merge=True)
    model, processor = loaded["model"], loaded["processor"]
    kind = {"vqa": "vqa", "captioning": "conditional_generation"}[task]
    texts = texts_of(processor, family_of(model.config), kind)
    tokens = texts.encode_questions(["what is it?"], 64) if task == "vqa" else texts.encode_caption_prompts(1)
    pixels = resize_to_uint8([open_image("cat.jpg")], processor.image_processor)
    with torch.no_grad():
        ids = model.generate(pixels, **tokens, **texts.generation(30 if task == "captioning" else 10, 1))
    (answer,) = texts.decode(ids)
    # the small tokenizer of Vicuna does not know that its </s> is special
    assert answer and said.replace("</s>", "").split() == answer.split()


def test_card_of_blip_names_no_language_model():
    card = build_model_card(
        *("tester/dogs", "vqa", "BLIP", "blip", "BlipForQuestionAnswering", False, None, "main", "dogs", [], "test"),
        scores={"eval_vqa_accuracy": 1.0}, notes={}, facts={}, arguments={}, prompt="{}",
    )  # fmt: skip
    assert "language model" not in card.text and 'processor(image, "what is it?", return' in card.text
