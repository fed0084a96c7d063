"""Recipes as users start them: what they write, what they refuse, and that equal runs give equal numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.models.blip import modeling_blip

ROOT = Path(__file__).parent.parent


def results_of(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def history_of(folder: Path) -> list[dict]:
    return [
        entry for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]


@pytest.fixture
def data(checkpoint, picture_folder):
    return [
        *("--model_name_or_path", str(checkpoint), "--dataset_name", str(picture_folder)),
        *("--eval_split", "test", "--learning_rate", "3e-3", "--per_device_train_batch_size", "8"),
    ]


def test_eight_rows_are_learned_by_heart_and_every_file_is_written(recipe, data):
    folder = recipe(*data, "--num_train_epochs", "40", "--logging_steps", "1", "--sample_steps", "20")
    results = results_of(folder)
    assert results["eval_exact_match"] == results["eval_vqa_accuracy"] == 100
    assert results["scoring_rule"] == "match with any of the answers"
    losses = [entry["loss"] for entry in history_of(folder)]
    assert losses[-1] < losses[0] / 2
    written = {path.name for path in folder.iterdir()}
    assert written >= {
        *("model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "README.md"),
        *("all_results.json", "trainer_state.json", "predictions.jsonl", "checkpoint-40"),
    }
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in predictions] == [row["answers"][0] for row in predictions]
    assert "BlipForQuestionAnswering.from_pretrained" in (folder / "README.md").read_text()
    _, info = modeling_blip.BlipForQuestionAnswering.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_accumulation_gives_the_losses_and_gradient_norms_of_the_one_big_batch(recipe, data, tmp_path):
    common = ["--max_steps", "4", "--logging_steps", "1", "--lr_scheduler_type", "constant"]
    one = history_of(recipe(*data, *common, output_dir=tmp_path / "one"))
    flags = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    four = history_of(recipe(*data, *common, *flags, output_dir=tmp_path / "four"))
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in four] == pytest.approx([entry[name] for entry in one], rel=1e-4)


def test_two_processes_give_the_losses_and_predictions_of_one(recipe, data, tmp_path):
    common = ["--max_steps", "3", "--logging_steps", "1"]
    one = recipe(*data, *common, output_dir=tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "recipes" / "vqa.py")]
    flags = [*data, *common, "--per_device_train_batch_size", "4", "--use_cpu", "--dataloader_num_workers", "0"]
    subprocess.run(
        [*command, *flags, "--output_dir", str(tmp_path / "two")],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for name in ("loss", "grad_norm"):
        values = [[entry[name] for entry in history_of(tmp_path / run)] for run in ("one", "two")]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    rows, others = (
        [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for folder in (one, tmp_path / "two")
    )
    assert [row.pop("loss") for row in rows] == pytest.approx([row.pop("loss") for row in others], rel=1e-4)
    assert rows == others


def test_launched_without_arguments_it_trains_the_demo_and_says_so(tmp_path):
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--quiet", str(ROOT / "recipes" / "vqa.py")]
    done = subprocess.run(
        [*command, "--max_steps", "2", "--max_eval_samples", "60"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "training the built-in small model on built-in pictures" in done.stderr
    assert "--dataset_name FOLDER" in done.stderr
    results = results_of(tmp_path / "outputs" / "vqa")
    assert results["before_training_exact_match"] < 50
    assert (tmp_path / "outputs" / "vqa" / "model.safetensors").is_file()


def test_demo_learns_to_answer_nine_of_ten_questions_about_new_pictures(demo_checkpoint):
    results = results_of(demo_checkpoint)
    assert results["before_training_exact_match"] < 50
    assert results["eval_exact_match"] >= 90
    assert results["answer_types"] == "of the data"


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_adapter_trains_with_checkpointing_and_loads_in_stock(recipe, data, checkpoint, bits):
    quantized = [f"--load_in_{bits}bit"] if bits else []
    folder = recipe(
        *data,
        "--use_peft",
        *quantized,
        "--max_steps",
        "3",
        "--gradient_checkpointing",
        "--logging_steps",
        "1",
        *("--gradient_checkpointing_kwargs", '{"use_reentrant": false}'),
    )
    assert not (folder / "model.safetensors").exists()
    adapter = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert not any(".cls." in name for name in adapter)
    losses = [entry["loss"] for entry in history_of(folder)]
    assert losses[-1] < losses[0]

    stock = modeling_blip.BlipForQuestionAnswering.from_pretrained(checkpoint)
    adapted = PeftModel.from_pretrained(stock, folder).eval()
    inputs = {
        "pixel_values": torch.randn(2, 3, 32, 32),
        "input_ids": torch.tensor([[101, 6, 7, 102], [101, 8, 5, 102]]),
        "decoder_input_ids": torch.tensor([[126, 28], [126, 9]]),
        "labels": torch.tensor([[126, 28], [126, 9]]),
    }
    before = adapted(**inputs).loss
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).loss, before, atol=1e-5, rtol=1e-5)


def test_frozen_parts_do_not_change(recipe, data, checkpoint):
    folder = recipe(*data, "--max_steps", "2", "--freeze", "vision_model,text_encoder.embeddings")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith(("vision_model.", "text_encoder.embeddings.")) for name in changed)


def test_model_flags_are_stored_in_the_checkpoint(recipe, data):
    flags = ["--image_size", "48", "--dropout", "0.2", "--label_smoothing", "0.3", "--question_start_token", "enc"]
    config = json.loads((recipe(*data, *flags, "--max_steps", "1") / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 48
    assert config["text_config"]["hidden_dropout_prob"] == config["text_config"]["attention_probs_dropout_prob"] == 0.2
    assert config["text_config"]["label_smoothing"] == 0.3
    assert config["question_start_token"] == "enc"


def test_ranking_answers_only_from_the_list(recipe, data, tmp_path):
    (tmp_path / "answers.txt").write_text("red\ngreen\ntwo\n")
    flags = ["--answer_mode", "rank", "--answer_list", str(tmp_path / "answers.txt"), "--max_steps", "1"]
    lines = (recipe(*data, *flags) / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["prediction"] for line in lines} <= {"red", "green", "two"}


def test_resumed_run_equals_unbroken_run(recipe, data, tmp_path):
    common = [*data, "--num_train_epochs", "4", "--per_device_train_batch_size", "4", "--save_strategy", "steps"]
    whole = recipe(*common, "--save_steps", "4", output_dir=tmp_path / "whole")
    cut = recipe(*common, "--save_steps", "3", "--max_steps", "8", output_dir=tmp_path / "cut")
    for path in cut.glob("checkpoint-[68]"):
        import shutil

        shutil.rmtree(path)
    recipe(*common, "--save_steps", "3", "--resume_from_checkpoint", "last", output_dir=cut)
    a, b = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


MISTAKES = {
    "unknown flag": (["--learning_rat", "1"], "Did you mean learning_rate"),
    "no such model": (["--model_name_or_path", "/no/such/model"], "There is no folder /no/such/model"),
    "no such data": (["--dataset_name", "/no/such/data"], "Check the path"),
    "no such column": (["--question_column", "q"], "Set question_column, e.g. --question_column question"),
    "no such split": (["--eval_split", "dev"], "the data has train, test"),
    "two widths": (["--use_peft", "--load_in_8bit", "--load_in_4bit"], "Choose one width"),
    "bits without adapter": (["--load_in_4bit"], "Add --use_peft"),
    "unshifted smoothing": (["--label_smoothing_factor", "0.1"], "Use --label_smoothing"),
    "freeze nothing": (["--freeze", "classifier"], "There are vision_model, text_encoder, text_decoder"),
    "freeze all": (["--freeze", "vision_model,text_encoder,text_decoder"], "Everything is frozen"),
    "batch too large": (["--per_device_train_batch_size", "64"], "Choose at most 8"),
    "rank without list": (["--answer_mode", "rank"], "give --answer_mode rank --answer_list FILE"),
    "odd size": (["--image_size", "50"], "multiple of the patch size 8"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_message_that_helps(recipe, data, caplog, mistake):
    flags, message = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stopped:
        recipe(*data, *flags)
    assert stopped.value.code not in (0, None)
    assert message in caplog.text
    assert "Traceback" not in caplog.text


def test_mistake_shows_its_traceback_under_debug(recipe, data):
    with pytest.raises(ValueError, match="Choose at most 8"):
        recipe(*data, "--per_device_train_batch_size", "64", "--debug")


def test_output_dir_in_use_is_refused(recipe, data, tmp_path, caplog):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(SystemExit):
        recipe(*data, output_dir=tmp_path / "used")
    assert "is not empty" in caplog.text and "--resume_from_checkpoint last" in caplog.text
