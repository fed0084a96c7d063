"""The learning rate of cosine_per_epoch, in units of its peak."""

import subprocess

import pytest
import torch
from conftest import history_of
from test_checkpoints import assert_same_end
from test_engines import command_of, environment

from blip_ft.training.optimization import cosine_per_epoch

# the eight training rows of data_of are two steps of four; 0.5 * (1 + cos(pi * epoch / 3)) for epochs 0, 1 and 2
THREE_EPOCHS = [1, 1, 0.75, 0.75, 0.25, 0.25]
SCHEDULE = ["--cosine_per_epoch", "--logging_steps", "1", "--learning_rate", "1e-3"]


def rates_of(folder) -> list[float]:
    return [entry["learning_rate"] / 1e-3 for entry in history_of(folder)]


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_train_epochs", "3", "--per_device_train_batch_size", "4"],
        # two batches a step; five steps are not three whole epochs; the default of lr_scheduler_type may be named
        ["--max_steps", "5", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
        + ["--lr_scheduler_type", "cosine"],
    ],
)
def test_learning_rate_is_constant_within_an_epoch(recipe, data_of, flags):
    rates = rates_of(recipe(*data_of("vqa"), *SCHEDULE, *flags))
    assert rates == pytest.approx(THREE_EPOCHS[: len(rates)], abs=1e-12) and len(rates) in (5, 6)


@pytest.mark.parametrize("epochs", [1, 2, 5, 10])
def test_mean_learning_rate_is_above_that_of_a_cosine_in_each_step(epochs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = cosine_per_epoch(optimizer, num_steps=7 * epochs, steps_per_epoch=7)
    rates = []
    for _ in range(7 * epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert sum(rates) / len(rates) == pytest.approx((1 + 1 / epochs) / 2)


def test_resumed_run_has_the_learning_rates_of_the_unbroken_run(recipe, data_of, tmp_path):
    flags = [*data_of("vqa"), *SCHEDULE, "--per_device_train_batch_size", "4", "--num_train_epochs", "3"]
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "9", "--drop_path", "0.5"]
    whole = recipe(*flags, output_dir=tmp_path / "whole")
    again = recipe(*flags, "--resume_from_checkpoint", str(whole / "checkpoint-3"), output_dir=tmp_path / "again")
    assert rates_of(again) == rates_of(whole) == pytest.approx(THREE_EPOCHS, abs=1e-12)
    assert_same_end(whole, again)


def test_warmup_of_blip2_is_left_out(recipe, data_of, golden):
    flags = ["--model_name_or_path", str(golden / "blip2_opt"), "--per_device_train_batch_size", "4"]
    rates = rates_of(recipe(*data_of("vqa"), *SCHEDULE, *flags, "--num_train_epochs", "3"))
    assert rates == pytest.approx(THREE_EPOCHS, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DDP", "ZeRO-2"])
def test_processes_share_the_steps_of_an_epoch(data_of, tmp_path, engine):
    flags = [*data_of("vqa"), *SCHEDULE, "--num_train_epochs", "3", "--per_device_train_batch_size", "1"]
    flags += ["--gradient_accumulation_steps", "2", "--use_cpu", "--dataloader_num_workers", "0"]
    command = [*command_of(engine, "vqa"), *flags, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path / "cache"), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rates_of(tmp_path / "run") == pytest.approx(THREE_EPOCHS, abs=1e-12)
