"""A folder of three images, rows about them, and what is loaded of them. Used by the tests of the data wing."""

import json

from PIL import Image

from blip_ft.arguments import DataArguments
from blip_ft.data.loading import load_vqa

ROWS = [
    {"file_name": "a.png", "question": "what is it ?", "answers": ["a dog", "dog"]},
    {"file_name": "a.png", "question": "is it red ?", "answers": ["yes"]},
    {"file_name": "b.png", "question": "how many ?", "answers": ["2"]},
    {"file_name": "c.png", "question": "what color ?", "answers": ["red"]},
]

CAPTION_ROWS = [
    {"file_name": "a.png", "caption": "a dog"},
    {"file_name": "b.png", "caption": "a cat"},
    {"file_name": "a.png", "caption": "a brown dog"},
    {"file_name": "a.png", "caption": "a dog"},
    {"file_name": "c.png", "caption": "a cat"},
]


def save_three_images(tmp_path):
    """The folder `images` with a.png, b.png and c.png, and no metadata file yet."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate("abc"):
        Image.new("RGB", (20, 10), (80 * number, 0, 0)).save(folder / f"{name}.png")
    return folder


def write_metadata(folder, rows, name="metadata.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def load_all(**kwargs):
    """All rows, both training and held out, in the order of ROWS."""
    train, held_out = load_vqa(DataArguments(**{"max_bad_fraction": 1.0, **kwargs}))
    rows = [*train, *held_out]
    return sorted(rows, key=lambda row: [given["question"] for given in ROWS].index(row["question"]))


def captions_of(train, evaluation):
    """The captions of each image in both parts together: image_id -> captions."""
    found = {row["image_id"]: row["captions"] for row in evaluation}
    for row in train:
        found.setdefault(row["image_id"], []).append(row["caption"])
    return found
