"""Random views of training images: cropped, flipped, and changed by RandAugment."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from blip_ft.arguments import BlipTrainingArguments, DataArguments

SCALE = (0.5, 1.0)  # share of the image's area that a crop keeps
RATIO = 4 / 3  # of the longer side of a crop to the shorter one, at most
LEVEL = 5  # strength of the operations, 0 to 10
NUM_OPERATIONS, PROBABILITY = 2, 0.5  # drawn for each view, and of each of them to be applied
GRAY = (128, 128, 128)

Box = tuple[int, int, int, int]  # left, top, right, bottom


def transform(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Move the content of an image. Gray fills what comes from outside, and is blended with the edge.

    Args:
        matrix: a, b, c, d, e, f. The pixel at (x, y) is read from (ax + by + c, dx + ey + f), and whole numbers are the
            middles of pixels.
    """
    a, b, c, d, e, f = matrix
    # Pillow repeats the last pixel up to the edge; with a frame of one gray pixel, it blends it with gray instead
    framed = ImageOps.expand(image, 1, GRAY)
    # Pillow counts from the corner of the first pixel, so its middle is at 0.5, and in the framed image at 1.5
    moved = (a, b, c + 1.5 - (a + b) / 2, d, e, f + 1.5 - (d + e) / 2)
    return framed.transform(image.size, Image.Transform.AFFINE, moved, Image.Resampling.BILINEAR, fillcolor=GRAY)


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Rotate counter-clockwise about (width / 2, height / 2), counted from the middle of the first pixel."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    x, y = image.width / 2, image.height / 2
    return transform(image, (cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y))


@dataclass(frozen=True)
class Operation:
    """An operation of RandAugment.

    Args:
        apply: takes an image and an argument.
        strongest: the argument of level 10.
        weakest: the argument of level 0.
        signed: whether half of the arguments are negative.
    """

    apply: Callable[[Image.Image, float], Image.Image]
    strongest: float = 0.0
    weakest: float = 0.0
    signed: bool = False

    def argument(self, level: int) -> float:
        return level / 10 * (self.strongest - self.weakest) + self.weakest


OPERATIONS = {
    "Identity": Operation(lambda image, _: image),
    "AutoContrast": Operation(lambda image, _: ImageOps.autocontrast(image)),
    "Brightness": Operation(lambda image, factor: ImageEnhance.Brightness(image).enhance(factor), 1.9, 0.1),
    "Sharpness": Operation(lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor), 1.9, 0.1),
    "Equalize": Operation(lambda image, _: ImageOps.equalize(image)),
    "ShearX": Operation(lambda image, shift: transform(image, (1, -shift, 0, 0, 1, 0)), 0.3, signed=True),
    "ShearY": Operation(lambda image, shift: transform(image, (1, 0, 0, -shift, 1, 0)), 0.3, signed=True),
    "TranslateX": Operation(lambda image, pixels: transform(image, (1, 0, pixels, 0, 1, 0)), 10, signed=True),
    "TranslateY": Operation(lambda image, pixels: transform(image, (1, 0, 0, 0, 1, pixels)), 10, signed=True),
    "Rotate": Operation(rotate, 30, signed=True),
}
NAMES = tuple(OPERATIONS)


@dataclass(frozen=True)
class View:
    """What was drawn for one view of an image.

    Args:
        operations: names in OPERATIONS with their arguments, in the order in which they are applied.
    """

    box: Box
    flip: bool
    operations: list[tuple[str, float]]

    def apply(self, image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
        # cut first: resize(box=...) would also read the pixels around the box
        image = image.crop(self.box).resize(size, resample)
        if self.flip:
            image = ImageOps.mirror(image)
        for name, argument in self.operations:
            image = OPERATIONS[name].apply(image, argument)
        return image


@dataclass
class Augmentation:
    """Draws views of images that depend only on the seed, the epoch, and the id and size of the image.

    They are the same for any number of workers and processes, in any order, and in a resumed run.

    Source: BLIP data/__init__.py create_dataset and transform/randaugment.py. Unlike there, AutoContrast does not turn
    channels white through an overflow, Sharpness does not wrap, and the questions of an image share its view.
    """

    seed: int
    flip: bool = True
    # in shared memory: persistent workers copy a collator only once, and each epoch must reach them
    _epoch: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def draw(self, image_id: str, size: tuple[int, int], epoch: int | None = None) -> View:
        """Draw the view of one epoch.

        Args:
            size: width and height of the image.
            epoch: default that of set_epoch.
        """
        number = int.from_bytes(hashlib.sha1(image_id.encode()).digest(), "big")
        generator = np.random.default_rng((self.seed, self._epoch.item() if epoch is None else epoch, number))
        box = draw_box(generator, *size)
        flip = generator.random() < 0.5 and self.flip
        operations = []
        for _ in range(NUM_OPERATIONS):
            name = NAMES[generator.integers(len(NAMES))]
            is_applied, is_negative = generator.random() < PROBABILITY, generator.random() < 0.5
            argument = OPERATIONS[name].argument(LEVEL)
            if is_applied:
                operations.append((name, -argument if is_negative and OPERATIONS[name].signed else argument))
        return View(box, flip, operations)


def draw_box(generator: np.random.Generator, width: int, height: int) -> Box:
    """Draw the part of an image to cut out: after ten boxes that do not fit, the largest one in its middle.

    Source: torchvision 0.28 RandomResizedCrop.get_params.
    """
    for _ in range(10):
        area = width * height * generator.uniform(*SCALE)
        ratio = RATIO ** generator.uniform(-1, 1)  # width / height; its logarithm is uniform
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(generator.integers(room + 1)) for room in (width - w, height - h))
            return left, top, left + w, top + h
    w, h = min(width, round(height * RATIO)), min(height, round(width * RATIO))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def build_augmentation(data_args: DataArguments, training_args: BlipTrainingArguments) -> Augmentation | None:
    """The augmentation of --augment, for training collators; None without it."""
    return Augmentation(training_args.order_seed, data_args.flip) if data_args.augment else None
