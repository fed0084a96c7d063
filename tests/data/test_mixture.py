"""Rows of several sources are mixed: ids stay apart, one image stays on one side, and errors name the source."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image
from three_images import CAPTION_ROWS, ROWS, write_metadata

from blip_ft.arguments import BlipTrainingArguments, DataArguments
from blip_ft.arguments.images import ImageArguments
from blip_ft.cli import parse
from blip_ft.data.collators import RetrievalCollator
from blip_ft.data.images import open_image
from blip_ft.data.loading import load_captions, load_splits, load_vqa
from blip_ft.data.splits import read_column_names

pytestmark = pytest.mark.usefixtures("own_cache")


def color_of(row):
    return open_image(row["image"]).getpixel((0, 0))


@pytest.fixture
def two(tmp_path):
    """Folders `cats` and `dogs`; both have a.png, b.png and c.png, and dogs/b.png is a copy of cats/b.png."""
    for place, red in (("cats", 0), ("dogs", 200)):
        (tmp_path / place).mkdir()
        for number, name in enumerate("abc"):
            Image.new("RGB", (20, 10), (red, 80 * number, 0)).save(tmp_path / place / f"{name}.png")
        write_metadata(tmp_path / place, ROWS)
    shutil.copy(tmp_path / "cats" / "b.png", tmp_path / "dogs" / "b.png")
    return [str(tmp_path / "cats"), str(tmp_path / "dogs")]


def all_rows(*names, **more):
    train, held_out = load_vqa(DataArguments(dataset_name=list(names), **more))
    return sorted((*train, *held_out), key=lambda row: row["question_id"])


def test_equal_names_in_two_sources_are_two_images(two):
    rows = all_rows(*two)
    assert {row["image_id"]: color_of(row) for row in rows} == {
        **{"cats:a.png": (0, 0, 0), "cats:b.png": (0, 80, 0), "cats:c.png": (0, 160, 0)},
        **{"dogs:a.png": (200, 0, 0), "dogs:b.png": (0, 80, 0), "dogs:c.png": (200, 160, 0)},
    }
    assert [row["question_id"] for row in rows] == [
        f"{source}:train-{position}" for source in ("cats", "dogs") for position in range(4)
    ]


def test_given_ids_that_repeat_are_two_images(two):
    for folder in map(Path, two):
        write_metadata(folder, [{**row, "image_id": row["file_name"][0], "question_id": "7"} for row in ROWS])
    rows = all_rows(*two)
    assert {row["image_id"]: color_of(row) for row in rows}["dogs:a"] == (200, 0, 0)
    assert {row["question_id"] for row in rows} == {"cats:7", "dogs:7"}


def test_file_in_two_sources_is_one_image_whose_captions_are_no_negatives(two, tmp_path, processor):
    (tmp_path / "cats" / "a.png").write_bytes(b"broken")
    for name, caption in (("x.jsonl", "a cat"), ("y.jsonl", "a dog")):
        write_metadata(tmp_path, [{"file_name": f"cats/{file}.png", "caption": caption} for file in "abc"], name)
    files = [str(tmp_path / name) for name in ("x.jsonl", "y.jsonl")]
    args = DataArguments(dataset_name=files, max_bad_fraction=0.5, eval_fraction=0.4)
    train, held_out = load_captions(args, tmp_path / "bad_rows.jsonl")
    bad = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["source"], row["row"]) for row in bad] == [("x.jsonl", 0), ("y.jsonl", 0)]
    rows = [train[position] for position in range(len(train))]
    assert {row["caption"] for row in rows} == {"a cat", "a dog"} and held_out["captions"][0] == ["a cat", "a dog"]
    batch = RetrievalCollator(processor)(rows)
    images = len({row["image_id"] for row in rows})
    assert len(batch["image_ids"]) == len(batch["pixel_values"]) == images and len(batch["input_ids"]) == 2 * images


@pytest.mark.parametrize("check", ["full", "header"])
def test_copy_of_an_image_in_another_source_is_held_out_with_it(two, tmp_path, check):
    if check == "header":  # no file is read, but a link is followed
        (tmp_path / "dogs" / "b.png").unlink()
        two[1] = str(tmp_path / "rows.jsonl")
        write_metadata(tmp_path, [{**ROWS[2], "file_name": f"cats/{name}.png"} for name in "ab"], "rows.jsonl")
    sides = set()
    for seed in range(8):
        args = DataArguments(dataset_name=two, eval_fraction=0.4, check_images=check)
        train, held_out = load_vqa(args, seed=seed)
        assert not {color_of(row) for row in train} & {color_of(row) for row in held_out}
        assert held_out.image_overlap.num_shared == 0
        sides.add(any(row["image_id"] == "cats:b.png" for row in held_out))
    assert sides == {True, False}


def test_columns_and_kinds_of_images_may_differ(two, tmp_path):
    write_metadata(Path(two[0]), [{**row, "answer_type": "other"} for row in ROWS])
    rows = [{**row, "image": {"bytes": (tmp_path / "dogs" / row["file_name"]).read_bytes()}} for row in ROWS]
    rows = [{"image": row["image"] | {"path": None}, "question": row["question"], "answer": "yes"} for row in rows]
    Dataset.from_list([{**row, "weight": 0.5} for row in rows]).to_parquet(tmp_path / "bytes.parquet")
    found = all_rows(two[0], str(tmp_path / "bytes.parquet"))
    first, second = (
        [row for row in found if row["question_id"].startswith(source)] for source in ("cats:", "bytes.parquet:")
    )
    assert [(row["answer_type"], row["weight"]) for row in first] == [("other", 1.0)] * 4
    assert [(row["answer_type"], row["weight"]) for row in second] == [("unknown", 0.5)] * 4
    assert color_of(first[0]) == (0, 0, 0) and color_of(second[0]) == (200, 0, 0)
    # dogs/b.png is a copy of cats/b.png
    args = DataArguments(dataset_name=[two[0], str(tmp_path / "bytes.parquet")], eval_fraction=0.4)
    for seed in range(4):
        train, held_out = load_vqa(args, seed=seed)
        assert not {color_of(row) for row in train} & {color_of(row) for row in held_out}


def test_each_source_has_its_own_image_folder_or_all_have_one(two, tmp_path):
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_metadata(tmp_path / name, ROWS, "rows.jsonl")
        files.append(str(tmp_path / name / "rows.jsonl"))
    rows = all_rows(*files, image_folder=two)
    assert {row["image_id"]: color_of(row) for row in rows}["rows.jsonl-2:a.png"] == (200, 0, 0)
    rows = all_rows(*files, image_folder=two[:1])
    assert {color_of(row) for row in rows} == {(0, 0, 0), (0, 80, 0), (0, 160, 0)}
    # a path into the folder of another source leaves its own
    write_metadata(tmp_path / "one", [*ROWS, {**ROWS[0], "file_name": "../dogs/a.png"}], "rows.jsonl")
    with pytest.raises(ValueError, match=r"train row 4 \(rows.jsonl:../dogs/a.png\): image is outside .*cats"):
        load_vqa(DataArguments(dataset_name=files, image_folder=two))


def test_splits_are_selected_in_each_source(two, tmp_path):
    for folder in map(Path, two):
        splits = ("train", "train", "val", "test")
        write_metadata(folder, [{**row, "split": split} for row, split in zip(ROWS, splits, strict=True)])
    rows = load_splits("vqa", DataArguments(dataset_name=two, eval_split="val", test_split="test"))
    assert [[row["image_id"] for row in part] for part in rows] == [
        ["cats:a.png", "cats:a.png", "dogs:a.png", "dogs:a.png"],
        ["cats:b.png", "dogs:b.png"],
        ["cats:c.png", "dogs:c.png"],
    ]
    write_metadata(Path(two[1]), ROWS)
    with pytest.raises(ValueError, match="dogs: train_split and eval_split need a column `split`"):
        load_vqa(DataArguments(dataset_name=two, eval_split="val"))
    # without eval_split, all rows of a source without splits are trained on or held out
    assert len(all_rows(*two)) == 2 + 4


def test_other_data_is_evaluated_on_and_none_of_the_sources(two, tmp_path):
    write_metadata(tmp_path, [{**ROWS[0], "file_name": "c.png"}], "rows.jsonl")
    args = {"eval_dataset_name": str(tmp_path / "rows.jsonl"), "image_folder": two}
    train, evaluation = load_vqa(DataArguments(dataset_name=two, **args))
    assert len(train) == 8 and [color_of(row) for row in evaluation] == [(0, 160, 0)]  # in the first folder
    assert evaluation.image_overlap.num_shared == 1
    with pytest.raises(ValueError, match="The same rows are used to train and to evaluate: .*dogs, split train"):
        load_vqa(DataArguments(dataset_name=two, eval_dataset_name=two[1]))


def test_captions_of_two_sources_are_mixed_by_image(two):
    for folder in map(Path, two):
        write_metadata(folder, CAPTION_ROWS)
    train, held_out = load_captions(DataArguments(dataset_name=two, eval_fraction=0.2))
    captions = {row["image_id"]: row["captions"] for row in (*train.images, *held_out)}
    assert captions["cats:a.png"] == captions["dogs:a.png"] == ["a dog", "a brown dog"] and len(captions) == 6


def test_bad_rows_name_their_source_and_count_in_it(two, tmp_path):
    write_metadata(Path(two[1]), [*ROWS, {**ROWS[0], "question": ""}, {**ROWS[0], "file_name": "d.png"}])
    all_rows(*two, max_bad_fraction=1)
    load_vqa(DataArguments(dataset_name=two, max_bad_fraction=1), tmp_path / "bad_rows.jsonl")
    bad = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["source"], row["row"], row["image_id"]) for row in bad] == [
        ("dogs", 4, "dogs:a.png"),
        ("dogs", 5, "dogs:d.png"),
    ]
    write_metadata(Path(two[1]), [{"file_name": "a.png", "q": "what ?"}])
    with pytest.raises(ValueError, match="dogs: Rows need the columns answer, file_name, question"):
        load_vqa(DataArguments(dataset_name=two))
    assert read_column_names(DataArguments(dataset_name=two)) == ["file_name", "question", "answers", "q"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_name": ["a", "demo"]}, "The demo's data is not mixed with other data"),
        ({"dataset_name": ["a", "a"]}, "dataset_name has the same data twice: a, a"),
        ({"dataset_name": ["a", "b"], "streaming": True, "eval_split": "x"}, "One dataset_name can be streamed"),
        ({"dataset_name": ["a", "b"], "image_folder": ["c", "d", "e"]}, "found 3 folders for 2"),
        ({"dataset_name": "a", "image_folder": ["c", "d"]}, "found 2 folders for 1"),
        ({"dataset_name": ["a", "b"], "questions_file": "q", "annotations_file": "q"}, "mutually exclusive"),
    ],
)
def test_sources_that_cannot_be_mixed_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)


def test_one_source_is_predicted_on(two):
    with pytest.raises(ValueError, match=r"Predictions are for one dataset_name, found .*cats, .*dogs"):
        ImageArguments(dataset_name=two)


def test_list_of_sources_comes_from_flags_and_yaml(tmp_path):
    def parsed(*flags, config=None):
        args, _ = parse(DataArguments, BlipTrainingArguments, argv=[*flags, "--use_cpu"], config=config)
        return args

    assert parsed("--dataset_name", "a", "b", "--image_folder", "c").dataset_name == ["a", "b"]
    (tmp_path / "mix.yaml").write_text("dataset_name: [a, b]\nimage_folder:\n- c\n- d\n")
    args = parsed(config=tmp_path / "mix.yaml")
    assert (args.dataset_name, args.image_folder) == (["a", "b"], ["c", "d"])
    assert parsed("--dataset_name", "e", "--image_folder", "f", config=tmp_path / "mix.yaml").dataset_name == "e"
    assert parsed(config={"dataset_name": "a", "image_folder": "c"}).image_folder == "c"
    assert (
        DataArguments(dataset_name="demo").dataset_name == DataArguments(dataset_name=["demo"]).dataset_name == "demo"
    )


def test_mixture_is_named_and_lists_its_ids_on_the_hub(two):
    args = DataArguments(dataset_name=["owner/birds", *two, "owner/fish"])
    assert args.label == "birds + cats + dogs + fish" and args.hub_ids == ["owner/birds", "owner/fish"]
    assert DataArguments(dataset_name="demo").hub_ids == []
