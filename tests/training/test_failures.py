"""Runs that cannot go well: they stop early, with one message, and leave nothing behind that looks like a result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RECIPES, history_of, predictions_of
from programs import Program, run_ranks
from safetensors.torch import load_file

from blip_ft.cli import start_recipe
from blip_ft.data.tables import to_json
from blip_ft.modeling.blip.contrastive import require_memory_for_queue
from blip_ft.training.signals import explain_lost_worker


def message_of(caplog) -> str:
    """What a run that ended with exit code 1 said last."""
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"][-1]


def fails(recipe, *flags: str, **kwargs) -> None:
    with pytest.raises(SystemExit) as stopped:
        recipe(*flags, **kwargs)
    assert stopped.value.code == 1


def all_finite(path) -> bool:
    return all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point())


@pytest.mark.parametrize("task", ["vqa", "captioning", "retrieval"])
def test_run_stops_at_the_first_step_whose_loss_is_not_finite(recipe, data_of, tmp_path, caplog, task):
    flags = ["--learning_rate", "1e30", "--max_steps", "4", "--warmup_steps", "0"]
    flags += ["--save_strategy", "no", "--load_best_model_at_end", "false"]
    fails(recipe, *data_of(task), *flags, task=task)
    said = message_of(caplog)
    assert (
        "step 2 is not finite" in said and "--max_grad_norm 1" in said and "lower --learning_rate (now 1e+30)" in said
    )
    assert "Traceback" not in caplog.text and "no checkpoint had been written" in said
    assert (
        not list((tmp_path / "run").glob("**/*.safetensors")) and not (tmp_path / "run" / "all_results.json").exists()
    )


@pytest.mark.parametrize("last_step", [["--save_strategy", "no"], ["--save_steps", "1", "--save_strategy", "steps"]])
def test_weights_that_only_the_last_step_broke_are_not_saved(recipe, data_of, tmp_path, caplog, last_step, monkeypatch):
    step = torch.optim.AdamW.step

    def break_at_third(self, *args, **kwargs):
        step(self, *args, **kwargs)
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[0] = torch.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", break_at_third)
    fails(recipe, *data_of("vqa"), "--max_steps", "3", *last_step)
    assert "the weights of step 3 are not finite" in message_of(caplog)
    folder = tmp_path / "run"
    saved = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert saved == (["checkpoint-1", "checkpoint-2"] if "steps" in last_step else [])
    assert ("checkpoint-2 is the last complete checkpoint" in message_of(caplog)) == bool(saved)
    assert all(all_finite(path) for path in folder.glob("**/model.safetensors"))
    assert not (folder / "model.safetensors").exists()


# a program whose second process alone has a loss that is not finite, and weights that are
BROKEN_IN_SECOND = """
import os, runpy, sys
from blip_ft.training.trainer import BlipTrainer
compute_loss = BlipTrainer.compute_loss
def broken(self, *args, **kwargs):
    loss = compute_loss(self, *args, **kwargs)
    return loss + float("nan") if os.environ["RANK"] == "1" and self.state.global_step == 2 else loss
BlipTrainer.compute_loss = broken
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def on_two(folder: Path, *words: str | Path) -> list[tuple[int, str]]:
    """The exit codes and messages of two processes that write to folder."""
    flags = ["--use_cpu", "--dataloader_num_workers", "0", "--output_dir", folder]
    return run_ranks(*words, *flags, folder=folder.with_name("said"))


def test_loss_of_one_process_that_is_not_finite_stops_all(data_of, tmp_path):
    program, folder = tmp_path / "broken.py", tmp_path / "run"
    program.write_text(BROKEN_IN_SECOND)
    flags = ["--per_device_train_batch_size", "4", "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2"]
    (code, said), (other_code, _) = on_two(folder, program, RECIPES / "vqa.py", *data_of("vqa"), *flags)
    assert code == other_code == 1
    assert f"the loss of step 3 is not finite (NaN or infinity). That state is not saved; {folder}" in said
    assert "checkpoint-2 is the last complete checkpoint" in said
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]


def test_json_has_null_for_what_is_not_finite():
    line = {"loss": float("nan"), "scores": [1.5, float("-inf"), {"deep": float("inf")}], "text": "NaN", "number": 3}
    assert json.loads(to_json(line)) == {
        "loss": None,
        "scores": [1.5, None, {"deep": None}],
        "text": "NaN",
        "number": 3,
    }


DRY_RUN = "Dry run of all stages"


@pytest.mark.parametrize(
    ("stage", "task"),
    [
        ("blip_ft.training.run.build_model_card", "vqa"),
        ("blip_ft.training.run.write_report", "captioning"),
        ("blip_ft.training.run.write_lines", "retrieval"),
        ("blip_ft.modeling.inference.answer", "vqa"),
        ("blip_ft.modeling.inference.caption", "captioning"),
        ("blip_ft.modeling.inference.rank_pairs", "retrieval"),
    ],
)
def test_stage_that_fails_does_so_before_the_first_step(recipe, data_of, tmp_path, caplog, monkeypatch, stage, task):
    def fail(*args, **kwargs):
        raise ValueError(f"{stage} cannot work")

    monkeypatch.setattr(stage, fail)
    fails(recipe, *data_of(task), "--max_steps", "2", task=task)
    assert f"{stage} cannot work" in message_of(caplog) and DRY_RUN in caplog.text
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".gitignore", "bad_rows.jsonl", ".lock"}


def test_best_metric_that_is_not_measured_is_refused_before_the_first_step(recipe, data_of, tmp_path, caplog):
    flags = ["--metric_for_best_model", "vqa_accuracy_animal", "--eval_strategy", "epoch", "--max_steps", "2"]
    fails(recipe, *data_of("vqa"), *flags)
    assert "vqa_accuracy_animal is not measured here. Choose one of vqa_accuracy" in message_of(caplog)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("vqa", ["--dropout", "0.1", "--eval_on_start"]),
        ("vqa", ["--cache_image_features", "--freeze", "vision_model", "--cache_dtype", "fp32"]),
        ("vqa", ["--streaming", "--shuffle_buffer", "4"]),
        ("captioning", ["--dropout", "0.1", "--streaming", "--use_peft"]),
        ("retrieval", ["--dropout", "0.1", "--k_test", "500", "--eval_strategy", "steps", "--eval_steps", "2"]),
    ],
)
def test_dry_run_changes_no_number(recipe, data_of, tmp_path, caplog, monkeypatch, task, flags):
    monkeypatch.setattr("blip_ft.training.feature_cache.HF_CACHE_HOME", str(tmp_path))
    flags = [*data_of(task), *flags, "--max_steps", "3", "--logging_steps", "1"]
    dry = recipe(*flags, output_dir=tmp_path / "dry", task=task)
    assert caplog.text.count(DRY_RUN) == 1
    at_once = recipe(*flags, "--skip_dry_run", output_dir=tmp_path / "at_once", task=task)
    assert caplog.text.count(DRY_RUN) == 1
    one, other = (load_file(next(folder.glob("*model.safetensors")), device="cpu") for folder in (dry, at_once))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert predictions_of(dry) == predictions_of(at_once)
    numbers = [
        [{name: value for name, value in entry.items() if not name.endswith("second")} for entry in history_of(folder)]
        for folder in (dry, at_once)
    ]
    assert numbers[0] == numbers[1]
    recipe(*flags, "--resume_from_checkpoint", "last", output_dir=at_once, task=task)
    assert caplog.text.count(DRY_RUN) == 1


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_two_processes_run_dry_together(data_of, tmp_path, task):
    flags = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--max_eval_samples", "1"]
    ended = on_two(tmp_path / "run", RECIPES / f"{task}.py", *data_of(task), *flags)
    assert [code for code, _ in ended] == [0, 0]
    assert "".join(said for _, said in ended).count(DRY_RUN) == 1
    assert (tmp_path / "run" / "all_results.json").exists()


def test_checkpoint_with_a_loss_that_is_not_finite_is_refused_before_the_first_step(
    recipe, data_of, monkeypatch, caplog, tmp_path
):
    from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering

    forward = BlipForQuestionAnswering.forward

    def broken(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.loss = output.loss + torch.nan
        return output

    monkeypatch.setattr(BlipForQuestionAnswering, "forward", broken)
    fails(recipe, *data_of("vqa"), "--max_steps", "1")
    assert "before the first step: the weights of the checkpoint are damaged" in message_of(caplog)


@pytest.mark.parametrize("at", ["first step", "evaluation"])
def test_killed_worker_ends_in_one_message_that_says_how_to_resume(data_of, tmp_path, at):
    """Workers are killed as the system does that has no memory left, in training or in an evaluation."""
    folder, program = tmp_path / "run", tmp_path / "killed.py"
    program.write_text(
        "import os, runpy, signal, sys\n"
        "from blip_ft.data import collators\n"
        "from torch.utils.data import get_worker_info\n"
        "read = collators.encode_row_images\n"
        "def kill(rows, *args):\n"
        f"    if get_worker_info() and ({at == 'first step'} or os.path.isdir({str(folder / 'checkpoint-1')!r})):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(rows, *args)\n"
        "collators.encode_row_images = kill\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = ["--max_steps", "1", "--dataloader_num_workers", "1", "--use_cpu", "--output_dir", str(folder)]
    words = [program, RECIPES / "vqa.py", *data_of("vqa"), *flags]
    code, said = Program(*words, errors=tmp_path / "said").wait()
    assert code == 1 and "Traceback" not in said
    assert "A worker process that loads images has ended" in said
    assert f"Resume with: --output_dir {folder} --resume_from_checkpoint last" in said
    last = "No checkpoint had been written" if at == "first step" else f"{folder}/checkpoint-1 is the last complete"
    assert last in said


class Rows(list):
    """A data set whose second row cannot be read."""

    def __getitem__(self, position):
        if position == 1:
            raise super().__getitem__(position)
        return position


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("The column is gone.\nAdd it."), ValueError, "failed: The column is gone.\nAdd it. Go on."),
        (KeyError("image"), ChildProcessError, "failed: KeyError: 'image'. Go on."),
        (
            RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)"),
            ChildProcessError,
            "--shm-size), or set --dataloader_num_workers 0. Go on.",
        ),
    ],
)
def test_failure_in_a_worker_gives_its_own_message_without_traceback(error, kind, message):
    loader = torch.utils.data.DataLoader(Rows([0, error]), num_workers=1)
    with pytest.raises(kind) as raised, explain_lost_worker(lambda: "Go on."):
        list(loader)
    assert str(raised.value).endswith(message) and "File" not in str(raised.value)


def test_queue_larger_than_all_memory_is_refused_before_weights_load(recipe, data_of, caplog, monkeypatch):
    def load(*args):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("blip_ft.training.setup.load_for_training", load)
    fails(recipe, *data_of("retrieval"), "--queue_size", "1000000000000", task="retrieval")
    assert "queue_size 1,000,000,000,000 needs" in message_of(caplog)
    with pytest.raises(ValueError, match=r"queue_size 1,000,000,000 needs 2,056.0 GB of memory, and this machine has"):
        require_memory_for_queue(10**9, 256, torch.device("cpu"))
    require_memory_for_queue(57600, 256, torch.device("cpu"))


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**50), lambda: np.empty(2**55), lambda: bytearray(2**60)],
    ids=["torch", "numpy", "python"],
)
def test_memory_that_cannot_be_had_ends_in_one_message(caplog, monkeypatch, allocate):
    monkeypatch.setattr(sys, "argv", ["recipe"])
    with pytest.raises(SystemExit) as stopped:
        start_recipe(allocate)
    assert stopped.value.code == 1
    assert "There is too little memory. Lower --per_device_train_batch_size" in message_of(caplog)
