"""Images of any kind are opened, and rows become batches."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blip_ft.arguments.families import BLIP
from blip_ft.data.collators import CaptionCollator, ImageCollator, RetrievalCollator, VqaCollator
from blip_ft.data.images import open_image, resize_to_uint8
from blip_ft.data.text_formats import texts_of
from blip_ft.data.texts import clean_caption, decode_texts, encode_labels


def as_bytes(image, format="PNG", **kwargs):
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


RED = Image.new("RGB", (6, 4), (200, 10, 10))


@pytest.mark.parametrize(
    ("data", "color"),
    [
        (as_bytes(RED), (200, 10, 10)),
        (as_bytes(RED.convert("L")), (67, 67, 67)),
        (as_bytes(RED.convert("LA")), (67, 67, 67)),
        (as_bytes(RED.convert("RGBA")), (200, 10, 10)),
        (as_bytes(RED.quantize(4), transparency=3), (200, 10, 10)),
        (as_bytes(RED.convert("CMYK"), "TIFF"), (200, 10, 10)),
        (as_bytes(Image.fromarray(np.full((4, 6), 32896, np.uint16))), (128, 128, 128)),
        (as_bytes(RED.convert("1")), None),
    ],
)
def test_image_of_any_mode_becomes_rgb(data, color):
    image = open_image({"bytes": data, "path": None})
    assert image.mode == "RGB" and image.size == (6, 4)
    if color:
        assert np.abs(np.asarray(image, int) - color).max() <= 1


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the left side of the stored image is its top
    stored = Image.new("RGB", (32, 16))
    stored.paste((255, 255, 255), (0, 0, 16, 16))
    upright = open_image(as_bytes(stored, "JPEG", exif=exif))
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4)) > (250, 250, 250) and upright.getpixel((8, 28)) < (5, 5, 5)


def test_path_bytes_and_image_are_the_same(tmp_path):
    RED.save(tmp_path / "red.png")
    expected = RED.tobytes()
    for image in (
        tmp_path / "red.png",
        str(tmp_path / "red.png"),
        {"bytes": None, "path": str(tmp_path / "red.png")},
        RED,
    ):
        assert open_image(image).tobytes() == expected
    with pytest.raises(ValueError, match="this row has no image"):
        open_image({"bytes": None, "path": None})


def test_large_jpeg_is_decoded_no_larger_than_needed():
    gradient = np.linspace(0, 255, 400 * 300 * 3).reshape(300, 400, 3).astype(np.uint8)
    encoded = as_bytes(Image.fromarray(gradient), "JPEG", quality=95)
    assert open_image(encoded).size == (400, 300)
    assert open_image(encoded, size=64).size == (100, 75)  # 1/4; 1/8 would be 50 x 37
    assert open_image(encoded, size=200).size == (400, 300)
    resized = [np.asarray(open_image(encoded, size).resize((64, 64)), int) for size in (None, 64)]
    assert np.abs(resized[0] - resized[1]).max() <= 4
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(as_bytes(Image.fromarray(gradient), "JPEG", exif=exif), size=64).size == (75, 100)


def test_encoded_images_equal_the_stock_processor(processor):
    images = [
        Image.fromarray(np.random.default_rng(0).integers(0, 256, size, np.uint8)) for size in ((50, 70, 3), (20, 9, 3))
    ]
    pixels = resize_to_uint8(images, processor.image_processor)
    assert pixels.dtype == torch.uint8
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    stock = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close((pixels / 255 - mean) / std, stock, atol=1e-6, rtol=0)


def test_decoding_stops_at_sep_and_drops_special_and_unknown_ids(processor):
    ids = torch.tensor([[126, 28, 6, 5, 102, 9, 9], [126, 127, 25, 0, 100, 102, 0]])
    assert decode_texts(ids, processor.tokenizer) == ["yes it is", "two"]


def test_labels_are_truncated_and_padded_with_minus_100(processor):
    labels = encode_labels(["two", "black and white dog"], processor.tokenizer, max_tokens=4)
    assert labels.shape == (2, 4) and labels[0].tolist() == [101, 25, 102, -100] and (labels[1] != -100).all()


def row(image_id, question, answers, image=RED):
    return {"image_id": image_id, "image": image, "question": question, "answers": answers}


def test_each_image_is_in_the_batch_once_and_answers_are_weighted_by_frequency(processor):
    rows = [
        row("x", "is it red ?", ["yes"] * 7 + ["no"] * 3),
        row("y", "what color ?", ["red"]),
        row("x", "how many ?", ["two", "three"]),
    ]
    batch = VqaCollator(processor)(rows)
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["image_index"].tolist() == [0, 1, 0]
    assert batch["question_index"].tolist() == [0, 0, 1, 2, 2]
    torch.testing.assert_close(batch["answer_weights"], torch.tensor([0.7, 0.3, 1.0, 0.5, 0.5]))
    assert decode_texts(batch["labels"].clamp(min=0), processor.tokenizer) == ["yes", "no", "red", "two", "three"]


def test_unreadable_image_is_gray_and_has_no_weight(processor, caplog):
    batch = VqaCollator(processor)([row("x", "is it ?", ["yes"], b"broken"), row("y", "is it ?", ["no"])])
    assert (batch["pixel_values"][0] == 128).all()
    assert batch["answer_weights"].tolist() == [0, 1]
    assert "image x cannot be read" in caplog.text


def test_long_questions_are_truncated(processor):
    batch = VqaCollator(processor, max_question_tokens=6)([row("x", "is it " * 1000, ["yes"])])
    assert batch["input_ids"].shape == (1, 6) and batch["input_ids"][0, -1] == 102


CAPTIONS = {"x": ["a red dog", "a dog"], "y": ["two people"]}


def caption_rows(**images):
    return [
        {"image_id": name, "image": images.get(name, RED), "caption": caption}
        for name, captions in CAPTIONS.items()
        for caption in captions
    ]


def test_prompt_and_padding_of_captions_are_not_targets(processor):
    batch = CaptionCollator(processor)(caption_rows())
    # [CLS] a picture of a red dog [SEP]
    assert batch["input_ids"][0].tolist() == [101, 1, 2, 3, 1, *processor.tokenizer("red dog")["input_ids"][1:]]
    assert batch["labels"][0].tolist() == [-100] * 4 + batch["input_ids"][0, 4:].tolist()
    assert batch["labels"][2].tolist() == [-100] * 4 + batch["input_ids"][2, 4:7].tolist() + [-100]
    assert batch["attention_mask"][2].tolist() == [1] * 7 + [0]
    assert len(batch["pixel_values"]) == 2 and batch["image_index"].tolist() == [0, 0, 1]


def test_collated_captions_are_the_inputs_of_the_original(golden, processor):
    expected = json.loads((golden / "captioning" / "expected.json").read_text())["texts"]
    inputs = load_file(golden / "captioning" / "inputs.safetensors")
    captions = [caption.removeprefix(expected["prompt"]) for caption in expected["caption"]]
    rows = [{"image_id": caption, "image": RED, "caption": caption} for caption in captions]
    texts = texts_of(processor, BLIP, "conditional_generation", expected["prompt"])
    batch = CaptionCollator(processor, texts=texts)(rows)
    assert batch["attention_mask"].equal(inputs["attention_mask"]) and batch["labels"].equal(inputs["labels"])
    # forward replaces the tokenizer's [CLS] by [DEC]
    assert batch["input_ids"][:, 1:].equal(inputs["input_ids"][:, 1:])


def test_captions_of_an_unreadable_image_are_not_targets(processor):
    batch = CaptionCollator(processor)(caption_rows(x=b"broken"))
    assert (batch["labels"][:2] == -100).all() and (batch["labels"][2] != -100).any()


def test_captions_are_cleaned_as_in_the_original_unless_clean_is_off(processor):
    assert clean_caption('A "Red" dog: it runs (fast)... #1!') == "a red dog it runs fast 1"
    assert clean_caption("dog's black-and-white tail; " * 20) == " ".join(["dog's", "black-and-white", "tail"] * 10)
    rows = [{"image_id": "x", "image": RED, "caption": "a dog , running ?"}]
    kept = [CaptionCollator(processor, clean=clean)(rows)["input_ids"].shape[1] for clean in (True, False)]
    assert kept == [10, 10]  # the original removes neither of these signs
    rows[0]["caption"] = "a dog . running !"
    kept = [CaptionCollator(processor, clean=clean)(rows)["input_ids"].shape[1] for clean in (True, False)]
    assert kept == [8, 10]


def test_evaluation_batch_has_only_images(processor):
    rows = [{"image_id": name, "image": RED, "captions": captions} for name, captions in CAPTIONS.items()]
    batch = ImageCollator(processor)([*rows, {**rows[0], "image_id": "z", "image": b"broken"}])
    assert set(batch) == {"pixel_values", "readable"}
    assert len(batch["pixel_values"]) == 3 and batch["readable"].tolist() == [True, True, False]


def test_retrieval_ids_are_equal_for_equal_images_in_every_batch(processor):
    collate = RetrievalCollator(processor)
    batch, other = collate(caption_rows()), collate(caption_rows()[2:])
    assert batch["image_ids"].shape == (2,) and batch["image_ids"].dtype == torch.int64
    assert batch["image_ids"][1] == other["image_ids"][0] != batch["image_ids"][0]
    assert batch["image_index"].tolist() == [0, 0, 1]
    # [CLS] comes first; forward replaces it by [ENC] if needed
    assert batch["input_ids"][:, 0].tolist() == [101] * 3


def test_row_with_unreadable_image_is_dropped_from_a_retrieval_batch(processor):
    batch = RetrievalCollator(processor)(caption_rows(x=b"broken"))
    assert len(batch["pixel_values"]) == len(batch["input_ids"]) == len(batch["image_ids"]) == 1
    with pytest.raises(ValueError, match="No image of a batch can be read"):
        RetrievalCollator(processor)(caption_rows(x=b"broken", y=b"broken"))
