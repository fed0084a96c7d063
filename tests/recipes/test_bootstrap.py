"""recipes/bootstrap.py as users start it: what it writes, that it resumes, and what its filter keeps."""

import json
import random
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import RECIPES
from datasets import Dataset, Features, Image, List, Value, load_dataset
from programs import run_ranks
from transformers import PreTrainedModel

from blip_ft.arguments import DataArguments
from blip_ft.data import demo
from blip_ft.data.images import encode_row_images
from blip_ft.data.loading import load_captions
from blip_ft.data.texts import clean_caption, encode_texts
from blip_ft.modeling import inference
from blip_ft.models import load_model
from blip_ft.results.bootstrap import OUTPUT, decide, different_texts
from blip_ft.results.files import release_folders

RESULT = ("metadata.jsonl", "scores.jsonl")
FOR_ANOTHER_THRESHOLD = ("bootstrap_settings.json", "scores.part0.jsonl")


@pytest.fixture
def bootstrap(monkeypatch, tmp_path, checkpoints):
    """Runs bootstrap.py in this process, by default with both checkpoints, and returns output_dir."""

    def start(*flags, folder: str = "out", **models) -> Path:
        path = str(RECIPES / "bootstrap.py")
        models = {"captioner": "captioning", "filter": "retrieval"} | models
        named = [word for flag, name in models.items() if name for word in (f"--{flag}", checkpoints.get(name, name))]
        common = ["--output_dir", tmp_path / folder, "--use_cpu", "--dataloader_num_workers", "0"]
        monkeypatch.setattr(sys, "argv", [path, *map(str, (*named, *common, *flags))])
        runpy.run_path(path, run_name="__main__")
        return tmp_path / folder

    return start


@pytest.fixture
def images(image_folder, tmp_path) -> Path:
    """Four images that can be read and one that cannot, without texts."""
    (tmp_path / "images").mkdir()
    for file in image_folder.glob("*.png"):
        shutil.copy(file, tmp_path / "images")
    (tmp_path / "images" / "broken.png").write_bytes(b"none")
    return tmp_path / "images"


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_texts_are_written_scored_and_kept_in_a_file_that_recipes_train_on(
    bootstrap, recipe, images, checkpoints, caplog
):
    caplog.set_level("INFO")
    out = bootstrap("--images", images, "--num_captions", "3", "--keep_share", "0.5")
    assert {path.name for path in out.iterdir()} == {*RESULT, *FOR_ANOTHER_THRESHOLD, "bad_rows.jsonl", "report.html"}
    scores, metadata = lines_of(out / "scores.jsonl"), lines_of(out / "metadata.jsonl")
    assert 6 < len(scores) <= 12 and {line["source"] for line in scores} == {"generated"}
    assert list(dict.fromkeys(line["image_id"] for line in scores)) == ["0.png", "1.png", "2.png", "3.png"]
    kept = sorted((line for line in scores if line["kept"]), key=lambda line: line["score"])
    dropped = sorted((line for line in scores if not line["kept"]), key=lambda line: line["score"])
    assert len(kept) == round(0.5 * len(scores)) and 0 < dropped[-1]["score"] <= kept[0]["score"] < 1
    for line in metadata:
        own = [score for score in scores if score["image_id"] == line["file_name"] and score["kept"]]
        assert line == {
            "file_name": line["file_name"],
            "captions": [score["text"] for score in own],
            "text": max(own, key=lambda score: score["score"])["text"],
        }
    (bad,) = lines_of(out / "bad_rows.jsonl")
    assert bad["image_id"] == "broken.png" and "cannot be read" in bad["reason"]
    cards = (out / "report.html").read_text().split("<article")[1:]
    order = [*kept, *dropped[::-1]]
    assert [line["text"] in card for line, card in zip(order, cards, strict=True)] == [True] * len(order)
    command = caplog.messages[-1].split("recipes/captioning.py ")[1].split()
    assert command == ["--dataset_name", str(out / "metadata.jsonl"), "--image_folder", str(images)]
    few = ["--max_steps", "2", "--per_device_train_batch_size", "1", "--eval_fraction", "0.4"]
    trained = recipe("--model_name_or_path", str(checkpoints["captioning"]), *command, *few, task="captioning")
    assert (trained / "model.safetensors").is_file()


def test_result_is_the_same_for_two_processes_and_after_a_kill(bootstrap, images, checkpoints, tmp_path, monkeypatch):
    """The run stops in the second of three batches, and the last line that it wrote is cut in two."""
    flags = ["--images", images, "--num_captions", "2", "--per_device_eval_batch_size", "2"]
    whole = bootstrap(*flags, folder="whole")
    read, match = [], inference.match_texts

    def match_until(limit):
        def stop_or_match(model, pixel_values, *args, **kwargs):
            if len(read) == limit:
                raise KeyboardInterrupt
            read.append(len(pixel_values))
            return match(model, pixel_values, *args, **kwargs)

        return stop_or_match

    monkeypatch.setattr(inference, "match_texts", match_until(2))
    with pytest.raises(SystemExit):
        bootstrap(*flags)
    part = tmp_path / "out" / "scores.part0.jsonl"
    part.write_bytes(part.read_bytes()[:-20])
    assert read == [2, 2] and not any((tmp_path / "out" / name).exists() for name in RESULT)
    read.clear()
    monkeypatch.setattr(inference, "match_texts", match_until(None))
    resumed = bootstrap(*flags, "--threshold", "0.5")
    assert read == [2, 1]
    common = ["--captioner", checkpoints["captioning"], "--filter", checkpoints["retrieval"], "--use_cpu"]
    words = [RECIPES / "bootstrap.py", *common, *flags, "--output_dir", tmp_path / "two"]
    for code, errors in run_ranks(*map(str, words), "--dataloader_num_workers", "0", folder=tmp_path):
        assert code == 0, errors[-3000:]
    for name in RESULT:
        assert (resumed / name).read_bytes() == (whole / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_another_threshold_is_applied_without_writing_or_scoring_again(bootstrap, image_folder, monkeypatch):
    data = ["--dataset_name", str(image_folder), "--eval_split", "test"]
    all_texts = lines_of(bootstrap(*data, "--keep_share", "1") / "scores.jsonl")
    monkeypatch.setattr(inference, "match_texts", None)
    monkeypatch.setattr(inference, "caption_several", None)
    half = lines_of(bootstrap(*data, "--keep_share", "0.5") / "scores.jsonl")
    assert [line["score"] for line in half] == [line["score"] for line in all_texts]
    assert sum(line["kept"] for line in all_texts) == len(half) and sum(line["kept"] for line in half) == len(half) / 2
    with pytest.raises(SystemExit):
        bootstrap(*data, "--num_captions", "2")


def test_default_folder_is_not_that_of_a_finished_result(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder, done = OUTPUT.settle_folder(None, {"seed": 42})
    assert (str(folder), done) == ("outputs/bootstrap", set())
    OUTPUT.append_part(folder, [{0: {"texts": []}}])
    OUTPUT.finish(folder, [])
    release_folders()
    assert OUTPUT.settle_folder(str(folder), {"seed": 42}) == (folder, {0})
    release_folders()
    assert str(OUTPUT.settle_folder(None, {"seed": 42})[0]) == "outputs/bootstrap-2"
    release_folders()


def test_text_files_follow_another_threshold_and_draws_are_no_beams(bootstrap, images, tmp_path):
    flags = ["--images", images, "--write_txt"]
    for share in ("1", "0.25"):
        bootstrap(*flags, "--keep_share", share, "--output_dir", tmp_path / "named", "--overwrite")
    (kept,) = lines_of(tmp_path / "named" / "metadata.jsonl")
    assert [file.stem for file in images.glob("*.txt")] == [Path(kept["file_name"]).stem]
    with pytest.raises(SystemExit):  # other texts, although one beam draws none
        bootstrap(*flags, "--output_dir", tmp_path / "named", "--generation_num_beams", "1")


def test_links_are_images_of_the_folder_that_they_stand_in(bootstrap, images, tmp_path):
    (tmp_path / "links").mkdir()
    for file in images.glob("[0-9].png"):
        (tmp_path / "links" / file.name).symlink_to(file)
    (tmp_path / "links" / "4.png").symlink_to(tmp_path / "links" / "0.png")
    folders = ["--images", tmp_path / "links", images.parent / "links" / ".." / "links" / "0.png"]
    out = bootstrap(*folders, "--keep_share", "1", "--write_txt")
    names = [line["file_name"] for line in lines_of(out / "metadata.jsonl")]
    assert names == [f"{number}.png" for number in range(5)]
    assert len(list((tmp_path / "links").glob("*.txt"))) == 5 and not list(images.glob("*.txt"))


def test_own_texts_are_filtered_without_a_captioner_and_beside_new_ones(bootstrap, images, checkpoints):
    captions = [["A red dog!"], ["a large cat", "two dogs : one cat"], [], ["a blue sky"]]
    rows = [{"file_name": f"{number}.png", "captions": own} for number, own in enumerate(captions)]
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--dataset_name", images, "--per_device_eval_batch_size", "3"]
    scores = lines_of(bootstrap(*data, captioner=None) / "scores.jsonl")
    loaded = load_model(checkpoints["retrieval"], device="cpu")
    for line in scores:  # one at a time, by the stock forward
        row = {"image": {"bytes": None, "path": line["image"]}, "image_id": ""}
        pixels = encode_row_images([row], loaded["image_processor"])["pixel_values"]
        tokens = encode_texts([clean_caption(line["text"])], loaded["tokenizer"], 35)
        with torch.no_grad():
            logits = loaded["model"](pixels, **tokens).itm_score[0]
        assert line["score"] == pytest.approx(logits.softmax(-1)[1].item(), rel=1e-4)
        assert line["kept"] == (line["score"] >= 0.5)
    assert [(line["text"], line["source"]) for line in scores] == [(text, "own") for own in captions for text in own]
    both = lines_of(bootstrap(*data, folder="both") / "scores.jsonl")
    assert [line["source"][0] for line in both] == ["o", "g", "o", "o", "g", "g", "o", "g"]
    assert [line for line in both if line["source"] == "own"] == [
        {**line, "score": pytest.approx(line["score"], rel=1e-4)} for line in scores
    ]


def test_equal_texts_of_an_image_are_filtered_once_as_the_models_read_them():
    assert different_texts(["A dog.", "a cat"], ["a dog", "a cow", "!", "a cow"], clean=True) == [
        {"text": "A dog.", "source": "own"},
        {"text": "a cat", "source": "own"},
        {"text": "a cow", "source": "generated"},
    ]
    assert [entry["text"] for entry in different_texts(["A dog."], ["a dog", " "], clean=False)] == ["A dog.", "a dog"]


def test_kept_texts_are_those_from_the_threshold_on_or_the_best_share():
    scores = [0.2, 0.5, 0.9, 0.5, 0.4999]
    assert decide(scores, 0.5, None) == [False, True, True, True, False]
    assert decide(scores, 0.5, 0.4) == [False, True, True, False, False]
    assert decide(scores, 0.5, 1.0) == [True] * 5
    assert decide([], 0.5, 0.4) == [] and decide([None, None], 0.5, None) == [True, True]


def test_text_files_stand_beside_images_and_never_replace_one_unasked(bootstrap, images, caplog):
    (images / "0.txt").write_text("mine")
    bootstrap("--images", images, "--write_txt", filter=None)
    assert "1 of 5 images have a text file, e.g." in caplog.text
    assert (images / "0.txt").read_text() == "mine" and (images / "1.txt").read_text().strip()
    out = bootstrap("--images", images, "--write_txt", "--overwrite", folder="all", filter=None)
    texts = {file.stem: file.read_text() for file in images.glob("*.txt")}
    assert texts == {line["file_name"][0]: line["text"] + "\n" for line in lines_of(out / "metadata.jsonl")}
    assert set(texts) == set("0123")
    some = ["--keep_share", "0.5", "--write_txt", "--caption_extension", ".caption"]
    best = lines_of(bootstrap("--images", images, *some, folder="some") / "metadata.jsonl")
    texts = {file.stem: file.read_text() for file in images.glob("*.caption")}
    assert texts == {line["file_name"][0]: line["text"] + "\n" for line in best} and len(texts) == 2
    assert {file.suffix for file in images.iterdir()} == {".png", ".txt", ".caption"}


def test_without_a_filter_all_texts_are_kept_without_scores(bootstrap, images):
    out = bootstrap("--images", images / "0.png", "--generation_num_beams", "2", filter=None)
    (line,) = lines_of(out / "scores.jsonl")
    assert line["score"] is None and line["kept"] and line["image_id"] == "0.png"
    assert lines_of(out / "metadata.jsonl") == [
        {"file_name": "0.png", "captions": [line["text"]], "text": line["text"]}
    ]


def test_images_that_the_data_contains_are_written_with_their_texts(bootstrap, image_folder, tmp_path, own_cache):
    rows = [
        {"image": {"bytes": (image_folder / f"{number}.png").read_bytes(), "path": None}, "image_id": f"cat-{number}"}
        for number in range(4)
    ]
    features = Features({"image": Image(decode=False), "image_id": Value("string"), "captions": List(Value("string"))})
    rows = [row | {"captions": ["a red dog", f"a large {number}"]} for number, row in enumerate(rows)]
    Dataset.from_list(rows, features).to_parquet(str(tmp_path / "rows.parquet"))
    out = bootstrap("--dataset_name", tmp_path / "rows.parquet", "--keep_share", "0.5", captioner=None)
    metadata = lines_of(out / "metadata.jsonl")
    for line in metadata:
        assert (out / line["file_name"]).read_bytes() == rows[int(line["image_id"][-1])]["image"]["bytes"]
    assert len(list((out / "images").iterdir())) == len(metadata)
    train, held_out = load_captions(DataArguments(dataset_name=str(out), eval_fraction=0.3))
    read = {row["image_id"] for row in train} | set(held_out["image_id"])
    assert read == {line["image_id"] for line in metadata}
    # as diffusers does
    folder = load_dataset("imagefolder", data_dir=str(out), split="train")
    assert sorted(folder["text"]) == sorted(line["text"] for line in metadata)
    # another threshold replaces the images, and no text file that a user wrote
    (out / "images" / "00000000.txt").write_text("by hand")
    flags = ["--dataset_name", tmp_path / "rows.parquet", "--write_txt"]
    bootstrap(*flags, "--keep_share", "1", captioner=None)
    assert len(list((out / "images").glob("*.png"))) == 4
    assert (out / "images" / "00000000.txt").read_text() == "by hand"


def test_rows_of_several_splits_are_refused(bootstrap, image_folder, caplog):
    with pytest.raises(SystemExit):
        bootstrap("--dataset_name", image_folder, captioner=None)
    assert "Choose the rows to use, e.g. --eval_split train" in caplog.text


MISTAKES = {
    "no model": ({"captioner": None, "filter": None}, [], "Give --captioner to write texts, --filter to filter"),
    "two rules": ({}, ["--threshold", "0.5", "--keep_share", "0.7"], "threshold and keep_share are mutually exclusive"),
    "beams": ({}, ["--generation_num_beams", "3", "--num_captions", "2"], "writes one text for each image"),
    "no images": ({}, ["--dataset_name", "x"], "exactly one of --images and --dataset_name."),
    "no texts": ({"captioner": None}, [], "The data has no texts to filter. Give --captioner"),
    "no filter": ({"filter": None}, ["--keep_share", "0.7"], "keep_share 0.7 has no effect without --filter"),
    "no captioner": ({"captioner": None}, ["--num_captions", "2"], "num_captions 2 has no effect without --captioner"),
    "no share": ({}, ["--keep_share", "70"], "keep_share must be between 0 and 1, found 70"),
    "extension": (
        {},
        ["--write_txt", "--caption_extension", "txt"],
        "caption_extension must be like .txt, found 'txt'",
    ),
    "images": ({}, ["--write_txt", "--caption_extension", ".PNG"], "a text could replace an image"),
    "one name": ({}, ["--write_txt"], "0.jpg and 0.png would have the same text file, 0.txt"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_message_before_a_model_loads(bootstrap, images, tmp_path, monkeypatch, caplog, mistake):
    models, flags, message = MISTAKES[mistake]
    shutil.copy(images / "0.png", images / "0.jpg")
    monkeypatch.delattr(PreTrainedModel, "from_pretrained")
    with pytest.raises(SystemExit) as stopped:
        bootstrap("--images", images, *flags, **models)
    assert stopped.value.code == 1 and message in caplog.text and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"captioner": "vqa"}, "--captioner needs a captioning checkpoint; "),
        ({"captioner": "retrieval"}, "is for image_text_retrieval"),
        ({"filter": "captioning"}, "--filter needs a retrieval checkpoint of BLIP; "),
    ],
)
def test_checkpoint_for_another_task_is_refused(bootstrap, images, tmp_path, caplog, models, message):
    with pytest.raises(SystemExit):
        bootstrap("--images", images, **models)
    assert message in caplog.text and not (tmp_path / "out").exists()


def draw_scenes(seed: int, number: int, without: dict[tuple, demo.Scene]) -> dict[tuple, demo.Scene]:
    """Scenes of the demo's data, as load_demo draws them for the same seed."""
    generator = random.Random(seed)
    scenes: dict[tuple, demo.Scene] = {}
    while len(scenes) < number:
        scene = demo._draw_scene(generator)
        if (key := tuple(sorted(scene.items()))) not in without:
            scenes.setdefault(key, scene)
    return scenes


def fresh_rows(number: int) -> list[dict]:
    """Images of scenes that no demo model has seen, with their true caption and the scene."""
    seen = draw_scenes(0, 3300, {})
    generator = random.Random(1)
    rows = []
    for place, scene in enumerate(draw_scenes(1, number, seen).values()):
        row = demo._rows_of(scene, f"fresh-{place}", generator)[0]
        rows.append({name: row[name] for name in ("image", "image_id", "captions")} | {"scene": scene})
    return rows


def is_right(text: str, scene: demo.Scene) -> bool:
    """Whether a text names all shapes of a scene with their colors, and no others."""
    things = text.replace(" and ", ", ").split(", ")
    return sorted(things) == sorted(f"a {color} {shape}" for color, shape in scene.values())


def corrupt(rows: list[dict], how: str) -> list[dict]:
    """Give 30 % of the rows the caption of another image, or one wrong color or shape."""
    generator = random.Random(2)
    captions = [row["captions"][0] for row in rows]
    changed = {}
    for place in generator.sample(range(len(rows)), round(0.3 * len(rows))):
        words = captions[place].split(" ")
        if how == "other image":
            changed[place] = generator.choice(captions[:place] + captions[place + 1 :])
            continue
        at = generator.choice([number for number, word in enumerate(words) if word.strip(",") in WORDS])
        word = words[at].strip(",")
        others = demo.COLORS if word in demo.COLORS else demo.SHAPES
        words[at] = words[at].replace(word, generator.choice([other for other in others if other != word]))
        changed[place] = " ".join(words)
    return [row | {"captions": [changed.get(place, captions[place])]} for place, row in enumerate(rows)]


WORDS = (*demo.COLORS, *demo.SHAPES)


def save_rows(rows: list[dict], path: Path) -> Path:
    features = Features({"image": Image(decode=False), "image_id": Value("string"), "captions": List(Value("string"))})
    Dataset.from_list([{name: row[name] for name in features} for row in rows], features).to_parquet(str(path))
    return path


def shares(scores: list[dict], kept: list[bool], rows: list[dict]) -> tuple[float, float]:
    """In percent: of the kept texts, those that are right; and of the right texts, those that are kept."""
    scenes = {row["image_id"]: row["scene"] for row in rows}
    right = [is_right(line["text"], scenes[line["image_id"]]) for line in scores]
    both = sum(keep and good for keep, good in zip(kept, right, strict=True))
    return 100 * both / sum(kept), 100 * both / sum(right)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "least"), [("other image", (98, 93)), ("one word", (90, 93))])
def test_filter_drops_wrong_captions_and_keeps_right_ones(bootstrap, demo_run, tmp_path, how, least):
    rows = corrupt(fresh_rows(1000), how)
    data = ["--dataset_name", save_rows(rows, tmp_path / "rows.parquet"), "--keep_share", "0.7"]
    scores = lines_of(bootstrap(*data, captioner=None, filter=demo_run("retrieval")) / "scores.jsonl")
    for kept in ([line["kept"] for line in scores], decide([line["score"] for line in scores], 0.5, None)):
        kept_are_right, right_are_kept = shares(scores, kept, rows)
        assert kept_are_right >= least[0] and right_are_kept >= least[1]


@pytest.mark.slow
def test_captioner_and_filter_describe_new_images(bootstrap, demo_run, tmp_path):
    rows = fresh_rows(200)
    data = ["--dataset_name", save_rows([row | {"captions": []} for row in rows], tmp_path / "rows.parquet")]
    models = {"captioner": demo_run("captioning"), "filter": demo_run("retrieval")}
    scores = lines_of(bootstrap(*data, **models) / "scores.jsonl")
    kept_are_right, right_are_kept = shares(scores, [line["kept"] for line in scores], rows)
    assert len(scores) == 200 and kept_are_right >= 95 and right_are_kept >= 93
