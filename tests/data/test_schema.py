"""Rows with any columns are converted to our columns, and a missing column is named."""

import json

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from three_images import CAPTION_ROWS, ROWS, captions_of, load_all, save_three_images, write_metadata

from blip_ft.arguments import DataArguments
from blip_ft.data import schema
from blip_ft.data.loading import load_captions, load_vqa
from blip_ft.data.tables import number_images

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path):
    return save_three_images(tmp_path)


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        *[("dog ", ["dog"]), (["a", " b"], ["a", "b"]), ({"answer": "x", "answer_id": 1}, ["x"]), (2, ["2"])],
        *[([{"answer": "x"}, {"answer": "y"}], ["x", "y"]), (2.0, ["2"]), (2.5, ["2.5"]), (True, ["yes"])],
        *[(False, ["no"]), (None, []), (float("nan"), []), ("", []), ([], []), (["", "a"], ["a"])],
    ],
)
def test_answers_of_every_kind_become_strings(value, answers):
    assert schema._as_texts(value, "answer") == answers


def test_answers_of_mixed_kinds_in_one_file(folder):
    write_metadata(
        folder, [{**row, "answers": value} for row, value in zip(ROWS, ["x", ["y", "z"], 3, True], strict=True)]
    )
    assert [row["answers"] for row in load_all(dataset_name=str(folder))] == [["x"], ["y", "z"], ["3"], ["yes"]]


def test_missing_column_names_the_argument_to_set(folder):
    write_metadata(folder, [{"file_name": "a.png", "q": "what ?", "label": "x"}])
    with pytest.raises(
        ValueError, match=r"need the columns answer, file_name, question; this data set has .* Set question_column"
    ):
        load_vqa(DataArguments(dataset_name=str(folder)))
    train = {"question_column": "q", "answer_column": "label", "eval_split": None}
    with pytest.raises(ValueError, match="At least two images"):  # now the columns are found
        load_vqa(DataArguments(dataset_name=str(folder), **train))


def test_missing_image_id_column_is_named(folder):
    write_metadata(folder, ROWS)
    with pytest.raises(ValueError, match="Set image_id_column"):
        load_vqa(DataArguments(dataset_name=str(folder), image_id_column="foo"))


def test_rows_without_any_column_name_the_argument_to_set(folder):
    write_metadata(folder, [{}])
    with pytest.raises(ValueError, match="Set image_column, e.g. --image_column image"):
        load_vqa(DataArguments(dataset_name=str(folder)))


def test_missing_caption_column_is_named(folder):
    write_metadata(folder, [{"file_name": "a.png", "text": "a dog"}])
    with pytest.raises(
        ValueError, match="need the columns caption, file_name; .* has file_name, text. Set caption_column"
    ):
        load_captions(DataArguments(dataset_name=str(folder)))


def test_empty_id_in_csv_is_treated_as_missing(folder):
    lines = [f"{name}.png,what ?,x,,\n" for name in "abc"]
    (folder / "metadata.csv").write_text("file_name,question,answer,image_id,question_id\n" + "".join(lines))
    rows = [row for part in load_vqa(DataArguments(dataset_name=str(folder))) for row in part]
    assert {row["image_id"] for row in rows} == {"a.png", "b.png", "c.png"}
    assert len({row["question_id"] for row in rows}) == 3


def images_in_parquet(folder, images, name="metadata.parquet", **columns):
    """Write a parquet file with one question per {"bytes", "path"}, and more columns of images."""
    image = {"bytes": Value("binary"), "path": Value("string")}
    features = {"image": image, **dict.fromkeys(columns, ImageFeature()), "question": Value("string")}
    rows = {"image": images, **columns, "question": [row["question"] for row in ROWS[: len(images)]]}
    answers = {"answer": ["x"] * len(images)}
    Dataset.from_dict({**rows, **answers}, Features({**features, "answer": Value("string")})).to_parquet(folder / name)


def test_parquet_path_without_bytes_is_relative_to_the_folder(folder):
    images_in_parquet(folder, [{"bytes": None, "path": f"{name}.png"} for name in "abc"])
    rows = [row for part in load_vqa(DataArguments(dataset_name=str(folder))) for row in part]
    assert {row["image"]["path"] for row in rows} == {str(folder / f"{name}.png") for name in "abc"}


def test_parquet_path_without_bytes_never_leads_out_of_the_folder(folder, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    outside = {"bytes": None, "path": str(tmp_path / "outside.png")}
    images_in_parquet(folder, [outside, outside])
    with pytest.raises(ValueError, match="(?s)2 of 2 rows.*is outside"):
        load_vqa(DataArguments(dataset_name=str(folder)))
    inside = [{"bytes": (folder / f"{name}.png").read_bytes(), "path": None} for name in "ab"]
    images_in_parquet(folder, [*inside, outside], "mixed.parquet")
    with pytest.raises(ValueError, match="(?s)1 of 3 rows.*image has no bytes"):
        load_vqa(DataArguments(dataset_name=str(folder / "mixed.parquet")))


def test_another_column_of_images_is_not_decoded(folder):
    images = [{"bytes": (folder / f"{name}.png").read_bytes(), "path": None} for name in "abc"]
    images_in_parquet(folder, images, mask=[{"bytes": b"broken", "path": None}] * 3)
    train, held_out = load_vqa(DataArguments(dataset_name=str(folder)))
    assert len(train) + len(held_out) == 3


def test_missing_image_is_left_out_of_training_and_kept_in_evaluation(folder, tmp_path):
    images = [(folder / f"{name}.png").read_bytes() for name in "ab"] + [None]
    rows = [
        {"image": image and {"bytes": image, "path": None}, "question": "what ?", "answer": "x", "split": split}
        for split in ("train", "test")
        for image in images
    ]
    texts = {name: Value("string") for name in ("question", "answer", "split")}
    Dataset.from_list(rows, Features({"image": ImageFeature(), **texts})).save_to_disk(tmp_path / "saved")
    file = tmp_path / "bad_rows.jsonl"
    args = DataArguments(dataset_name=str(tmp_path / "saved"), eval_split="test", max_bad_fraction=1.0)
    train, evaluation = load_vqa(args, file)
    assert [len(train), len(evaluation)] == [2, 3]
    assert [json.loads(line)["reason"] for line in file.read_text().splitlines()] == ["image is missing"] * 2


CAPTIONS = {"a.png": ["a dog", "a brown dog"], "b.png": ["a cat"], "c.png": ["a cat"]}


@pytest.mark.parametrize("form", ["caption", "captions", "save_to_disk"])
def test_captions_of_all_rows_of_an_image_are_merged(folder, tmp_path, form):
    where = {"dataset_name": str(folder)}
    if form == "captions":
        write_metadata(folder, [{"file_name": name, "captions": captions} for name, captions in CAPTIONS.items()])
    elif form == "caption":
        write_metadata(folder, CAPTION_ROWS)
    else:
        Dataset.from_list(CAPTION_ROWS).save_to_disk(tmp_path / "saved")
        where = {"dataset_name": str(tmp_path / "saved"), "image_folder": str(folder)}
    train, evaluation = load_captions(DataArguments(**where))
    assert len(evaluation) == 1
    assert captions_of(train, evaluation) == CAPTIONS
    assert len(train) == sum(len(captions) for captions in CAPTIONS.values()) - len(evaluation[0]["captions"])
    shown = [row["image_id"] for row in train]
    assert list(number_images(train)) == [list(dict.fromkeys(shown)).index(image_id) for image_id in shown]


def test_row_without_caption_is_bad_and_its_image_keeps_the_other_captions(folder, tmp_path):
    write_metadata(folder, [*CAPTION_ROWS, {"file_name": "a.png", "caption": " "}])
    args = DataArguments(dataset_name=str(folder), max_bad_fraction=0.5)
    train, evaluation = load_captions(args, tmp_path / "bad.jsonl")
    assert captions_of(train, evaluation) == CAPTIONS
    assert json.loads((tmp_path / "bad.jsonl").read_text())["reason"] == "caption is empty or not a text"


def test_images_in_bytes_are_not_copied_when_captions_are_merged(folder, tmp_path):
    rows = [
        {
            "image": {"bytes": (folder / row["file_name"]).read_bytes(), "path": None},
            "image_id": row["file_name"],
            **row,
        }
        for row in CAPTION_ROWS
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    before = {path for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    train, evaluation = load_captions(DataArguments(dataset_name=str(tmp_path / "rows.parquet")))
    assert captions_of(train, evaluation) == CAPTIONS
    written = {path for path in (tmp_path / "cache").rglob("*.arrow")} - before
    assert len(written) == 1  # the copy that datasets makes of the parquet file
