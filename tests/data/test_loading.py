"""The rows of a run: bad rows are left out, limits apply, and images in two parts are counted."""

import json
import os
import shutil

import pandas as pd
import pyarrow
import pytest
from PIL import Image
from three_images import CAPTION_ROWS, ROWS, save_three_images, write_metadata

from blip_ft.arguments import DataArguments
from blip_ft.data.loading import ImageOverlap, load_captions, load_to_predict, load_vqa
from blip_ft.results.predictions import official_ids

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path):
    return save_three_images(tmp_path)


@pytest.mark.parametrize("check", ["full", "header"])
@pytest.mark.parametrize("load", [load_vqa, load_captions])
def test_images_both_trained_and_evaluated_on_are_counted(folder, tmp_path, caplog, load, check):
    """A link to the same file and a copy count; the same name or id in another source does not."""
    other = tmp_path / "other"
    other.mkdir()
    os.symlink(folder / "b.png", other / "b.png")
    shutil.copy(folder / "c.png", other / "copy.png")
    Image.new("RGB", (9, 9)).save(other / "a.png")
    write_metadata(folder, [{**row, "captions": ["a dog"], "image_id": row["file_name"][0]} for row in ROWS])
    rows = [("images/b.png", "x"), ("other/copy.png", "y"), ("other/a.png", "a")]
    rows = [{**ROWS[0], "file_name": name, "captions": ["a dog"], "image_id": number} for name, number in rows]
    write_metadata(tmp_path, rows, "rows.jsonl")
    where = {"dataset_name": str(folder), "eval_dataset_name": str(tmp_path / "rows.jsonl"), "check_images": check}
    _, evaluation = load(DataArguments(**where))
    # only a full check reads the files
    assert evaluation.image_overlap == ImageOverlap(2 if check == "full" else 1, 3, "x")
    assert (
        f"{evaluation.image_overlap.num_shared} of 3 images to evaluate on are also trained on, e.g. x" in caplog.text
    )
    # images of rows beyond max_train_samples are not trained on
    _, evaluation = load(DataArguments(**where, max_train_samples=1))
    assert evaluation.image_overlap == ImageOverlap(0, 3, None)


def test_image_in_bytes_is_the_same_as_its_file(folder, tmp_path):
    write_metadata(folder, ROWS)
    content = (folder / "b.png").read_bytes()
    rows = {"image": [{"bytes": content, "path": None}], "image_id": ["7"], "question": ["q ?"], "answers": [["x"]]}
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    args = DataArguments(dataset_name=str(folder), eval_dataset_name=str(tmp_path / "rows.parquet"))
    assert load_vqa(args)[1].image_overlap == ImageOverlap(1, 1, "7")


def test_same_id_in_two_splits_of_a_source_is_one_image(folder):
    rows = [{**ROWS[0], "split": "train", "image_id": 5}, {**ROWS[2], "split": "test", "image_id": 5}]
    write_metadata(folder, rows)
    args = DataArguments(dataset_name=str(folder), eval_split="test")
    assert load_vqa(args)[1].image_overlap == ImageOverlap(1, 1, "5")


def test_rows_without_ids_are_numbered_for_evaluation_servers(folder):
    write_metadata(folder, ROWS)
    rows, _ = load_to_predict(DataArguments(dataset_name=str(folder)), "vqa")
    assert official_ids("vqa", "vqa", rows) == [0, 1, 2, 3]


def test_sample_limits_take_the_first_rows(folder):
    write_metadata(folder, [{**row, "split": split} for split in ("train", "test") for row in ROWS])
    limits = {"max_train_samples": 2, "max_eval_samples": 1}
    train, evaluation = load_vqa(DataArguments(dataset_name=str(folder), eval_split="test", **limits))
    assert list(train["question"]) == ["what is it ?", "is it red ?"] and len(evaluation) == 1


def broken_rows(folder, tmp_path):
    """Rows that cannot be used, each with a part of the reason."""
    (folder / "empty.png").write_bytes(b"")
    noise = Image.effect_noise((64, 64), 50)
    noise.save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:1000])
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", folder / "link.png")
    images = {
        "empty.png": "cannot be read",
        "cut.png": "cannot be read",
        "text.png": "cannot be read",
        "missing.png": "cannot be read",
        "../outside.png": "is outside",
        str(tmp_path / "outside.png"): "is outside",
        "link.png": "is outside",
        "http://example.org/a.png": "is a URL",
    }
    rows = [({"file_name": name, "question": "what is it ?", "answers": ["x"]}, why) for name, why in images.items()]
    rows += [({**ROWS[0], "question": question}, "question is empty") for question in ("", "  ", None, 3)]
    rows += [({**ROWS[0], "answers": answers}, "answer is empty") for answers in ("", None, [])]
    return rows


def test_rows_that_cannot_be_used_are_left_out_counted_and_listed(folder, tmp_path):
    bad = broken_rows(folder, tmp_path)
    write_metadata(folder, [*(row for row, _ in bad), *ROWS])
    file = tmp_path / "run" / "bad_rows.jsonl"
    with pytest.raises(ValueError, match=f"(?s){len(bad)} of {len(bad) + 4} rows cannot be used.*max_bad_fraction"):
        load_vqa(DataArguments(dataset_name=str(folder)), file)
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["row"] for row in listed] == list(range(len(bad)))
    for (_, reason), row in zip(bad, listed, strict=True):
        assert reason in row["reason"]
    train, _ = load_vqa(DataArguments(dataset_name=str(folder), max_bad_fraction=1.0), file)
    assert set(train["image_id"]) <= {"a.png", "b.png", "c.png"}


def test_unreadable_image_stays_in_evaluation(folder):
    (folder / "b.png").write_bytes(b"")
    write_metadata(folder, [{**row, "split": split} for split in ("train", "test") for row in ROWS])
    train, evaluation = load_vqa(DataArguments(dataset_name=str(folder), eval_split="test", max_bad_fraction=1.0))
    assert "b.png" not in train["image_id"] and "b.png" in evaluation["image_id"]


def test_rows_stay_on_disk(folder):
    write_metadata(folder, [{**ROWS[0], "question_id": number} for number in range(20_000)])
    pyarrow.default_memory_pool().release_unused()
    before = pyarrow.total_allocated_bytes()
    args = {"dataset_name": str(folder), "eval_dataset_name": str(folder), "allow_image_overlap": True}
    train, _ = load_vqa(DataArguments(**args))
    assert len(train) == 20_000 and train.data.nbytes > 1_500_000
    assert pyarrow.total_allocated_bytes() - before < 100_000


def test_caption_limits_count_captions_to_train_and_images_to_evaluate_on(folder):
    write_metadata(folder, [{**row, "split": split} for split in ("train", "test") for row in CAPTION_ROWS])
    args = DataArguments(dataset_name=str(folder), eval_split="test", max_train_samples=2, max_eval_samples=2)
    train, evaluation = load_captions(args)
    assert [row["caption"] for row in train] == ["a dog", "a brown dog"]
    assert evaluation["captions"][:] == [["a dog", "a brown dog"], ["a cat"]]
