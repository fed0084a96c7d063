"""Every kind of source gives the same rows, and a source that cannot be read is named in the error."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset
from three_images import ROWS, captions_of, load_all, save_three_images, write_metadata

from blip_ft.arguments import DataArguments
from blip_ft.data.loading import load_captions, load_vqa

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path):
    return save_three_images(tmp_path)


@pytest.mark.parametrize(
    "source", ["folder", "json", "json data", "jsonl", "csv", "parquet", "save_to_disk", "parquet bytes"]
)
def test_every_source_gives_the_same_rows(folder, tmp_path, source):
    where = {"dataset_name": str(folder)}
    if source == "folder":
        write_metadata(folder, ROWS)
    elif source.startswith("json") and source != "jsonl":
        where = {"dataset_name": str(tmp_path / "rows.json"), "image_folder": str(folder)}
        (tmp_path / "rows.json").write_text(json.dumps({"data": ROWS} if source == "json data" else ROWS))
    elif source == "jsonl":
        write_metadata(tmp_path, ROWS, "rows.jsonl")
        where = {"dataset_name": str(tmp_path / "rows.jsonl"), "image_folder": str(folder)}
    elif source == "csv":
        table = pd.DataFrame(ROWS)
        table["answers"] = table["answers"].map(json.dumps)
        table.to_csv(folder / "metadata.csv", index=False)
    elif source == "parquet":
        pd.DataFrame(ROWS).to_parquet(folder / "metadata.parquet")
    elif source == "save_to_disk":
        Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        where = {"dataset_name": str(tmp_path / "saved"), "image_folder": str(folder)}
    else:
        rows = [{**row, "image": {"bytes": (folder / row["file_name"]).read_bytes(), "path": None}} for row in ROWS]
        Dataset.from_list(rows).remove_columns("file_name").to_parquet(tmp_path / "rows.parquet")
        where = {"dataset_name": str(tmp_path / "rows.parquet")}
    rows = load_all(**where)
    assert [(row["question"], row["answers"]) for row in rows] == [(row["question"], row["answers"]) for row in ROWS]
    ids = [row["image_id"] for row in rows]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    assert len({row["question_id"] for row in rows}) == 4
    images = [row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes() for row in rows]
    assert images == [(folder / row["file_name"]).read_bytes() for row in ROWS]


def test_official_vqa_pair_gives_ten_answers_types_and_ids(folder, tmp_path):
    (folder / "train2014").mkdir()
    os.rename(folder / "a.png", folder / "train2014" / "COCO_train2014_000000000007.jpg")
    os.rename(folder / "b.png", folder / "COCO_train2014_000000000009.jpg")
    questions = [
        {"image_id": 7, "question_id": 70, "question": "what?"},
        {"image_id": 9, "question_id": 90, "question": "who?"},
    ]
    answers = [{"answer": "net" if number < 7 else "racket", "answer_id": number} for number in range(10)]
    annotations = [{"question_id": q["question_id"], "answers": answers, "answer_type": "other"} for q in questions]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "train2014", "questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations}))
    pair = {"questions_file": str(tmp_path / "q.json"), "annotations_file": str(tmp_path / "a.json")}
    both = {**pair, **{f"eval_{name}": path for name, path in pair.items()}}
    train, evaluation = load_vqa(DataArguments(**both, image_folder=str(folder), allow_image_overlap=True))
    assert list(train["question_id"]) == list(evaluation["question_id"]) == ["70", "90"]
    assert list(train["image_id"]) == ["7", "9"]
    assert train[0]["answers"] == ["net"] * 7 + ["racket"] * 3 and train[0]["answer_type"] == "other"


def test_malformed_line_is_named_by_file_and_line(folder):
    (folder / "metadata.jsonl").write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: not valid JSON"):
        load_vqa(DataArguments(dataset_name=str(folder)))
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,question,answer\na.png,what\n")
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2: expected 3 values"):
        load_vqa(DataArguments(dataset_name=str(folder)))


def test_error_for_a_missing_source_says_what_to_check(folder):
    with pytest.raises(ValueError, match="Add a metadata.jsonl"):
        load_vqa(DataArguments(dataset_name=str(folder)))
    with pytest.raises(ValueError, match="(?s)not a local file or folder.*HF_TOKEN"):
        load_vqa(DataArguments(dataset_name="owner/none"))
    with pytest.raises(ValueError, match="image_folder must be a folder"):
        load_vqa(DataArguments(dataset_name=str(folder), image_folder="/no/such"))
    with pytest.raises(ValueError, match="--dataset_name demo"):
        load_vqa(DataArguments())


def test_parquet_of_encoded_images_needs_no_feature(folder):
    rows = [{"image": (folder / f"{name}.png").read_bytes(), "question": "what ?", "answer": "x"} for name in "abc"]
    pd.DataFrame(rows).to_parquet(folder / "metadata.parquet")
    train, held_out = load_vqa(DataArguments(dataset_name=str(folder)))
    assert {row["image"]["bytes"] for row in (*train, *held_out)} == {row["image"] for row in rows}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_byte_order_mark_is_not_part_of_the_text(folder, name):
    text = {
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "rows.json": json.dumps(ROWS),
        "rows.csv": "file_name,question,answer\n" + "".join(f"{r['file_name']},{r['question']},x\n" for r in ROWS),
    }
    (folder / name).write_text(text[name], encoding="utf-8-sig")
    assert len(load_all(dataset_name=str(folder / name))) == 4


def test_malformed_csv_is_named_by_file_and_line(folder):
    (folder / "metadata.csv").write_text('file_name,question,answer\na.png,"' + "x" * 200_000)
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2: not valid CSV"):
        load_vqa(DataArguments(dataset_name=str(folder)))


def test_image_folder_may_start_with_a_tilde(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_metadata(tmp_path, ROWS, "rows.jsonl")
    assert len(load_all(dataset_name=str(tmp_path / "rows.jsonl"), image_folder="~/images")) == 4


def test_coco_captions_and_their_subset_folders_are_read(folder, tmp_path):
    names = [f"COCO_val2014_{number:012d}.jpg" for number in (7, 9)]
    (folder / "val2014").mkdir()
    os.rename(folder / "a.png", folder / "val2014" / names[0])
    os.rename(folder / "b.png", folder / names[1])
    content = {
        "images": [{"id": number, "file_name": name} for number, name in zip((7, 9), names, strict=True)],
        "annotations": [
            {"image_id": 9, "caption": "a cat"},
            {"image_id": 7, "caption": "a dog"},
            {"image_id": 7, "caption": "a brown dog"},
        ],
    }
    (tmp_path / "captions_val2014.json").write_text(json.dumps(content))
    args = DataArguments(dataset_name=str(tmp_path / "captions_val2014.json"), image_folder=str(folder))
    train, evaluation = load_captions(args)
    assert captions_of(train, evaluation) == {"7": ["a dog", "a brown dog"], "9": ["a cat"]}
    content["annotations"][0]["image_id"] = 8
    (tmp_path / "captions_val2014.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must be COCO captions .* missing: 8"):
        load_captions(args)


def test_karpathy_splits_train_on_restval_too(folder, tmp_path):
    splits = {"a.png": "train", "b.png": "restval", "c.png": "val"}
    images = [
        {"filepath": folder.name, "filename": name, "cocoid": number, "split": split, "sentences": [{"raw": name}]}
        for number, (name, split) in enumerate(splits.items())
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    args = DataArguments(dataset_name=str(tmp_path / "dataset_coco.json"), image_folder=str(tmp_path), eval_split="val")
    train, evaluation = load_captions(args)
    assert [row["caption"] for row in train] == ["a.png", "b.png"] and evaluation["image_id"][:] == ["2"]
