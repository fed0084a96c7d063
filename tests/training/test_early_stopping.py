"""early_stopping_patience: when a run stops, what it leaves behind, and how it resumes."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import RECIPES, TASKS, results_of
from programs import run_ranks
from safetensors.torch import load_file
from test_checkpoints import assert_same_end, last_step
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from blip_ft.arguments import BlipTrainingArguments
from blip_ft.training.callbacks import evaluations_since_best
from blip_ft.training.trainer import BlipTrainer

# eight steps at most, an evaluation after each
FLAGS = ["--early_stopping_patience", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "8"]
FLAGS += ["--logging_steps", "1", "--dropout", "0.1", "--save_total_limit", "9"]
# the metric of each evaluation, negative if it is a loss: the third is the best, and the run stops at step 5
SCORES = [1.0, 2.0, 3.0, 3.0, 2.5, 9.0, 9.0, 9.0]
METRICS = {"vqa": "loss", "captioning": "cider", "retrieval": "recall_mean"}


@pytest.fixture
def scored(monkeypatch):
    """The best metric of each evaluation in training is that of SCORES, by step."""
    run = BlipTrainer.evaluation_loop

    def evaluate(self, *args, **kwargs):
        output = run(self, *args, **kwargs)
        if self.is_in_train:
            score = SCORES[self.state.global_step - 1]
            output.metrics[f"eval_{self.best_metric}"] = score if self.args.greater_is_better else -score
        return output

    monkeypatch.setattr(BlipTrainer, "evaluation_loop", evaluate)


@pytest.fixture
def steps(monkeypatch):
    """The steps that were trained, in a list."""
    trained = []

    def train(self, *args, run=BlipTrainer.training_step, **kwargs):
        trained.append(self.state.global_step + 1)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(BlipTrainer, "training_step", train)
    return trained


def state_of(folder) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def assert_same_weights(one, other) -> None:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("task", TASKS)
def test_it_stops_and_ends_with_the_best_checkpoint(recipe, data_of, scored, steps, caplog, task):
    folder = recipe(*data_of(task), *FLAGS, task=task)
    assert steps == [1, 2, 3, 4, 5] and last_step(folder) == 5
    assert_same_weights(folder, folder / "checkpoint-3")
    assert f"Stopped early at step 5 of 8. Evaluations in a row without a better {METRICS[task]}: 2." in caplog.text
    note = results_of(folder)["checkpoint"]
    assert note.startswith("step 3 of 5, the best by ")
    assert note.endswith("; stopped early at step 5 of 8 (early_stopping_patience 2)")
    assert "stopped early at step 5 of 8" in (folder / "README.md").read_text()
    assert "stopped early at step 5 of 8" in (folder / "report.html").read_text()


def test_resumed_run_stops_where_the_unbroken_run_stops(recipe, data_of, scored, steps, tmp_path):
    whole = recipe(*data_of("vqa"), *FLAGS, output_dir=tmp_path / "whole")
    del steps[:]
    # one evaluation without a better score is already behind it
    for step in (3, 4):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    again = recipe(*data_of("vqa"), *FLAGS, "--resume_from_checkpoint", "last", output_dir=tmp_path / "again")
    assert steps == [5] and state_of(again)["best_global_step"] == 3
    # trained on, a run would have weights of step 6
    assert_same_end(whole, again)


def test_run_that_had_stopped_trains_nothing_when_it_is_resumed(recipe, data_of, scored, steps, tmp_path):
    whole = recipe(*data_of("vqa"), *FLAGS, output_dir=tmp_path / "run")
    before = {name: (whole / name).read_bytes() for name in ("model.safetensors", "predictions.jsonl")}
    note = results_of(whole)["checkpoint"]
    del steps[:]
    recipe(*data_of("vqa"), *FLAGS, "--resume_from_checkpoint", "last", output_dir=whole)
    assert steps == [] and last_step(whole) == 5
    assert {name: (whole / name).read_bytes() for name in before} == before
    assert results_of(whole)["checkpoint"] == note


def test_stream_stops_early(recipe, data_of, scored, steps, tmp_path):
    flags = [*data_of("vqa"), *FLAGS, "--streaming", "--per_device_train_batch_size", "4"]
    folder = recipe(*flags, output_dir=tmp_path / "run")
    assert steps == [1, 2, 3, 4, 5]
    assert_same_weights(folder, folder / "checkpoint-3")
    recipe(*flags, "--resume_from_checkpoint", "last", output_dir=folder)
    assert steps == [1, 2, 3, 4, 5]


def test_run_that_gets_better_is_not_stopped(recipe, data_of, monkeypatch, scored, steps):
    monkeypatch.setattr("test_early_stopping.SCORES", [1.0, 1.0, 2.0, 1.0, 3.0, 3.0, 4.0, 4.0])
    folder = recipe(*data_of("vqa"), *FLAGS)
    assert len(steps) == 8 and "stopped early" not in results_of(folder)["checkpoint"]


@pytest.mark.parametrize("greater", [True, False])
def test_evaluations_are_counted_as_by_transformers(tmp_path, greater):
    args = SimpleNamespace(metric_for_best_model="eval_score", greater_is_better=greater)
    draws = random.Random(0)
    for _ in range(50):
        state, reference = TrainerState(), EarlyStoppingCallback(early_stopping_patience=99)
        for _ in range(10):
            value = draws.choice([1.0, 2.0, 3.0, float("nan")])
            state.log_history.append({"eval_score": value})
            reference.on_evaluate(args, state, TrainerControl(), {"eval_score": value})
            if state.best_metric is None or (value > state.best_metric if greater else value < state.best_metric):
                state.best_metric = value
            state.log_history.append({"loss": 1.0})
            assert evaluations_since_best(args, state) == reference.early_stopping_patience_counter


@pytest.mark.parametrize("flags", [{"eval_strategy": "no"}, {"save_strategy": "no"}, {"save_strategy": "best"}])
def test_patience_turns_evaluation_on_or_says_what_it_needs(flags):
    if flags == {"save_strategy": "best"}:
        args = BlipTrainingArguments(early_stopping_patience=1, use_cpu=True, output_dir="x", **flags)
        assert args.eval_strategy == "epoch" and args.load_best_model_at_end
        return
    with pytest.raises(ValueError, match="early_stopping_patience needs checkpoints .* leave out --early_stopping_pat"):
        BlipTrainingArguments(early_stopping_patience=1, use_cpu=True, output_dir="x", **flags)


@pytest.mark.slow
def test_two_processes_stop_together_and_train_nothing_when_they_resume(data_of, tmp_path):
    words = [RECIPES / "vqa.py", *data_of("vqa"), *FLAGS, "--per_device_train_batch_size", "4"]
    words += ["--learning_rate", "0", "--output_dir", tmp_path / "run", "--use_cpu", "--dataloader_num_workers", "0"]
    for more in ([], ["--resume_from_checkpoint", "last"]):  # no score can get better than the first
        for code, errors in run_ranks(*words, *more, folder=tmp_path / "said"):
            assert code == 0, errors[-3000:]
        assert last_step(tmp_path / "run") == state_of(tmp_path / "run")["global_step"] == 3
        assert results_of(tmp_path / "run")["checkpoint"].startswith("step 1 of 3, the best by loss")
