"""What a run shows while it trains."""

import ast
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from blip_ft.training.progress import ProgressLog


@pytest.mark.parametrize("hidden", [True, False])
def test_figures_are_logged_as_numbers_with_or_without_a_bar(hidden, capsys):
    args, state = SimpleNamespace(disable_tqdm=hidden), TrainerState(max_steps=2, is_world_process_zero=True)
    progress = ProgressLog()
    progress.on_train_begin(args, state, None)
    progress.on_log(args, state, None, logs={"loss": 10.41234, "epoch": 1, "note": "a", "total_flos": 1e9})
    state.global_step = 2
    progress.on_step_end(args, state, None)
    progress.on_train_end(args, state, None)
    out, err = capsys.readouterr()
    assert ast.literal_eval(out) == {"loss": 10.41, "epoch": 1, "note": "a"}
    assert ("2/2" in err) is not hidden


def test_log_file_has_figures_and_no_bars(recipe, data_of, capfd):
    recipe(*data_of("vqa"), "--max_steps", "2", "--logging_steps", "1")
    out, err = capfd.readouterr()
    logged = [ast.literal_eval(line) for line in out.splitlines() if line.startswith("{'loss'")]
    assert len(logged) == 2 and all(isinstance(line["loss"], float) for line in logged)
    assert "\r" not in out + err and "it/s" not in out + err
