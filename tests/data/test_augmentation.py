"""Views of images are those of the original, and depend on the seed, the epoch and the image only."""

import io
import json
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TASKS, history_of, predictions_of
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from transformers import Trainer

from blip_ft.arguments import BlipTrainingArguments, DataArguments
from blip_ft.data.augmentation import OPERATIONS, Augmentation, View, build_augmentation, draw_box
from blip_ft.data.collators import CaptionCollator, RetrievalCollator, VqaCollator
from blip_ft.data.images import encode_row_images

EXPECTED = json.loads((GOLDEN / "augmentation" / "expected.json").read_text())
SIZES = {size: tuple(map(int, size.split("x"))) for size in EXPECTED["distribution"]["boxes"]}


def pixels_of(name: str) -> np.ndarray:
    return np.asarray(Image.open(GOLDEN / "augmentation" / "images" / name).convert("RGB"), int)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_gives_the_images_of_the_original(name):
    cases = [case for case in EXPECTED["cases"] if case["op"] == name]
    assert {case["level"] for case in cases} >= {5}
    largest, mean = EXPECTED["tolerance_max_mean"][name]
    for case in cases:
        operation = OPERATIONS[name]
        assert operation.signed == (case["sign"] != 0)
        argument = operation.argument(case["level"]) * (case["sign"] or 1)
        assert case["argument"] is None or argument == pytest.approx(case["argument"], abs=1e-12)
        image = Image.open(GOLDEN / "augmentation" / "images" / case["input"]).convert("RGB")
        ours = np.asarray(operation.apply(image, argument), int)
        # the original's AutoContrast as it was meant: as it ran, an overflow turned channels white
        difference = np.abs(ours - pixels_of(case.get("file_as_meant", case["file"])))
        if case.get("wrapped_values"):
            # the original's Sharpness exceeded 0 and 255 and wrapped around; here such values are cut off
            differs = difference > 0
            assert 0 < differs.sum() <= case["wrapped_values"] and set(ours[differs].tolist()) <= {0, 255}
            continue
        assert difference.max() <= largest and difference.mean() <= mean, case


@pytest.mark.parametrize("size", SIZES)
def test_boxes_are_distributed_as_in_the_original(size):
    (width, height), generator = SIZES[size], np.random.default_rng(0)
    boxes = np.array([draw_box(generator, width, height) for _ in range(20_000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= width and bottom.max() <= height
    found = {
        "area": (right - left) * (bottom - top) / (width * height),
        "aspect": (right - left) / (bottom - top),
        "center_x": (left + right) / 2 / width,
        "center_y": (top + bottom) / 2 / height,
    }
    expected = EXPECTED["distribution"]["boxes"][size]
    for name, values in found.items():
        assert values.mean() == pytest.approx(expected[name]["mean"], abs=0.004)
        for share in ("05", "25", "50", "75", "95"):
            assert np.quantile(values, int(share) / 100) == pytest.approx(expected[name][f"q{share}"], abs=0.01)


@pytest.fixture(scope="module")
def views() -> list[View]:
    augmentation = Augmentation(seed=0)
    return [augmentation.draw(str(number), (500, 500)) for number in range(20_000)]


def test_operations_and_flips_are_drawn_as_often_as_in_the_original(views):
    applied = [operation for view in views for operation in view.operations]
    assert len(applied) / len(views) == pytest.approx(1, abs=0.02)
    for number, share in enumerate((0.25, 0.5, 0.25)):
        assert sum(len(view.operations) == number for view in views) / len(views) == pytest.approx(share, abs=0.015)
    counts = Counter(name for name, _ in applied)
    negative = Counter(name for name, argument in applied if argument < 0)
    for name, operation in OPERATIONS.items():
        assert counts[name] / len(applied) == pytest.approx(0.1, abs=0.007)
        assert negative[name] / counts[name] == pytest.approx(0.5 if operation.signed else 0, abs=0.035)
    assert sum(view.flip for view in views) / len(views) == pytest.approx(0.5, abs=0.015)


def test_views_drawn_one_by_one_have_the_boxes_of_the_original(views):
    """Each view has a generator of its own, whose first numbers must be as random as those of a single one."""
    areas = [(right - left) * (bottom - top) / 500**2 for left, top, right, bottom in (view.box for view in views)]
    assert np.mean(areas) == pytest.approx(EXPECTED["distribution"]["boxes"]["500x500"]["area"]["mean"], abs=0.004)


def test_without_flip_no_view_is_flipped_and_nothing_else_changes(views):
    augmentation = Augmentation(seed=0, flip=False)
    for number, view in enumerate(views[:200]):
        assert augmentation.draw(str(number), (500, 500)) == View(view.box, False, view.operations)


def test_view_is_cut_resized_flipped_and_then_changed():
    image = Image.open(GOLDEN / "augmentation" / "images" / "natural0.png").convert("RGB")
    cut = image.crop((10, 20, 70, 90)).resize((48, 32), Image.Resampling.BICUBIC)
    expected = OPERATIONS["Equalize"].apply(OPERATIONS["Rotate"].apply(ImageOps.mirror(cut), -15), 0)
    view = View((10, 20, 70, 90), True, [("Rotate", -15), ("Equalize", 0)])
    assert view.apply(image, (48, 32), Image.Resampling.BICUBIC).tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_tiny_and_narrow_images_have_boxes_inside_them(size):
    for number in range(50):
        left, top, right, bottom = draw_box(np.random.default_rng(number), *size)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def jpeg_of(size: tuple[int, int], seed: int = 0) -> bytes:
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8))
    noise.resize(size).save(file := io.BytesIO(), "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [
        {"image": jpeg_of((48, 36), number), "image_id": f"{number}.jpg", "question": "is it ?", "answers": ["yes"]}
        for number in range(8)
    ]


def epochs_of(rows, collate, order, **loader) -> list[dict[str, torch.Tensor]]:
    """The pixels of each image in three epochs of a loader."""
    loader = DataLoader([rows[number] for number in order], collate_fn=lambda rows: (rows, collate(rows)), **loader)
    epochs = []
    for epoch in range(3):
        collate.augmentation.set_epoch(epoch)
        images = [pair for rows, batch in loader for pair in zip(rows, batch["pixel_values"], strict=True)]
        epochs.append({row["image_id"]: pixels for row, pixels in images})
    return epochs


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[bool]:
    return [torch.equal(one[name], other[name]) for name in one]


@pytest.mark.parametrize(
    "loader",
    [
        {"num_workers": 0, "batch_size": 3},
        {"num_workers": 1, "batch_size": 1, "multiprocessing_context": "fork"},
        {"num_workers": 2, "batch_size": 2, "multiprocessing_context": "fork", "persistent_workers": True},
    ],
    ids=lambda loader: f"{loader['num_workers']} workers",
)
def test_views_are_the_same_for_any_workers_batches_and_order_but_not_for_other_epochs(rows, processor, loader):
    expected = epochs_of(rows, VqaCollator(processor, augmentation=Augmentation(3)), range(8), batch_size=8)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not any(equal(expected[first], expected[second]))
    found = epochs_of(rows, VqaCollator(processor, augmentation=Augmentation(3)), (5, 2, 7, 0, 1, 6, 3, 4), **loader)
    assert all(all(equal(*pair)) for pair in zip(expected, found, strict=True))


def test_epoch_reaches_copies_of_a_collator_in_spawned_workers(rows, processor):
    collator = VqaCollator(processor, augmentation=Augmentation(3))
    copied = ForkingPickler.loads(ForkingPickler.dumps(collator))
    first = copied(rows)["pixel_values"]
    collator.augmentation.set_epoch(1)
    assert not torch.equal(copied(rows)["pixel_values"], first)
    assert torch.equal(copied(rows)["pixel_values"], collator(rows)["pixel_values"])


def test_other_seeds_and_images_have_other_views(rows, processor):
    image_processor = processor.image_processor
    same = [{**row, "image": rows[0]["image"]} for row in rows]
    pixels = encode_row_images(same, image_processor, Augmentation(0))["pixel_values"]
    assert len(pixels.flatten(1).unique(dim=0)) == 8
    assert not torch.equal(encode_row_images(same, image_processor, Augmentation(1))["pixel_values"], pixels)
    assert torch.equal(encode_row_images(same, image_processor, Augmentation(0))["pixel_values"], pixels)


def test_rows_of_an_image_share_its_view_and_the_epoch_of_a_row_comes_first(rows, processor):
    augmentation = Augmentation(0)
    batch = encode_row_images([*rows, *rows], processor.image_processor, augmentation)
    assert len(batch["pixel_values"]) == 8 and batch["image_index"].tolist() == [*range(8), *range(8)]
    streamed = encode_row_images([{**row, "epoch": 4} for row in rows], processor.image_processor, augmentation)
    assert not torch.equal(streamed["pixel_values"], batch["pixel_values"])
    augmentation.set_epoch(4)
    batch = encode_row_images(rows, processor.image_processor, augmentation)
    assert torch.equal(streamed["pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize("collate", [VqaCollator, CaptionCollator, RetrievalCollator])
def test_collators_augment_and_unreadable_images_stay_gray_or_are_left_out(rows, processor, collate):
    batch = [{**row, "caption": "a dog"} for row in rows]
    batch[2] = {**batch[2], "image": b"broken"}
    readable = [batch[number] for number in (0, 1, 3, 4, 5, 6, 7)]
    expected = encode_row_images(readable, processor.image_processor, Augmentation(0))["pixel_values"]
    pixels = collate(processor, augmentation=Augmentation(0))(batch)["pixel_values"]
    if collate is not RetrievalCollator:
        assert (pixels[2] == 128).all()
        pixels = torch.cat([pixels[:2], pixels[3:]])
    assert torch.equal(pixels, expected)
    assert not torch.equal(pixels, encode_row_images(readable, processor.image_processor)["pixel_values"])


def test_jpeg_is_decoded_at_twice_the_size_when_augmenting(processor, monkeypatch):
    seen = []
    draw = Augmentation.draw
    monkeypatch.setattr(
        *(Augmentation, "draw"), lambda self, name, size, epoch: seen.append(size) or draw(self, name, size, epoch)
    )
    for size in ((520, 400), (260, 200), (60, 40)):  # of images 32 pixels wide
        encode_row_images([{"image": jpeg_of(size), "image_id": "x"}], processor.image_processor, Augmentation(0))
    # 1/4 and 1/2; without augmentation they would be decoded at 65 x 50
    assert seen == [(130, 100), (130, 100), (60, 40)]


def test_augmentation_takes_its_settings_from_the_arguments(tmp_path):
    training = BlipTrainingArguments(output_dir=str(tmp_path), use_cpu=True, seed=3)
    assert build_augmentation(DataArguments(dataset_name="demo"), training) is None
    data = DataArguments(dataset_name="demo", augment=True)
    built = build_augmentation(data, training)
    assert (built.seed, built.flip) == (3, True)
    training.data_seed, data.flip = 0, False
    built = build_augmentation(data, training)
    assert (built.seed, built.flip) == (0, False)


@pytest.mark.parametrize("task", TASKS)
def test_run_trains_on_other_views_in_each_epoch_and_evaluates_whole_images(
    recipe, data_of, tmp_path, monkeypatch, task
):
    seen = []  # the images of each step
    step = Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        seen.append({image.numpy().tobytes() for image in inputs["pixel_values"]})
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    # each epoch is one batch of all rows, and the weights do not change
    common = [*data_of(task), "--learning_rate", "0", "--num_train_epochs", "3"]
    plain, augmented = (
        recipe(*common, *flags, output_dir=tmp_path / f"run {len(flags)}", task=task) for flags in ([], ["--augment"])
    )
    assert predictions_of(plain) == predictions_of(augmented)
    whole, *views = seen[2:]
    assert seen[0] == seen[1] == whole and len(views) == 3
    assert all(whole != view for view in views) and len(set(map(frozenset, views))) == 3


def test_epoch_reaches_the_persistent_workers_of_a_run(recipe, data_of, tmp_path, monkeypatch):
    common = [*data_of("vqa"), "--augment", "--num_train_epochs", "3", "--logging_steps", "1"]
    expected = history_of(recipe(*common, output_dir=tmp_path / "none"))
    # recipe() takes no workers
    monkeypatch.setattr(BlipTrainingArguments, "dataloader_num_workers", property(lambda _: 1, lambda *_: None))
    found = history_of(recipe(*common, "--dataloader_persistent_workers", output_dir=tmp_path / "one"))
    assert [entry["loss"] for entry in found] == [entry["loss"] for entry in expected]
