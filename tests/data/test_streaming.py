"""A stream gives every row once per pass, for any number of readers, and a resumed run continues at the same row."""

import json
import shutil
from itertools import islice

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from blip_ft.arguments import DataArguments
from blip_ft.data import schema, sources
from blip_ft.data.augmentation import Augmentation
from blip_ft.data.collators import CaptionCollator, VqaCollator
from blip_ft.data.loading import load_captions, load_vqa

pytestmark = pytest.mark.usefixtures("own_cache")


# three questions for each of ten images; ten is not a multiple of four readers
ROWS = [
    {"file_name": f"{image}.png", "question": f"q {image} {number} ?", "answer": "dog", "caption": f"dog {number}"}
    for image in range(10)
    for number in range(3)
]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for image in range(10):
        Image.new("RGB", (8, 8), (20 * image, 0, 0)).save(folder / f"{image}.png")
    return folder


def stream(folder, rows=ROWS, load=load_vqa, bad=None, **kwargs):
    lines = [{**row, "split": "train"} for row in rows] + [{**ROWS[0], "split": "test"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = {"dataset_name": str(folder), "eval_split": "test", "streaming": True, "shuffle_buffer": 3, **kwargs}
    return load(DataArguments(**args), bad, seed=5)[0]


def questions(rows):
    return [row["question"] for row in rows]


ALL = sorted(row["question"] for row in ROWS)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_pass_gives_every_row_once_and_images_together(folder, num_shards):
    rows = stream(folder)
    parts = [list(rows.read_pass(0, shard, num_shards)) for shard in range(num_shards)]
    assert sorted(questions(row for part in parts for row in part)) == ALL
    for part in parts:
        shown = [row["image_id"] for row in part]
        assert sum(one != other for one, other in zip(shown, shown[1:], strict=False)) == len(set(shown)) - 1
    first, second = (questions(rows.read_pass(epoch, 0, num_shards)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) and first != second
    assert first == questions(stream(folder).read_pass(0, 0, num_shards)) != sorted(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_a_stream_have_other_views_in_each_pass(folder, processor, workers):
    Image.effect_noise((8, 8), 100).save(folder / "0.png")
    rows = stream(folder, ROWS[:6])
    augmentation = Augmentation(0)
    collate = VqaCollator(processor, augmentation=augmentation)
    loader = DataLoader(rows, 3, collate_fn=lambda rows: (rows[0], collate(rows)["pixel_values"]), num_workers=workers)
    passes = [pixels for row, pixels in islice(loader, 6) if row["image_id"] == "0.png"]
    expected = [collate([{**row, "epoch": epoch} for row in rows.first_rows()])["pixel_values"] for epoch in range(3)]
    assert len(passes) == 3 and not torch.equal(passes[0], passes[1])
    assert all(torch.equal(one[0], other[0]) for one, other in zip(passes, expected, strict=True))


def batches_of(rows, workers, number):
    loader = DataLoader(rows, rows.batch_size, collate_fn=questions, num_workers=workers, generator=torch.Generator())
    return list(islice(loader, number))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_with_workers_share_the_rows_and_can_start_at_any_batch(folder, workers):
    seen = []
    for process in range(2):
        rows = stream(folder)
        rows.process, rows.num_processes, rows.batch_size = process, 2, 3
        unbroken = batches_of(rows, workers, 8)
        readers = max(workers, 1)
        own = [questions(rows.read_pass(0, process * readers + reader, 2 * readers)) for reader in range(readers)]
        # the workers take turns, one batch each
        assert unbroken[:2] == ([part[:3] for part in own] if workers else [own[0][:3], own[0][3:6]])
        seen += [question for part in own for question in part]
        for begin in (1, 4, 7):  # in the first pass and in the second
            rows.first_batch = begin
            assert batches_of(rows, workers, 8 - begin) == unbroken[begin:]
    assert sorted(seen) == ALL


def test_ungrouped_stream_shuffles_rows(folder):
    shown = [row["image_id"] for row in stream(folder, group_questions=False, shuffle_buffer=30).read_pass(0)]
    assert sum(one != other for one, other in zip(shown, shown[1:], strict=False)) > 9 and len(shown) == 30


def test_stream_gives_the_batches_of_loaded_rows(folder, processor):
    for load, collate in ((load_vqa, VqaCollator(processor)), (load_captions, CaptionCollator(processor))):
        streamed = sorted(stream(folder, load=load).read_pass(0), key=str)
        loaded = sorted(stream(folder, load=load, streaming=False), key=str)
        for name in ("question_id", "answer_type"):
            assert [row.get(name) for row in streamed] == [row.get(name) for row in loaded]
        batches = [collate(rows) for rows in (streamed, loaded)]
        assert batches[0].keys() == batches[1].keys()
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


@pytest.mark.parametrize("limit", [None, 9])
@pytest.mark.parametrize("files", [4, 3])
def test_files_of_the_hub_are_shared_out_or_read_by_all(folder, tmp_path, monkeypatch, files, limit):
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    for number in range(files):
        part = ROWS[number * 30 // files // 3 * 3 : (number + 1) * 30 // files // 3 * 3]
        table = {
            "image": [{"bytes": (folder / row["file_name"]).read_bytes(), "path": None} for row in part],
            **{name: [row[name] for row in part] for name in ("question", "answer")},
        }
        Dataset.from_dict(table, features).to_parquet(tmp_path / f"{number}.parquet")
    paths = [str(tmp_path / f"{number}.parquet") for number in range(files)]
    read = []
    real = sources.load_dataset
    monkeypatch.setattr(
        *(sources, "load_dataset"),
        lambda name, config, streaming: real(
            "parquet", data_files={"train": paths, "test": paths[:1]}, streaming=streaming
        ),
    )
    monkeypatch.setattr(
        *(schema.VqaSchema, "convert"),
        lambda self, row, position, real=schema.VqaSchema.convert: read.append(self.name) or real(self, row, position),
    )
    args = DataArguments("owner/images", eval_split="test", max_eval_samples=2, max_train_samples=limit, streaming=True)
    rows, evaluation = load_vqa(args)
    assert len(evaluation) == 2 and read == ["eval"] * 2
    readers = 4 if limit is None else 3
    parts = [list(rows.read_pass(0, shard, readers)) for shard in range(readers)]
    wanted = ROWS[:limit]
    assert sorted(questions(row for part in parts for row in part)) == sorted(row["question"] for row in wanted)
    # if files are shared, each row is read once; otherwise once by each reader
    assert read.count("train") == (30 if files == 4 and limit is None else len(wanted) * len(parts))


def test_streamed_parquet_file_and_saved_data_set_are_read_as_they_are(folder, tmp_path):
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    table = {"image": [str(folder / row["file_name"]) for row in ROWS]}
    table |= {name: [row[name] for row in ROWS] for name in ("question", "answer")}
    saved = Dataset.from_dict(table, features)
    saved.to_parquet(tmp_path / "rows.parquet")
    saved.save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "saved"):
        where = {"dataset_name": str(tmp_path / name), "eval_dataset_name": str(folder), "image_folder": str(folder)}
        (folder / "metadata.jsonl").write_text(json.dumps(ROWS[0]))
        rows, _ = load_vqa(DataArguments(**where, streaming=True))
        assert sorted(questions(rows.read_pass(0))) == ALL


def test_bad_rows_are_skipped_and_listed_once_and_too_many_stop_the_run(folder, tmp_path):
    bad = tmp_path / "bad_rows.jsonl"
    broken = [*ROWS, {**ROWS[0], "question": ""}, {**ROWS[0], "file_name": "../x.png"}]
    rows = stream(folder, broken, bad=bad, max_bad_fraction=0.1)
    for epoch in (0, 1):
        assert sorted(question for shard in (0, 1) for question in questions(rows.read_pass(epoch, shard, 2))) == ALL
    assert [json.loads(line)["row"] for line in bad.read_text().splitlines()] == [30, 31]
    with pytest.raises(ValueError, match="2 of the first 32 rows of the stream cannot be used"):
        list(stream(folder, broken, max_bad_fraction=0.01).read_pass(0))
    with pytest.raises(ValueError, match="20 of the first 1000 rows"):
        next(iter(stream(folder, [*([broken[30]] * 20), *ROWS], max_bad_fraction=0.019)))


def test_unreadable_image_of_a_stream_has_no_weight(folder, processor):
    (folder / "3.png").write_bytes(b"")
    rows = list(stream(folder).read_pass(0))
    batch = VqaCollator(processor)(rows)
    assert [row["image_id"] != "3.png" for row in rows] == batch["readable"].tolist()
    assert batch["answer_weights"].sum() == 27


def test_more_readers_than_images_are_refused(folder):
    with pytest.raises(ValueError, match=r"too few rows for 12 readers \(processes x --dataloader_num_workers\)"):
        list(stream(folder).read_pass(0, 11, 12))


@pytest.fixture
def flags(checkpoints, image_folder):
    def of(task):
        return [
            *("--model_name_or_path", str(checkpoints[task]), "--dataset_name", str(image_folder), "--streaming"),
            *("--eval_split", "test", "--learning_rate", "3e-3", "--per_device_train_batch_size", "3"),
            *("--gradient_accumulation_steps", "2", "--max_steps", "6"),
            *("--save_strategy", "steps", "--save_steps", "2"),
            *("--save_total_limit", "9", "--logging_steps", "1", "--dropout", "0.1", "--sample_steps", "2"),
        ]

    return of


@pytest.mark.parametrize("task", ["vqa", "captioning --augment"])
def test_resumed_run_of_a_stream_equals_the_unbroken_one(recipe, flags, tmp_path, task):
    task, *augment = task.split()
    whole = recipe(*flags(task), *augment, output_dir=tmp_path / "whole", task=task)
    cut = shutil.copytree(whole, tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(cut / f"checkpoint-{step}")
    recipe(*flags(task), *augment, "--resume_from_checkpoint", "last", output_dir=cut, task=task)
    a, b = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (whole, cut)]
    steps = [[entry for entry in log if "loss" in entry] for log in logs]
    assert steps[0] == steps[1] and [entry["epoch"] for entry in steps[0]] == pytest.approx(
        [n / 6 for n in range(1, 7)]
    )


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("vqa", ["--max_steps", "-1"], "--streaming requires --max_steps"),
        ("vqa", ["--freeze", "vision_model", "--cache_image_features"], "Leave out --streaming"),
        ("retrieval", [], "streaming is for questions and captions"),
    ],
)
def test_settings_without_support_for_streams_are_refused(recipe, flags, caplog, task, more, message):
    with pytest.raises(SystemExit):
        recipe(*flags(task), *more, task=task)
    assert message in caplog.text


def test_stream_cannot_be_resumed_with_other_settings(recipe, flags, tmp_path, caplog):
    folder = recipe(*flags("vqa"), "--max_steps", "2", output_dir=tmp_path / "run")
    for name in ("per_device_train_batch_size", "shuffle_buffer"):
        with pytest.raises(SystemExit):
            resume = ["--max_steps", "2", "--resume_from_checkpoint", "last"]
            recipe(*flags("vqa"), f"--{name}", "2", *resume, output_dir=folder)
        assert f"  {name}: " in caplog.messages[-1] and " -> 2\nThe result would not be" in caplog.messages[-1]


def test_stream_needs_rows_to_evaluate_on():
    with pytest.raises(
        ValueError, match="No images can be held out from a stream. Add --eval_split or --eval_dataset_name"
    ):
        DataArguments(dataset_name="owner/images", streaming=True)
