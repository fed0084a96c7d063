"""check_data.py prints what the recipes read, and its exit code says whether they would train."""

import json
import runpy
import sys

import pytest
from conftest import RECIPES


@pytest.fixture
def check(monkeypatch, tmp_path, capsys):
    """Run check_data.py in an empty folder and return the printed lines, with single spaces between words."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", [str(RECIPES / "check_data.py"), *map(str, flags)])
        runpy.run_path(sys.argv[0], run_name="__main__")
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return run


def test_questions_are_counted_by_row_image_length_type_and_answer(check, image_folder):
    lines = check("--dataset_name", image_folder, "--eval_split", "test", "--per_device_train_batch_size", "8")
    assert lines[0] == "0 rows cannot be used."
    assert "train 8 4" in lines and "evaluate 8 4" in lines
    assert "question 5 5 5" in lines and "answer 1 1 1" in lines
    assert "answer types: other 50.0%, yes/no 50.0%" in lines
    assert "most frequent answers: yes 25.0%, no 25.0%, red 12.5%, green 12.5%, blue 12.5%, white 12.5%" in lines
    first = "image_id: '0.png', question: 'what color is it ?', question_id: 'train-0', answers: ['red']"
    assert first in lines
    assert lines[-1] == "Training is possible, with at most 8 rows per step."


@pytest.mark.parametrize("config", ["captioning_base_lora", "captioning_blip2_coco", "retrieval_base"])
def test_yaml_of_any_recipe_is_accepted_and_captions_are_counted(check, image_folder, config):
    path = RECIPES / "configs" / f"{config}.yaml"
    task = config.split("_")[0]
    rows = ["--dataset_name", image_folder, "--eval_split", "test", "--per_device_train_batch_size", "8"]
    lines = check("--config", path, *rows, "--task", task, "--gradient_accumulation_steps", "1")
    assert f"recipes/{task}.py would read these rows of {image_folder.name}:" in lines
    assert "train 8 4" in lines and "evaluate 4 4" in lines
    assert "caption 7.5 10 10" in lines  # half have five words, half have ten


def test_rows_with_only_captions_do_not_need_a_task(check, image_folder, tmp_path):
    rows = [json.loads(line) for line in (image_folder / "metadata.jsonl").read_text().splitlines()]
    kept = [{name: row[name] for name in ("file_name", "caption")} for row in rows]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    flags = ["--dataset_name", "captions.jsonl", "--image_folder", image_folder]
    lines = check(*flags, "--per_device_train_batch_size", "6")
    assert "recipes/captioning.py would read these rows of captions.jsonl:" in lines


def test_bad_rows_are_counted_by_reason_and_too_many_end_in_exit_code_1(check, image_folder, tmp_path, capsys, caplog):
    rows = [json.loads(line) for line in (image_folder / "metadata.jsonl").read_text().splitlines()]
    rows += [{**rows[0], "file_name": name} for name in ("none.png", "nowhere.png", "../a.png")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset_name", "rows.jsonl", "--image_folder", image_folder, "--eval_split", "test"]
    flags += ["--per_device_train_batch_size", "8"]
    with pytest.raises(SystemExit) as stopped:
        check(*flags)
    assert stopped.value.code == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [
        "3 rows cannot be used, all listed in bad_rows.jsonl:",
        "2 image cannot be read: FileNotFoundError, first in train row 8 (none.png)",
    ]
    assert "--max_bad_fraction 0.158" in caplog.text
    assert check(*flags, "--max_bad_fraction", "0.158")[-1] == "Training is possible, with at most 8 rows per step."
    assert len((tmp_path / "bad_rows.jsonl").read_text().splitlines()) == 3


def test_batch_larger_than_the_data_is_refused_as_in_a_recipe(check, image_folder, caplog):
    with pytest.raises(SystemExit):
        check("--dataset_name", image_folder, "--eval_split", "test", "--per_device_train_batch_size", "9")
    assert "Choose at most 8" in caplog.text


def test_rows_for_another_task_are_refused_with_that_task(check, image_folder, tmp_path, caplog):
    rows = [json.loads(line) for line in (image_folder / "metadata.jsonl").read_text().splitlines()]
    for name, columns in (("captions", ("file_name", "caption")), ("questions", ("file_name", "question", "answer"))):
        lines = [json.dumps({column: row[column] for column in columns}) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    folder = ["--image_folder", image_folder]
    with pytest.raises(SystemExit):
        check("--dataset_name", "captions.jsonl", *folder, "--task", "vqa")
    assert "Check them with --task captioning" in caplog.text and "question_column file_name" not in caplog.text
    with pytest.raises(SystemExit):
        check("--dataset_name", "questions.jsonl", *folder, "--task", "retrieval")
    assert "Check them with --task vqa" in caplog.messages[-1]


def test_batch_size_is_that_of_the_recipe(check, image_folder, caplog):
    """Eight rows do not fill a batch of 16 (vqa) or 32 (captioning, retrieval)."""
    for task, size in (("vqa", 16), ("captioning", 32), ("retrieval", 32)):
        program = runpy.run_path(str(RECIPES / f"{task}.py"))
        assert program["Training"].per_device_train_batch_size == size
        with pytest.raises(SystemExit):
            check("--dataset_name", image_folder, "--eval_split", "test", "--task", task)
        assert f"One optimizer step uses {size} rows" in caplog.messages[-1]


def test_sources_of_a_mixture_and_weights_of_rows_are_counted(check, image_folder, tmp_path):
    rows = [{**json.loads(line), "weight": 0.2} for line in (image_folder / "metadata.jsonl").open()]
    (tmp_path / "light.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["split"] == "train"))
    data = ["--dataset_name", image_folder, "light.jsonl", "--image_folder", image_folder, "--eval_fraction", "0.25"]
    lines = check(*data, "--per_device_train_batch_size", "6")
    assert f"recipes/vqa.py would read these rows of {image_folder.name} + light.jsonl:" in lines
    assert f"sources to train on: {image_folder.name} 50.0%, light.jsonl 50.0%" in lines
    assert "weights of rows: 1.0 50.0%, 0.2 50.0%" in lines
