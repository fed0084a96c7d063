"""Every source gives the same rows; what cannot be used is named; the order of an epoch."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from blip_ft.arguments import DataArguments
from blip_ft.data import schema, sources
from blip_ft.data.images import open_image
from blip_ft.data.loading import ImageOverlap, load_captions, load_splits, load_to_predict, load_vqa
from blip_ft.data.sampling import GroupedSampler
from blip_ft.data.tables import number_images
from blip_ft.data_pipeline import DataPipeline
from blip_ft.models import load_model
from blip_ft.results.predictions import official_ids

ROWS = [
    {"file_name": "a.png", "question": "what is it ?", "answers": ["a dog", "dog"]},
    {"file_name": "a.png", "question": "is it red ?", "answers": ["yes"]},
    {"file_name": "b.png", "question": "how many ?", "answers": ["2"]},
    {"file_name": "c.png", "question": "what color ?", "answers": ["red"]},
]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path):
    """Three images, and no file that tells of them yet."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate("abc"):
        Image.new("RGB", (20, 10), (80 * number, 0, 0)).save(folder / f"{name}.png")
    return folder


def write_metadata(folder, rows, name="metadata.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(**kwargs):
    """All rows, training and held out, in the data's order."""
    train, held_out = load_vqa(DataArguments(**{"max_bad_fraction": 1.0, **kwargs}))
    rows = [*train, *held_out]
    return sorted(rows, key=lambda row: [given["question"] for given in ROWS].index(row["question"]))


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
    rows = load(**where)
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
    assert [row["answers"] for row in load(dataset_name=str(folder))] == [["x"], ["y", "z"], ["3"], ["yes"]]


def test_missing_column_names_the_argument_to_set(folder):
    write_metadata(folder, [{"file_name": "a.png", "q": "what ?", "label": "x"}])
    with pytest.raises(
        ValueError, match=r"need the columns answer, file_name, question; this data set has .* Set question_column"
    ):
        load_vqa(DataArguments(dataset_name=str(folder)))
    train = {"question_column": "q", "answer_column": "label", "eval_split": None}
    with pytest.raises(ValueError, match="At least two images"):  # the columns are found now
        load_vqa(DataArguments(dataset_name=str(folder), **train))


def test_malformed_line_is_named_by_file_and_line(folder):
    (folder / "metadata.jsonl").write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: not valid JSON"):
        load_vqa(DataArguments(dataset_name=str(folder)))
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,question,answer\na.png,what\n")
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2: expected 3 values"):
        load_vqa(DataArguments(dataset_name=str(folder)))


def test_sources_that_are_not_there_say_what_to_check(folder):
    with pytest.raises(ValueError, match="Add a metadata.jsonl"):
        load_vqa(DataArguments(dataset_name=str(folder)))
    with pytest.raises(ValueError, match="(?s)not a local file or folder.*HF_TOKEN"):
        load_vqa(DataArguments(dataset_name="owner/none"))
    with pytest.raises(ValueError, match="image_folder must be a folder"):
        load_vqa(DataArguments(dataset_name=str(folder), image_folder="/no/such"))
    with pytest.raises(ValueError, match="--dataset_name demo"):
        load_vqa(DataArguments())


def test_split_column_selects_and_an_unknown_split_lists_those_there(folder):
    write_metadata(
        folder, [{**row, "split": split} for row, split in zip(ROWS, ["train", "test", "train", "test"], strict=True)]
    )
    train, evaluation = load_vqa(DataArguments(dataset_name=str(folder), eval_split="test"))
    assert [len(train), len(evaluation)] == [2, 2]
    assert list(evaluation["question"]) == ["is it red ?", "what color ?"]
    with pytest.raises(ValueError, match="The split 'dev' does not exist; the data has train, test"):
        load_vqa(DataArguments(dataset_name=str(folder), eval_split="dev"))


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
    """Eight images, each as ./name, through a link, as a copy, and under an image_id of its own."""
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


@pytest.mark.parametrize("check", ["full", "header"])
@pytest.mark.parametrize("load", [load_vqa, load_captions])
def test_images_to_train_and_to_evaluate_on_are_counted(folder, tmp_path, caplog, load, check):
    """The same file in another folder's words, an equal file, equal bytes; not an equal name or number."""
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
    # of what is left out nothing is trained on
    _, evaluation = load(DataArguments(**where, max_train_samples=1))
    assert evaluation.image_overlap == ImageOverlap(0, 3, None)


def test_images_in_bytes_equal_their_files(folder, tmp_path):
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
        assert overlap is None  # a stream's images are not known beforehand
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
    """Rows that cannot be used, with a part of the reason for each."""
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


def test_good_images_are_read_once_and_again_when_they_change(folder, monkeypatch):
    write_metadata(folder, ROWS)
    load_vqa(DataArguments(dataset_name=str(folder)))
    opened = []
    monkeypatch.setattr(
        Image, "open", lambda *args, real=Image.open, **kwargs: opened.append(1) or real(*args, **kwargs)
    )
    load_vqa(DataArguments(dataset_name=str(folder)))
    assert opened == []
    (folder / "b.png").write_bytes(b"broken now")
    with pytest.raises(ValueError, match="1 of 4 rows"):
        load_vqa(DataArguments(dataset_name=str(folder)))


IMAGES = np.repeat(np.arange(6), [3, 1, 4, 1, 5, 2])


def test_grouped_order_holds_every_row_once_and_images_together():
    order = list(GroupedSampler(IMAGES, global_batch_size=4, seed=0))
    assert len(order) == 16 and sorted(order) == list(range(16))
    images = [IMAGES[row] for row in order]
    changes = sum(one != other for one, other in zip(images, images[1:], strict=False))
    assert changes == len(set(IMAGES)) - 1


def test_order_differs_per_epoch_and_repeats_per_seed():
    sampler, twin = GroupedSampler(IMAGES, 1, seed=5), GroupedSampler(IMAGES, 1, seed=5)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first == list(twin)
    assert list(GroupedSampler(IMAGES, 1, seed=6)) != first


def test_order_is_cut_to_whole_steps_elsewhere_in_each_epoch():
    sampler = GroupedSampler(IMAGES, 5, seed=0, group=False)
    cut = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) == 15 == len(set(rows))
        cut += set(range(16)) - set(rows)
    assert len(set(cut)) > 1


def test_ungrouped_order_is_a_plain_shuffle():
    rows = list(GroupedSampler(IMAGES, 1, seed=0, group=False))
    images = [IMAGES[row] for row in rows]
    assert sorted(rows) == list(range(16))
    assert sum(one != other for one, other in zip(images, images[1:], strict=False)) > len(set(IMAGES)) - 1


def test_batch_larger_than_the_data_names_the_largest_that_fits():
    with pytest.raises(ValueError, match="Choose at most 16"):
        GroupedSampler(IMAGES, 17, seed=0)


def test_order_that_is_handed_out_in_several_parts_holds_every_row_once():
    order = list(GroupedSampler(np.repeat(np.arange(40_000), 5), 256, seed=0))
    assert len(order) == 200_000 // 256 * 256 == len(set(order)) and max(order) < 200_000


def test_rows_stay_on_disk(folder):
    write_metadata(folder, [{**ROWS[0], "question_id": number} for number in range(20_000)])
    pyarrow.default_memory_pool().release_unused()
    before = pyarrow.total_allocated_bytes()
    args = {"dataset_name": str(folder), "eval_dataset_name": str(folder), "allow_image_overlap": True}
    train, _ = load_vqa(DataArguments(**args))
    assert len(train) == 20_000 and train.data.nbytes > 1_500_000
    assert pyarrow.total_allocated_bytes() - before < 100_000


@pytest.fixture
def pipeline_settings(folder, checkpoint):
    write_metadata(folder, [{**row, "answers": ["cat", "dog", "dog"]} for row in ROWS])
    return {
        "model_name_or_path": str(checkpoint),
        "dataset_name": str(folder),
        "eval_fraction": 0.34,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 0,
        "use_cpu": True,
    }


def test_pipeline_batches_feed_a_hand_written_loop(pipeline_settings, tmp_path, processor):
    path = tmp_path / "vqa.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in pipeline_settings.items()))
    pipeline = DataPipeline(path)
    with pytest.raises(ValueError, match=r"Call setup\(\) first"):
        pipeline.get_train_dataloader()
    pipeline.setup()
    batch = next(iter(pipeline.get_train_dataloader()))
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "labels"}
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["pixel_values"].is_floating_point()
    # the most frequent answer, between [CLS] and [SEP]
    assert batch["labels"].tolist() == [processor.tokenizer("dog").input_ids] * 2
    rows = sum(len(batch["input_ids"]) for batch in pipeline.get_eval_dataloader())
    assert rows == len(pipeline.eval_rows)


def test_pipeline_groups_questions_when_asked(pipeline_settings):
    pipeline = DataPipeline({**pipeline_settings, "group_questions": True})
    pipeline.setup()
    batch = next(iter(pipeline.get_train_dataloader()))
    assert batch["pixel_values"].dtype == torch.uint8 and len(batch["image_index"]) == 2
    assert load_model(pipeline_settings["model_name_or_path"])["model"](**batch).loss > 0


def test_pipeline_refuses_an_unknown_key(pipeline_settings):
    with pytest.raises(ValueError, match="Did you mean image_size"):
        DataPipeline({**pipeline_settings, "imagesize": 32})


def test_saved_dataset_dict_has_named_splits(folder, tmp_path):
    rows = Dataset.from_list(ROWS)

    DatasetDict({"train": rows, "validation": rows.select([0])}).save_to_disk(tmp_path / "saved")
    assert set(load_from_disk(tmp_path / "saved")) == {"train", "validation"}
    where = {"dataset_name": str(tmp_path / "saved"), "image_folder": str(folder)}
    train, evaluation = load_vqa(DataArguments(**where, eval_split="validation"))
    assert [len(train), len(evaluation)] == [4, 1]
    with pytest.raises(ValueError, match="the data has train, validation"):
        load_vqa(DataArguments(**where, eval_split="test"))


def images_in_parquet(folder, images, name="metadata.parquet", **columns):
    """One question for each {"bytes", "path"}, and further columns of images."""
    image = {"bytes": Value("binary"), "path": Value("string")}
    features = {"image": image, **dict.fromkeys(columns, ImageFeature()), "question": Value("string")}
    rows = {"image": images, **columns, "question": [row["question"] for row in ROWS[: len(images)]]}
    answers = {"answer": ["x"] * len(images)}
    Dataset.from_dict({**rows, **answers}, Features({**features, "answer": Value("string")})).to_parquet(folder / name)


def test_parquet_of_encoded_images_needs_no_feature(folder):
    rows = [{"image": (folder / f"{name}.png").read_bytes(), "question": "what ?", "answer": "x"} for name in "abc"]
    pd.DataFrame(rows).to_parquet(folder / "metadata.parquet")
    train, held_out = load_vqa(DataArguments(dataset_name=str(folder)))
    assert {row["image"]["bytes"] for row in (*train, *held_out)} == {row["image"] for row in rows}


def test_parquet_path_without_bytes_starts_from_the_folder(folder):
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


def test_another_column_of_images_is_not_decoded(folder):
    images = [{"bytes": (folder / f"{name}.png").read_bytes(), "path": None} for name in "abc"]
    images_in_parquet(folder, images, mask=[{"bytes": b"broken", "path": None}] * 3)
    train, held_out = load_vqa(DataArguments(dataset_name=str(folder)))
    assert len(train) + len(held_out) == 3


def test_empty_id_in_csv_is_made_as_a_missing_one(folder):
    lines = [f"{name}.png,what ?,x,,\n" for name in "abc"]
    (folder / "metadata.csv").write_text("file_name,question,answer,image_id,question_id\n" + "".join(lines))
    rows = [row for part in load_vqa(DataArguments(dataset_name=str(folder))) for row in part]
    assert {row["image_id"] for row in rows} == {"a.png", "b.png", "c.png"}
    assert len({row["question_id"] for row in rows}) == 3


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_byte_order_mark_of_windows_is_no_part_of_the_text(folder, name):
    text = {
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "rows.json": json.dumps(ROWS),
        "rows.csv": "file_name,question,answer\n" + "".join(f"{r['file_name']},{r['question']},x\n" for r in ROWS),
    }
    (folder / name).write_text(text[name], encoding="utf-8-sig")
    assert len(load(dataset_name=str(folder / name))) == 4


def test_csv_that_cannot_be_split_is_named_by_file_and_line(folder):
    (folder / "metadata.csv").write_text('file_name,question,answer\na.png,"' + "x" * 200_000)
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2: not valid CSV"):
        load_vqa(DataArguments(dataset_name=str(folder)))


def test_rows_without_any_column_name_the_argument_to_set(folder):
    write_metadata(folder, [{}])
    with pytest.raises(ValueError, match="Set image_column, e.g. --image_column image"):
        load_vqa(DataArguments(dataset_name=str(folder)))


def test_advised_bad_fraction_is_enough(folder):
    # 0.29 * 100 is 28.999999999999996
    write_metadata(folder, [{**ROWS[number % 3], "question": "" if number < 29 else "q"} for number in range(100)])
    with pytest.raises(ValueError, match=r"--max_bad_fraction 0\.29$"):
        load_vqa(DataArguments(dataset_name=str(folder)))
    train, held_out = load_vqa(DataArguments(dataset_name=str(folder), max_bad_fraction=0.29))
    assert len(train) + len(held_out) == 71


def test_image_folder_may_start_from_home(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_metadata(tmp_path, ROWS, "rows.jsonl")
    assert len(load(dataset_name=str(tmp_path / "rows.jsonl"), image_folder="~/images")) == 4


def test_header_check_passes_what_only_a_full_check_refuses(folder, tmp_path):
    Image.effect_noise((64, 64), 50).save(folder / "a.png")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:1000])
    write_metadata(folder, ROWS)
    assert len(load(dataset_name=str(folder), check_images="header")) == 4
    with pytest.raises(ValueError, match=r"2 of 4 rows"):
        load_vqa(DataArguments(dataset_name=str(folder)))


def test_grouped_pipeline_shuffles_anew_in_each_epoch(pipeline_settings, folder):
    write_metadata(folder, [{**ROWS[number % 3], "question": f"{number} ?"} for number in range(30)])
    pipeline = DataPipeline({**pipeline_settings, "group_questions": True})
    pipeline.setup()
    loader = pipeline.get_train_dataloader()
    first, second = (list(loader.sampler) for _ in range(2))
    assert first != second and sorted(first) == sorted(second)
    # a loader made anew goes on, another pipeline begins again
    assert list(pipeline.get_train_dataloader().sampler) not in (first, second)
    again = DataPipeline({**pipeline_settings, "group_questions": True})
    again.setup()
    assert first == list(again.get_train_dataloader().sampler)


CAPTION_ROWS = [
    {"file_name": "a.png", "caption": "a dog"},
    {"file_name": "b.png", "caption": "a cat"},
    {"file_name": "a.png", "caption": "a brown dog"},
    {"file_name": "a.png", "caption": "a dog"},
    {"file_name": "c.png", "caption": "a cat"},
]
CAPTIONS = {"a.png": ["a dog", "a brown dog"], "b.png": ["a cat"], "c.png": ["a cat"]}


def captions_of(train, evaluation):
    """What both parts hold together: image -> captions."""
    found = {row["image_id"]: row["captions"] for row in evaluation}
    for row in train:
        found.setdefault(row["image_id"], []).append(row["caption"])
    return found


@pytest.mark.parametrize("form", ["caption", "captions", "save_to_disk"])
def test_captions_of_an_image_are_put_together_from_all_its_rows(folder, tmp_path, form):
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


def test_caption_limits_count_captions_to_train_and_images_to_evaluate_on(folder):
    write_metadata(folder, [{**row, "split": split} for split in ("train", "test") for row in CAPTION_ROWS])
    args = DataArguments(dataset_name=str(folder), eval_split="test", max_train_samples=2, max_eval_samples=2)
    train, evaluation = load_captions(args)
    assert [row["caption"] for row in train] == ["a dog", "a brown dog"]
    assert evaluation["captions"][:] == [["a dog", "a brown dog"], ["a cat"]]


def test_row_without_caption_is_bad_and_leaves_its_image_the_others(folder, tmp_path):
    write_metadata(folder, [*CAPTION_ROWS, {"file_name": "a.png", "caption": " "}])
    args = DataArguments(dataset_name=str(folder), max_bad_fraction=0.5)
    train, evaluation = load_captions(args, tmp_path / "bad.jsonl")
    assert captions_of(train, evaluation) == CAPTIONS
    assert json.loads((tmp_path / "bad.jsonl").read_text())["reason"] == "caption is empty or not a text"


def test_missing_caption_column_is_named(folder):
    write_metadata(folder, [{"file_name": "a.png", "text": "a dog"}])
    with pytest.raises(
        ValueError, match="need the columns caption, file_name; .* has file_name, text. Set caption_column"
    ):
        load_captions(DataArguments(dataset_name=str(folder)))


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


def test_other_source_to_evaluate_on_starts_from_its_own_folder(folder, tmp_path):
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


def test_images_in_bytes_are_not_copied_when_captions_are_put_together(folder, tmp_path):
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
    assert len(written) == 1  # the parquet file's own copy


@pytest.mark.parametrize("group", [True, False])
def test_pipeline_that_is_asked_for_a_loader_in_each_epoch_shuffles_anew(pipeline_settings, folder, group):
    write_metadata(folder, [{**ROWS[number % 3], "question": "dog " * (number + 1)} for number in range(30)])
    pipeline = DataPipeline({**pipeline_settings, "group_questions": group})
    pipeline.setup()
    first, second = ([batch["input_ids"].tolist() for batch in pipeline.get_train_dataloader()] for _ in range(2))
    assert first != second


def test_pipeline_pixels_are_those_of_the_processor(pipeline_settings, processor, folder):
    pipeline = DataPipeline(pipeline_settings)
    pipeline.setup()
    batch = next(iter(pipeline.get_eval_dataloader()))
    path = pipeline.eval_rows[0]["image"]["path"]
    stock = processor.image_processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"][:1], stock, atol=1e-6, rtol=0)


def test_image_id_column_that_is_not_there_is_named(folder):
    write_metadata(folder, ROWS)
    with pytest.raises(ValueError, match="Set image_id_column"):
        load_vqa(DataArguments(dataset_name=str(folder), image_id_column="foo"))


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
    # another source, whose first image is trained on and its second evaluated on
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


def test_held_out_images_and_rows_to_test_on_are_apart_and_both_are_known(folder, caplog):
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
def test_rows_to_test_on_that_serve_otherwise_are_refused_unless_asked_for(folder, flags, message):
    write_metadata(folder, [{**row, "split": split} for row in ROWS for split in ("train", "test")])
    flags = {name: value.format(folder=folder) for name, value in flags.items()} | {"eval_split": "test"}
    with pytest.raises(ValueError, match=f"{message}.*Choose other rows with --test_split or --test_dataset_name"):
        load_splits("vqa", DataArguments(dataset_name=str(folder), **flags))
    assert len(load_splits("vqa", DataArguments(dataset_name=str(folder), allow_image_overlap=True, **flags)).test) == 4


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
