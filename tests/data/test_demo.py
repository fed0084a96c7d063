"""The built-in data set can be repeated, shares no scene between splits, and fits its tokenizer."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from blip_ft.data.demo import IMAGE_SIZE, load_demo
from blip_ft.modeling.small_blip import build_demo_config, build_demo_processor


@pytest.fixture(scope="module")
def small():
    return load_demo(num_train=60, num_eval=20, seed=1)


def test_same_seed_gives_the_same_data_and_another_seed_does_not(small):
    assert small["train"].to_list() == load_demo(60, 20, 1)["train"].to_list()
    assert small["train"]["question"] != load_demo(60, 20, 2)["train"]["question"]


def test_each_image_has_six_questions_and_a_caption(small):
    assert set(Counter(small["train"]["image_id"]).values()) == {6}
    assert len(small["train"]) == 360 and all(len(captions) == 1 for captions in small["train"]["captions"])


def test_no_scene_is_in_both_splits():
    """Scenes are compared, because the same scene can be drawn a few pixels apart."""
    images, scenes = {}, {}
    for name, rows in load_demo().items():
        first = rows.select(range(0, len(rows), 6))
        images[name] = {image["bytes"] for image in first["image"]}
        scenes[name] = {
            (captions[0], occupied_cells(image["bytes"]))
            for captions, image in zip(first["captions"], first["image"], strict=True)
        }
    for parts in (images, scenes):
        assert len(parts["train"]) == 3000 and len(parts["validation"]) == 300
        assert not parts["train"] & parts["validation"]


def occupied_cells(image):
    """Which quarters have a shape. The caption lists the shapes in this order."""
    pixels, half = np.asarray(Image.open(io.BytesIO(image))), IMAGE_SIZE // 2
    quarters = (pixels[y : y + half, x : x + half] for y in (0, half) for x in (0, half))
    return tuple(bool((quarter != (20, 20, 30)).any()) for quarter in quarters)


def test_answers_follow_from_the_caption(small):
    """The caption lists all shapes, so every question can be answered from it, except those about positions."""
    for row in small["train"]:
        caption, question, answer = row["captions"][0], row["question"], row["answers"][0]
        things = [thing.split() for thing in caption.replace(" and ", ", ").split(", ")]
        if question.startswith("how many"):
            assert answer == ("zero", "one", "two", "three")[len(things)]
        elif question.startswith("is there"):
            assert answer == ("yes" if question.split()[2:5] in things else "no")
        elif question.startswith("what color is the") and "shape in" not in question:
            assert ["a", answer, question.split()[4]] in things
        elif question.startswith("what shape is"):
            assert ["a", question.split()[3], answer] in things
        else:
            assert answer in caption


def test_tokenizer_knows_every_word(small):
    tokenizer = build_demo_processor().tokenizer
    rows = small["train"].to_list()
    texts = {text for row in rows for text in (row["question"], *row["answers"], *row["captions"])}
    for ids in tokenizer(sorted(texts))["input_ids"]:
        words = tokenizer.convert_ids_to_tokens(ids)
        assert "[UNK]" not in words and not any(word.startswith("##") for word in words)
    assert "[UNK]" not in tokenizer.tokenize("is this x-ray of 2019 abnormal?")


def test_small_model_fits_its_processor():
    config, processor = build_demo_config(), build_demo_processor()
    assert config.vision_config.image_size == IMAGE_SIZE == processor.image_processor.size["height"]
    assert config.text_config.vocab_size == len(processor.tokenizer) + 2
    assert config.text_config.bos_token_id == len(processor.tokenizer)
