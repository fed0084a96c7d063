"""recipes/predict.py with BLIP-2 and InstructBLIP: what a run of training has written comes out again."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, RECIPES, predictions_of


@pytest.fixture
def predict(monkeypatch, tmp_path, image_folder):
    """Runs predict.py in this process on the rows of the split test, and returns output_dir."""

    def start(model: Path, *flags: str, folder: str = "predicted", data: bool = True) -> Path:
        path = str(RECIPES / "predict.py")
        common = ["--model_name_or_path", str(model), "--output_dir", str(tmp_path / folder), "--use_cpu"]
        rows = ["--dataset_name", str(image_folder), "--eval_split", "test"] if data else []
        monkeypatch.setattr(sys, "argv", [path, *common, *rows, "--dataloader_num_workers", "0", *flags])
        runpy.run_path(path, run_name="__main__")
        return tmp_path / folder

    return start


# the prompts are not those of the family
CASES = [
    ("vqa", "blip2_opt", ["--question_prompt", "Q: {} A:"]),
    ("vqa", "blip2_t5", []),
    ("vqa", "instructblip_vicuna", ["--use_peft", "--question_prompt", "{} The answer is"]),
    ("captioning", "blip2_opt", ["--prompt", "a large", "--use_peft"]),
    ("captioning", "instructblip_t5", []),
]


@pytest.mark.parametrize(("task", "name", "flags"), CASES)
def test_predictions_equal_those_of_the_evaluation_in_training(recipe, predict, image_folder, task, name, flags):
    data = ["--dataset_name", str(image_folder), "--eval_split", "test", "--model_name_or_path", str(GOLDEN / name)]
    few = ["--max_steps", "1", "--per_device_train_batch_size", "8", "--skip_dry_run", "--learning_rate", "1e-3"]
    trained = recipe(*data, *few, *flags, "--warmup_steps", "0", "--per_device_eval_batch_size", "3", task=task)
    wanted = predictions_of(trained)
    lines = predictions_of(predict(trained))
    assert len(lines) == len(wanted) == {"vqa": 8, "captioning": 4}[task]
    for line, other in zip(lines, wanted, strict=True):
        other.pop("loss", None)
        assert line.pop("probability") == pytest.approx(other.pop("probability"), rel=1e-4)
        assert line == other
    # a prompt changes the answers, or at least their probabilities
    flag = {"vqa": "--question_prompt", "captioning": "--prompt"}[task]
    others = predictions_of(predict(trained, flag, "the {} dog", folder="with another prompt"))
    assert [line["probability"] for line in others] != [line["probability"] for line in predictions_of(trained)]


def test_question_by_hand_and_the_caption_that_a_flag_asks_for(predict, image_folder):
    image = ["--images", str(image_folder / "1.png")]
    (line,) = predictions_of(predict(GOLDEN / "blip2_opt", *image, "--question", "is it a dog ?", data=False))
    assert line["question"] == "is it a dog ?" and 0 < line["probability"] <= 1


def test_task_of_a_checkpoint_without_one_is_chosen_by_a_flag(predict, image_folder):
    (line,) = predictions_of(
        predict(GOLDEN / "blip2_opt", "--images", str(image_folder / "1.png"), "--task", "captioning", data=False)
    )
    assert "question" not in line and line["prediction"]


MISTAKES = {
    "prompt of captions": (["--prompt", "a photo of"], "--prompt needs a checkpoint for conditional_generation"),
    "no place": (["--question_prompt", "Answer:"], "question_prompt needs {} where the question goes"),
    "no room": (["--max_question_tokens", "3"], "leaves no room for a question"),
    "too long": (["--generation_max_length", "157"], "supports texts of at most 156 tokens"),
    "too long together": (["--generation_max_length", "150"], "Shorten one of them"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_message(predict, caplog, mistake):
    flags, message = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stopped:
        predict(GOLDEN / "blip2_opt", *flags)
    assert stopped.value.code == 1 and message in caplog.text


def test_checkpoint_of_captions_answers_no_question(predict, tmp_path, caplog):
    folder = tmp_path / "captions"
    folder.mkdir()
    for file in (GOLDEN / "blip2_opt").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"task": "conditional_generation", "prompt": "a"}))
    with pytest.raises(SystemExit):
        predict(folder, "--question", "is it a dog ?")
    assert "--question needs a checkpoint for vqa; this one is for conditional_generation" in caplog.text
