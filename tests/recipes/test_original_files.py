"""The original's three files of questions are trained on in one command, with its cleaned questions and weights."""

import json
import shutil

import pytest
from conftest import predictions_of, results_of, start_recipe
from golden_blip2 import change_json

from blip_ft.arguments import DataArguments
from blip_ft.data import text_formats
from blip_ft.data.loading import load_vqa
from blip_ft.data_pipeline import DataPipeline
from blip_ft.models import generate_answer_blip, load_model


@pytest.fixture
def original(image_folder, tmp_path):
    """Flags that name the original's files, and the folders vqa and vg of their images."""
    ten = ["red"] * 7 + ["blue"] * 3
    files = {
        "vqa_train": [("train2014/0.png", "What COLOR is it?", ten), ("train2014/0.png", "is it a dog?", ten)],
        "vqa_val": [("val2014/1.png", "What is it?", ten), ("val2014/1.png", "(how many)?", ten)],
        "vg_qa": [("image/2.png", "Who?", "white"), ("image/3.png", "What?", "green")],
    }
    for name, rows in files.items():
        source = name.partition("_")[0]
        for image, *_ in rows:
            path = tmp_path / source / image
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image_folder / path.name, path)
        rows = [
            {"question_id": number, "question": question, "answer": answer, "image": image, "dataset": source}
            for number, (image, question, answer) in enumerate(rows)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    vqa, genome = (str(tmp_path / name) for name in ("vqa", "vg"))
    return ["--dataset_name", *(str(tmp_path / f"{name}.json") for name in files), "--image_folder", vqa, vqa, genome]


def test_rows_of_the_three_files_have_their_answers_weights_and_images(original, image_folder):
    train, held_out = load_vqa(DataArguments(dataset_name=original[1:4], image_folder=original[5:]))
    rows = {row["question_id"]: row for row in (*train, *held_out)}
    assert {name: row["weight"] for name, row in rows.items()} == {
        **{f"{name}.json:{number}": 1.0 for name in ("vqa_train", "vqa_val") for number in range(2)},
        **{"vg_qa.json:0": 0.2, "vg_qa.json:1": 0.2},
    }
    assert rows["vqa_val.json:1"]["image_id"] == "vqa_val.json:val2014/1.png"
    assert rows["vqa_val.json:1"]["answers"] == ["red"] * 7 + ["blue"] * 3
    assert rows["vg_qa.json:0"]["answers"] == ["white"]


def test_one_command_trains_on_the_three_files_and_its_model_cleans_questions(
    recipe, original, checkpoint, image_folder, tmp_path, monkeypatch, caplog
):
    read = []

    def spy(prompt, questions, fill=text_formats.fill_prompt):
        read.extend(questions)
        return fill(prompt, questions)

    monkeypatch.setattr(text_formats, "fill_prompt", spy)
    flags = ["--model_name_or_path", str(checkpoint), *original, "--max_steps", "2", "--save_steps", "1"]
    flags += ["--save_strategy", "steps", "--per_device_train_batch_size", "3", "--skip_dry_run"]
    trained = recipe(*flags, "--clean_questions")
    assert set(read) <= {"what color is it?", "is it a dog?", "what is it?", "how many?", "who?", "what?"}
    assert results_of(trained)["eval_loss"] > 0
    assert json.loads((trained / "config.json").read_text())["clean_questions"] is True

    read.clear()
    image = str(image_folder / "0.png")
    asked = ["--model_name_or_path", str(trained), "--images", image, "--dataloader_num_workers", "0", "--question"]
    folder = start_recipe(monkeypatch, "predict", tmp_path / "cleaned", *asked, "What COLOR is (it)?")
    loaded = load_model(trained)
    question = "What: COLOR is it?"
    (answer,) = generate_answer_blip(loaded["model"], loaded["processor"], [image], [question], max_length=10)
    assert set(read) == {"what color is it?"} and predictions_of(folder)[0]["prediction"] == answer
    start_recipe(monkeypatch, "predict", tmp_path / "as it is", *asked, "Is it?", "--clean_questions", "false")
    assert read[-1] == "Is it?"

    shutil.rmtree(trained / "checkpoint-2")
    with pytest.raises(SystemExit):
        recipe(*flags, "--resume_from_checkpoint", "last", output_dir=trained)
    assert "clean_questions: true -> false" in caplog.text
    recipe(*flags, "--clean_questions", "--resume_from_checkpoint", "last", output_dir=trained)


@pytest.mark.parametrize(
    ("start", "flags", "wanted"),
    [
        (None, [], None),
        (None, ["--clean_questions", "--use_peft"], True),
        (True, ["--use_peft"], True),
        (True, ["--clean_questions", "false", "--use_peft"], False),
        (True, ["--clean_questions", "false"], False),
    ],
)
def test_model_and_adapter_remember_whether_questions_are_cleaned(
    recipe, original, checkpoint, tmp_path, start, flags, wanted
):
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    if start:
        change_json(base / "config.json", clean_questions=True)
    few = ["--max_steps", "1", "--per_device_train_batch_size", "3", "--skip_dry_run"]
    folder = recipe("--model_name_or_path", str(base), *original, *few, *flags)
    assert getattr(load_model(folder, merge=True)["model"].config, "clean_questions", None) is wanted


def test_pipeline_mixes_sources_and_cleans_questions(original, checkpoint, monkeypatch):
    settings = {"model_name_or_path": str(checkpoint), "dataset_name": original[1:4], "image_folder": original[5:]}
    pipeline = DataPipeline({**settings, "clean_questions": True, "dataloader_num_workers": 0})
    pipeline.setup()
    tokenizer = pipeline.processor.tokenizer
    read = [text for batch in pipeline.get_train_dataloader() for text in tokenizer.batch_decode(batch["input_ids"])]
    assert len(read) == len(pipeline.train_rows) and not any("(" in text for text in read)
    assert pipeline.texts.clean_questions
