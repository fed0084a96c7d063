"""The right rows are used to train, evaluate and test, and no image is held out and trained on."""

import json
import os
import shutil

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image
from three_images import CAPTION_ROWS, ROWS, save_three_images, write_metadata

from blip_ft.arguments import DataArguments
from blip_ft.data import sources
from blip_ft.data.images import open_image
from blip_ft.data.loading import ImageOverlap, load_captions, load_splits, load_vqa

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path):
    return save_three_images(tmp_path)


def test_split_column_selects_rows_and_an_unknown_split_lists_the_known_ones(folder):
    write_metadata(
        folder, [{**row, "split": split} for row, split in zip(ROWS, ["train", "test", "train", "test"], strict=True)]
    )
    train, evaluation = load_vqa(DataArguments(dataset_name=str(folder), eval_split="test"))
    assert [len(train), len(evaluation)] == [2, 2]
    assert list(evaluation["question"]) == ["is it red ?", "what color ?"]
    with pytest.raises(ValueError, match="The split 'dev' does not exist; the data has train, test"):
        load_vqa(DataArguments(dataset_name=str(folder), eval_split="dev"))


def test_saved_dataset_dict_has_named_splits(folder, tmp_path):
    rows = Dataset.from_list(ROWS)

    DatasetDict({"train": rows, "validation": rows.select([0])}).save_to_disk(tmp_path / "saved")
    assert set(load_from_disk(tmp_path / "saved")) == {"train", "validation"}
    where = {"dataset_name": str(tmp_path / "saved"), "image_folder": str(folder)}
    train, evaluation = load_vqa(DataArguments(**where, eval_split="validation"))
    assert [len(train), len(evaluation)] == [4, 1]
    with pytest.raises(ValueError, match="the data has train, validation"):
        load_vqa(DataArguments(**where, eval_split="test"))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize(
    ("flags", "wanted"),
    [({"eval_split": "test"}, 3), ({}, 2), ({"eval_split": "test", "test_split": "final"}, 4)],
)
def test_file_with_a_split_column_is_parsed_once_and_again_for_each_part(folder, monkeypatch, name, flags, wanted):
    splits = ("test", "train", "train", "final")
    table = pd.DataFrame([{**row, "answers": "x", "split": split} for row, split in zip(ROWS, splits, strict=True)])
    if name.endswith("csv"):
        table.to_csv(folder / name, index=False)
    else:
        table.to_json(folder / name, orient="records", lines=True)
    passes = []
    for reader in ("read_json_lines", "read_csv"):
        real = getattr(sources, reader)
        monkeypatch.setattr(sources, reader, lambda path, real=real: passes.append(path) or real(path))
    rows = load_splits("vqa", DataArguments(dataset_name=str(folder), **flags))
    assert sum(len(part) for part in rows if part is not None) == (4 if "test_split" in flags else 3 if flags else 2)
    assert len(passes) == wanted


def test_held_out_images_are_never_trained_on(folder, caplog):
    write_metadata(folder, ROWS)
    caplog.set_level("INFO")
    splits = [load_vqa(DataArguments(dataset_name=str(folder), eval_fraction=0.34), seed=seed) for seed in range(5)]
    for train, held_out in splits:
        assert len(train) + len(held_out) == 4
        assert len(set(held_out["image_id"])) == 1
        assert not set(train["image_id"]) & set(held_out["image_id"])
    assert len({held_out["image_id"][0] for _, held_out in splits}) > 1
    assert "1 of 3 images" in caplog.text


@pytest.mark.parametrize("load", [load_vqa, load_captions])
def test_one_image_under_several_names_is_never_on_both_sides(folder, load):
    """Eight images, each also as ./name, as a link, as a copy, and with another image_id."""
    rows = []
    for number in range(8):
        Image.new("RGB", (20, 10), (0, 0, 30 * number)).save(folder / f"{number}.png")
        os.symlink(f"{number}.png", folder / f"link{number}.png")
        shutil.copy(folder / f"{number}.png", folder / f"copy{number}.png")
        names = [f"{number}.png", f"./{number}.png", f"sub/../{number}.png", f"link{number}.png"]
        rows += [{**ROWS[0], "file_name": name, "captions": ["a dog"]} for name in [*names, f"copy{number}.png"]]
        rows.append({**rows[-1], "file_name": names[0], "image_id": f"own-{number}"})
    write_metadata(folder, rows)
    for seed in range(3):
        train, held_out = load(DataArguments(dataset_name=str(folder), eval_fraction=0.5), seed=seed)
        colors = [{open_image(row["image"]).getpixel((0, 0)) for row in part} for part in (train, held_out)]
        assert len(colors[0]) == len(colors[1]) == 4 and not colors[0] & colors[1]
        assert held_out.image_overlap == ImageOverlap(0, len(set(held_out["image_id"])), None)
        ids = {*held_out["image_id"], *(row["image_id"] for row in train)}
        made = [f"{name}{number}.png" for name in ("", "copy") for number in range(8)]
        assert ids == {*made, *(f"own-{number}" for number in range(8))}


@pytest.mark.parametrize(
    "flags",
    [
        {"eval_split": "train"},
        {"eval_dataset_name": "{folder}"},
        {"eval_dataset_name": "{folder}/metadata.jsonl"},
        {"eval_dataset_name": "{folder}/../images", "eval_split": "train"},
        {"train_split": "test", "eval_split": "test", "streaming": True},
        {"dataset_name": "demo", "train_split": "validation"},
        {"dataset_name": "demo", "eval_dataset_name": "demo"},
        {"questions_file": "{folder}/q.json", "eval_questions_file": "{folder}/./q.json"},
    ],
)
def test_same_rows_to_train_and_to_evaluate_on_are_refused_unless_asked_for(folder, flags):
    write_metadata(folder, [{**row, "split": split} for split in ("train", "test") for row in ROWS])
    flags = {"dataset_name": "{folder}", **flags}
    flags = {name: value.format(folder=folder) if isinstance(value, str) else value for name, value in flags.items()}
    if "questions_file" in flags:
        questions = [{"question_id": number, "image_id": number, "question": "q ?"} for number in range(2)]
        answers = [{"question_id": number, "answers": [{"answer": "x"}]} for number in range(2)]
        (folder / "q.json").write_text(json.dumps({"data_subtype": "x", "questions": questions}))
        (folder / "a.json").write_text(json.dumps({"annotations": answers}))
        for number in range(2):
            Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"COCO_x_{number:012d}.jpg")
        flags |= {"dataset_name": None, "image_folder": str(folder)}
        flags |= {"annotations_file": str(folder / "a.json"), "eval_annotations_file": str(folder / "a.json")}
    with pytest.raises(ValueError, match="used to train and to evaluate.*--allow_image_overlap"):
        load_vqa(DataArguments(**flags))
    overlap = load_vqa(DataArguments(**flags, allow_image_overlap=True))[1].image_overlap
    if "streaming" in flags:
        assert overlap is None  # the images of a stream are not known before it is read
    else:
        assert overlap.num_shared == overlap.num_eval > 1


@pytest.mark.parametrize("source", ["column", "parquet", "save_to_disk"])
def test_splits_that_are_not_used_are_named_with_the_flag_that_uses_them(folder, tmp_path, caplog, source):
    rows = [{**row, "split": split} for split in ("train", "test") for row in ROWS] + [{**ROWS[0], "split": "dev"}]
    where = {"dataset_name": str(folder)}
    if source == "column":
        write_metadata(folder, rows)
    elif source == "parquet":
        pd.DataFrame(rows).to_parquet(folder / "metadata.parquet")
    else:
        of_split = {name: [row for row in rows if row["split"] == name] for name in ("train", "test", "dev")}
        DatasetDict({name: Dataset.from_list(part) for name, part in of_split.items()}).save_to_disk(tmp_path / "saved")
        where = {"dataset_name": str(tmp_path / "saved"), "image_folder": str(folder)}
    load_vqa(DataArguments(**where))
    assert "the splits train (4 rows), test (4 rows), dev (1 rows). Only train is used" in caplog.text
    assert "--eval_split test" in caplog.text
    caplog.clear()
    load_vqa(DataArguments(**where, eval_split="dev"))
    assert "Only train is used" not in caplog.text


def test_paths_of_another_evaluation_source_are_relative_to_its_folder(folder, tmp_path):
    write_metadata(folder, CAPTION_ROWS)
    other = tmp_path / "other"
    other.mkdir()
    os.rename(folder / "c.png", other / "z.png")
    write_metadata(folder, CAPTION_ROWS[:4])
    write_metadata(other, [{"file_name": "z.png", "caption": "a cow"}])
    train, evaluation = load_captions(DataArguments(dataset_name=str(folder), eval_dataset_name=str(other)))
    assert [row["caption"] for row in train] == ["a dog", "a brown dog", "a cat"]
    assert [(row["image"]["path"], row["captions"]) for row in evaluation] == [(str(other / "z.png"), ["a cow"])]
    rows = [{"file_name": "z.png", "caption": split, "split": split} for split in ("dev", "test")]
    write_metadata(other, rows)
    where = {"dataset_name": str(folder), "eval_dataset_name": str(other)}
    assert load_captions(DataArguments(**where, eval_split="test"))[1]["captions"][:] == [["test"]]
    with pytest.raises(ValueError, match="the data has dev, test"):
        load_captions(DataArguments(**where))


@pytest.mark.parametrize("kind", ["vqa", "captions"])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_to_test_on_are_those_of_their_split_or_source(folder, tmp_path, kind, streaming, caplog):
    splits = zip(ROWS[1:], ("train", "val", "final"), strict=True)
    rows = [{**row, "captions": ["a dog"], "split": split} for row, split in splits]
    write_metadata(folder, rows)
    args = DataArguments(dataset_name=str(folder), eval_split="val", streaming=streaming, test_split="final")
    _, evaluation, test = load_splits(kind, args)
    assert (evaluation["image_id"][:], test["image_id"][:]) == (["b.png"], ["c.png"])
    assert set(test.column_names) == set(evaluation.column_names)
    assert test.image_overlap == (None if streaming else ImageOverlap(0, 1, None))
    # another source: its first image is also trained on, its second is also evaluated on
    write_metadata(folder, [{**rows[0], "file_name": f"{name}.png"} for name in "ab"], "other.jsonl")
    args = DataArguments(
        dataset_name=str(folder), eval_split="val", streaming=streaming, test_dataset_name=str(folder / "other.jsonl")
    )
    test = load_splits(kind, args).test
    assert test["image_id"][:] == ["a.png", "b.png"]
    assert test.image_overlap == (None if streaming else ImageOverlap(1, 2, "a.png"))
    assert test.overlap_with_evaluation == ImageOverlap(1, 2, "b.png")
    assert "1 of 2 images to test on are also evaluated on, e.g. b.png" in caplog.text
    assert load_splits(kind, DataArguments(dataset_name=str(folder), eval_split="val")).test is None


def test_held_out_images_and_test_rows_are_separate(folder, caplog):
    write_metadata(folder, [{**row, "split": "final" if row is ROWS[3] else "train"} for row in ROWS])
    train, evaluation, test = load_splits("vqa", DataArguments(dataset_name=str(folder), test_split="final"))
    assert len({*train["image_id"], *evaluation["image_id"]}) == 2 and test["image_id"][:] == ["c.png"]
    assert "To evaluate on another split" not in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"test_split": "train"}, "used to train and to test"),
        ({"test_split": "test"}, "used to evaluate and to test"),
        ({"test_dataset_name": "{folder}/metadata.jsonl"}, "used to train and to test"),
        ({"test_dataset_name": "{folder}", "test_split": "test"}, "used to evaluate and to test"),
    ],
)
def test_test_rows_that_are_also_used_otherwise_are_refused_unless_allowed(folder, flags, message):
    write_metadata(folder, [{**row, "split": split} for row in ROWS for split in ("train", "test")])
    flags = {name: value.format(folder=folder) for name, value in flags.items()} | {"eval_split": "test"}
    with pytest.raises(ValueError, match=f"{message}.*Choose other rows with --test_split or --test_dataset_name"):
        load_splits("vqa", DataArguments(dataset_name=str(folder), **flags))
    assert len(load_splits("vqa", DataArguments(dataset_name=str(folder), allow_image_overlap=True, **flags)).test) == 4
