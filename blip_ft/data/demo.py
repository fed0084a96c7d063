"""The built-in data set: colored shapes, drawn from a seed."""

from __future__ import annotations

import io
import random

from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PillowImage
from PIL import ImageDraw

IMAGE_SIZE = 64  # pixels per side

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 50),
    "purple": (150, 60, 180),
    "white": (240, 240, 240),
}

SHAPES = ("circle", "square", "triangle", "cross")

PLACES = ("top left", "top right", "bottom left", "bottom right")

NUMBERS = ("zero", "one", "two", "three")

# every image has each question once; the placeholders are filled from the scene
QUESTIONS = (
    "what color is the {shape} ?",
    "what shape is {color} ?",
    "how many shapes are there ?",
    "is there a {color} {shape} ?",
    "what is in the {place} ?",
    "what color is the shape in the {place} ?",
)

# cell -> (color, shape)
Scene = dict[int, tuple[str, str]]


def load_demo(num_train: int = 3000, num_eval: int = 300, seed: int = 0) -> DatasetDict:
    """The splits train and validation. Each image has six questions and one caption; no scene is in both splits.

    Columns: image (encoded PNG), image_id, question, question_id, answers, answer_type, captions.
    """
    generator = random.Random(seed)
    scenes: dict[tuple, Scene] = {}
    while len(scenes) < num_train + num_eval:
        scene = _draw_scene(generator)
        scenes.setdefault(tuple(sorted(scene.items())), scene)
    rows = [_rows_of(scene, f"demo-{seed}-{number}", generator) for number, scene in enumerate(scenes.values())]
    features = Features(
        {
            "image": Image(decode=False),
            **{name: Value("string") for name in ("image_id", "question", "question_id", "answer_type")},
            "answers": List(Value("string")),
            "captions": List(Value("string")),
        }
    )
    splits = {"train": rows[:num_train], "validation": rows[num_train:]}
    return DatasetDict(
        {name: Dataset.from_list([row for rows in part for row in rows], features) for name, part in splits.items()}
    )


def _draw_scene(generator: random.Random) -> Scene:
    """One to three shapes in different cells of a 2 x 2 grid, all with different colors and forms."""
    number = generator.choices((1, 2, 3), weights=(1, 8, 16))[0]
    cells = generator.sample(range(4), number)
    return dict(
        zip(
            cells,
            zip(generator.sample(list(COLORS), number), generator.sample(SHAPES, number), strict=True),
            strict=True,
        )
    )


def _rows_of(scene: Scene, image_id: str, generator: random.Random) -> list[dict]:
    cell = generator.choice(list(scene))
    color, shape = scene[cell]
    asked_color, asked_shape = color, shape
    if generator.random() < 0.5:  # ask for a shape and color that the image does not have
        while (asked_color, asked_shape) in scene.values():
            asked_color, asked_shape = generator.choice(list(COLORS)), generator.choice(SHAPES)
    filled = {"shape": shape, "color": color, "place": PLACES[cell]}
    asked = [
        (QUESTIONS[0].format(**filled), color, "other"),
        (QUESTIONS[1].format(**filled), shape, "other"),
        (QUESTIONS[2], NUMBERS[len(scene)], "number"),
        (
            QUESTIONS[3].format(color=asked_color, shape=asked_shape),
            "yes" if (asked_color, asked_shape) in scene.values() else "no",
            "yes/no",
        ),
        (QUESTIONS[4].format(**filled), f"a {color} {shape}", "other"),
        (QUESTIONS[5].format(**filled), color, "other"),
    ]
    things = [f"a {color} {shape}" for _, (color, shape) in sorted(scene.items())]
    caption = " and ".join([", ".join(things[:-1]), things[-1]] if things[1:] else things)
    image = {"bytes": _paint(scene, generator), "path": None}
    return [
        {
            "image": image,
            "image_id": image_id,
            "question": question,
            "question_id": f"{image_id}-{number}",
            "answers": [answer],
            "answer_type": answer_type,
            "captions": [caption],
        }
        for number, (question, answer, answer_type) in enumerate(asked)
    ]


def _paint(scene: Scene, generator: random.Random) -> bytes:
    """The image as PNG bytes. Position and size of each shape vary by a few pixels."""
    image = PillowImage.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (20, 20, 30))
    pen = ImageDraw.Draw(image)
    half = IMAGE_SIZE // 4
    for cell, (color, shape) in scene.items():
        x = (cell % 2) * 2 * half + half + generator.randint(-3, 3)
        y = (cell // 2) * 2 * half + half + generator.randint(-3, 3)
        r = generator.randint(9, 12)
        fill = COLORS[color]
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif shape == "square":
            pen.rectangle((x - r + 1, y - r + 1, x + r - 1, y + r - 1), fill=fill)
        elif shape == "triangle":
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
        else:
            pen.rectangle((x - r, y - 3, x + r, y + 3), fill=fill)
            pen.rectangle((x - 3, y - r, x + 3, y + r), fill=fill)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
