"""Nothing is lost: what a kill, a signal or a full disk leaves behind, and that the run goes on from it exactly."""

import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import RECIPES
from programs import Program
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer

from blip_ft.arguments import BlipTrainingArguments
from blip_ft.data import loading
from blip_ft.results.files import LOCK, claim, release_folders
from blip_ft.training.checkpoints import newest_checkpoint, remove_old_checkpoints, what_is_missing
from blip_ft.training.run_settings import _require_same_settings
from blip_ft.training.setup import _choose_output_dir

# dropout: random numbers must go on too
SAVING = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "3", "--dropout", "0.1"]
KINDS = {
    "full": ("vqa", ["--num_train_epochs", "6", "--per_device_train_batch_size", "2"]),
    "lora, accumulation": (
        "vqa",
        ["--num_train_epochs", "12", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
        + ["--use_peft", "--lora_dropout", "0.1"],
    ),
    "augment": ("vqa", ["--num_train_epochs", "6", "--per_device_train_batch_size", "2", "--augment"]),
    "queue": ("retrieval", ["--num_train_epochs", "12", "--per_device_train_batch_size", "4", "--queue_size", "24"]),
}


@pytest.fixture
def flags_of(checkpoints, image_folder):
    def flags(kind: str) -> tuple[str, list[str]]:
        task, settings = KINDS[kind]
        source = ["--model_name_or_path", str(checkpoints[task]), "--dataset_name", str(image_folder)]
        rest = ["--eval_split", "test", "--learning_rate", "3e-3", *SAVING]
        return task, [*source, *settings, *rest, *(["--k_test", "3"] if task == "retrieval" else [])]

    return flags


def start(task: str, folder: Path, *flags: str) -> Program:
    words = [RECIPES / f"{task}.py", "--dataloader_num_workers", "0", *flags, "--resume_from_checkpoint", "last"]
    return Program(*words, "--output_dir", folder, "--use_cpu", errors=folder.with_name("said"))


def last_step(folder: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


def wait_for_step(process: Program, folder: Path, step: int) -> None:
    while last_step(folder) < step and process.poll() is None:
        time.sleep(0.002)


def assert_same_end(one: Path, other: Path) -> None:
    step = last_step(one)
    assert last_step(other) == step
    files = [path.name for path in one.glob("*.safetensors")]
    assert files
    pairs = [(load_file(one / name), load_file(other / name)) for name in files]
    ends = [folder / f"checkpoint-{step}" for folder in (one, other)]
    if (ends[0] / "contrastive.safetensors").exists():
        pairs.append(tuple(load_file(end / "contrastive.safetensors") for end in ends))
    states = [torch.load(end / "optimizer.pt", weights_only=True)["state"] for end in ends]
    assert states[0].keys() == states[1].keys()
    pairs += [(states[0][key], states[1][key]) for key in states[0]]
    for a, b in pairs:
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert len({(end / "scheduler.pt").read_bytes() for end in ends}) == 1


def kill_and_go_on(recipe, flags_of, tmp_path, kind: str, kills: int) -> None:
    task, flags = flags_of(kind)
    whole = recipe(*flags, output_dir=tmp_path / "whole", task=task)
    seed = int(os.environ.get("BLIP_FT_TEST_SEED", time.time_ns()))
    # pytest shows it if the test fails
    logging.getLogger(__name__).warning("To kill at the same moments again: BLIP_FT_TEST_SEED=%d", seed)
    chance = random.Random(seed)
    steps, cut = last_step(whole), tmp_path / "cut"
    for number in range(kills):
        process = start(task, cut, *flags)
        # the first kill in the first epoch, the others anywhere in what is left; saving takes most of the time
        here = last_step(cut)
        wait_for_step(process, cut, here + (1 if number == 0 else chance.randint(0, max(1, (steps - here) // 2))))
        if number and chance.random() < 0.3:
            time.sleep(chance.uniform(0, 2))  # also while data and checkpoint are loaded
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.wait()
    code, errors = start(task, cut, *flags).wait()
    assert code == 0, errors[-3000:]
    assert_same_end(whole, cut)
    assert not (cut / "_saving").exists()


@pytest.mark.parametrize("kind", ["augment", pytest.param("lora, accumulation", marks=pytest.mark.slow)])
def test_killed_twice_at_random_moments_it_ends_as_the_unbroken_run(recipe, flags_of, tmp_path, kind):
    kill_and_go_on(recipe, flags_of, tmp_path, kind, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("full", 4), ("augment", 4), ("lora, accumulation", 6), ("queue", 6)])
def test_killed_at_twenty_random_moments_it_ends_as_the_unbroken_runs(recipe, flags_of, tmp_path, kind, kills):
    kill_and_go_on(recipe, flags_of, tmp_path, kind, kills)


# to the process alone, or to its workers too, as a terminal, timeout, torchrun and Slurm do
@pytest.mark.parametrize(("number", "to"), [(signal.SIGINT, "all"), (signal.SIGTERM, "one"), (signal.SIGTERM, "all")])
def test_signal_saves_says_how_to_go_on_and_ends_with_its_code(flags_of, tmp_path, number, to):
    task, flags = flags_of("full")
    flags = [*flags, "--save_steps", "5"]
    folder = tmp_path / "cut"
    workers = ["--dataloader_num_workers", "2" if to == "all" else "0"]
    process = start(task, folder, *flags, "--num_train_epochs", "500", *workers)
    wait_for_step(process, folder, 5)
    (os.killpg if to == "all" else os.kill)(process.pid, number)
    code, errors = process.wait(timeout=60)
    assert code == 128 + number
    step = last_step(folder)
    saved = folder / f"checkpoint-{step}"
    assert what_is_missing(saved) is None
    assert f"{saved} is complete. Resume with: --output_dir {folder} --resume_from_checkpoint last" in errors
    assert "Traceback" not in errors


def test_sigterm_while_rows_are_read_is_an_exit_which_removes_temporary_files(recipe, flags_of, monkeypatch):
    task, flags = flags_of("full")
    monkeypatch.setattr(loading, "find_unreadable_images", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        recipe(*flags, task=task)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before


def test_worker_ends_by_its_parent_only(recipe, flags_of, monkeypatch):
    task, flags = flags_of("full")
    ends = []

    def step(self, *args, **kwargs):
        for worker in multiprocessing.active_children():
            subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
            worker.join(0.2)
            ends.append(worker.exitcode)
            worker.terminate()
            worker.join(5)
            ends.append(worker.exitcode)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "training_step", step)
    # recipe() takes no workers
    monkeypatch.setattr(BlipTrainingArguments, "dataloader_num_workers", property(lambda _: 1, lambda *_: None))
    with pytest.raises(SystemExit):
        recipe(*flags, task=task)
    assert ends == [None, 0]


@pytest.mark.parametrize("kind", ["full", "augment"])
def test_stopped_run_goes_on_to_the_end_of_the_unbroken_one(recipe, flags_of, tmp_path, monkeypatch, kind):
    """Stopped in this process after its sixth step, in the middle of the second epoch; nothing was to be saved."""
    task, flags = flags_of(kind)
    flags = [*flags, "--save_steps", "5", "--eval_strategy", "steps", "--eval_steps", "3"]
    whole = recipe(*flags, output_dir=tmp_path / "whole", task=task)

    def step(self, *args, run=Trainer.training_step, **kwargs):
        if self.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", step)
        with pytest.raises(SystemExit) as stopped:
            recipe(*flags, output_dir=tmp_path / "cut", task=task)
    assert stopped.value.code == 143 and last_step(tmp_path / "cut") == 6
    cut = recipe(*flags, "--resume_from_checkpoint", "last", output_dir=tmp_path / "cut", task=task)
    assert_same_end(whole, cut)


@pytest.fixture
def checkpointed(recipe, flags_of, tmp_path) -> Path:
    task, flags = flags_of("full")
    return recipe(*flags, "--max_steps", "3", output_dir=tmp_path / "run", task=task)


def cut_short(checkpoint: Path) -> None:
    with (checkpoint / "optimizer.pt").open("r+b") as file:
        file.truncate(100)


DAMAGE = {
    "short file": (cut_short, "optimizer.pt has 100 bytes of"),
    "no weights": (lambda checkpoint: (checkpoint / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no marker": (lambda checkpoint: (checkpoint / "complete.json").unlink(), "it has no complete.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_checkpoint_cut_short_is_named_and_passed_over(recipe, flags_of, checkpointed, caplog, damage):
    harm, message = DAMAGE[damage]
    harm(checkpointed / "checkpoint-3")
    assert newest_checkpoint(checkpointed) == checkpointed / "checkpoint-2"
    assert f"{checkpointed / 'checkpoint-3'} is skipped: {message}" in caplog.text
    task, flags = flags_of("full")
    flags = [*flags, "--max_steps", "3", "--resume_from_checkpoint"]
    with pytest.raises(SystemExit):
        recipe(*flags, str(checkpointed / "checkpoint-3"), output_dir=checkpointed, task=task)
    assert message in caplog.messages[-1] and "`last`" in caplog.messages[-1]
    recipe(*flags, "last", output_dir=checkpointed, task=task)
    assert what_is_missing(checkpointed / "checkpoint-3") is None


def test_half_written_checkpoint_is_passed_over_and_none_means_the_beginning(recipe, flags_of, checkpointed, caplog):
    (checkpointed / "_saving").mkdir()
    for step in (1, 2, 3):
        (checkpointed / f"checkpoint-{step}").rename(checkpointed / "_saving" / f"checkpoint-{step}")
    task, flags = flags_of("full")
    recipe(*flags, "--max_steps", "1", "--resume_from_checkpoint", "last", output_dir=checkpointed, task=task)
    assert "was still being written" in caplog.text and "starting from the beginning" in caplog.text
    assert json.loads((checkpointed / "trainer_state.json").read_text())["global_step"] == 1


def test_best_checkpoint_is_kept_and_known_by_its_own_name(recipe, flags_of, tmp_path):
    task, flags = flags_of("full")
    best = ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "4"]
    best += ["--metric_for_best_model", "eval_loss", "--greater_is_better", "true", "--save_total_limit", "1"]
    folder = recipe(*flags, *best, output_dir=tmp_path / "run", task=task)
    state = json.loads((folder / "trainer_state.json").read_text())
    kept = Path(state["best_model_checkpoint"])
    assert kept.parent == folder and what_is_missing(kept) is None
    a, b = load_file(kept / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


class Pickled:
    """Pickled, it makes a file when it is read by what trusts pickles."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def write_over(file: Path, content: bytes) -> None:
    """And tell the marker, as one who means harm would."""
    file.write_bytes(content)
    marker = file.parent / "complete.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), file.name: len(content)}))


def as_torch_saves(content) -> bytes:
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


def test_checkpoint_with_content_of_another_kind_ends_in_one_message_and_runs_nothing(
    recipe, flags_of, checkpointed, tmp_path, caplog
):
    task, flags = flags_of("full")
    flags = [*flags, "--max_steps", "3", "--resume_from_checkpoint"]
    hostile = Pickled(tmp_path / "ran")
    pickles = {"zip": as_torch_saves(hostile), "plain": pickle.dumps(hostile), "broken": b"PK none", "empty": b""}
    bad = {name: {**pickles, "list": as_torch_saves([])} for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")}
    bad["trainer_state.json"] = {"list": b"[]", "broken": b"{", "key": b'{"a": 1}', "step": b'{"global_step": "1"}'}
    bad["model.safetensors"] = {"broken": b"none"}
    bad["complete.json"] = {"list": b"[]", "text": b'"a"', "kind": b'{"config.json": "large"}', "null": b"null"}
    for name, contents in bad.items():
        for kind, content in contents.items():
            changed = tmp_path / f"checkpoint-2 {kind} {name}"
            shutil.copytree(checkpointed / "checkpoint-2", changed)
            if name == "complete.json":
                (changed / name).write_bytes(content)
            else:
                write_over(changed / name, content)
            with pytest.raises(SystemExit) as stopped:
                recipe(*flags, str(changed), output_dir=checkpointed, task=task)
            assert stopped.value.code == 1 and str(changed) in caplog.messages[-1], caplog.messages[-1]
            wanted = "does not list files and their sizes" if name == "complete.json" else "cannot be read"
            assert wanted in caplog.messages[-1] and "--traceback shows the full" in caplog.messages[-1]
    changed = tmp_path / "checkpoint-2"
    shutil.copytree(checkpointed / "checkpoint-2", changed)
    write_over(changed / "training_args.bin", pickles["zip"])
    recipe(*flags, str(changed), output_dir=checkpointed, task=task)
    assert not hostile.file.exists()


def test_resuming_with_other_settings_or_data_is_refused_with_all_differences(
    recipe, flags_of, checkpointed, checkpoints, image_folder, tmp_path, caplog, monkeypatch
):
    task, flags = flags_of("full")
    flags = [*flags, "--max_steps", "3", "--resume_from_checkpoint", "last"]
    moved = shutil.copytree(image_folder, tmp_path / "moved")
    edited = shutil.copytree(image_folder, tmp_path / "edited")
    rows = (edited / "metadata.jsonl").read_text()
    (edited / "metadata.jsonl").write_text(rows.replace('"answer": "red"', '"answer": "blue"'))
    other_base = shutil.copytree(checkpoints[task], tmp_path / "base")
    weights = load_file(other_base / "model.safetensors")
    name = min(weights)
    save_file({**weights, name: weights[name] + 1}, other_base / "model.safetensors", {"format": "pt"})
    both = {"rows_to_train", "rows_to_eval"}
    changed = (
        (["--seed", "7"], {"seed"}, "seed: 42 -> 7"),
        (["--learning_rate", "1e-3", "--dropout", "0.2"], {"learning_rate", "dropout"}, "dropout: 0.1 -> 0.2"),
        (["--max_steps", "6"], {"max_steps"}, "max_steps: 3 -> 6"),
        (["--per_device_train_batch_size", "4"], {"rows_a_step"}, "rows_a_step: 2 -> 4"),
        (["--question_column", "caption"], {"question_column", *both}, 'question_column: "question" -> "caption"'),
        (["--max_train_samples", "6"], {"max_train_samples", "rows_to_train"}, ' -> "6 rows, '),
        (["--max_question_tokens", "9"], {"max_question_tokens"}, "max_question_tokens: 35 -> 9"),
        (["--dataset_name", str(edited)], both, 'rows_to_train: "8 rows, '),
        (["--model_name_or_path", str(other_base)], {"base_checkpoint"}, "base_checkpoint: "),
    )
    with monkeypatch.context() as patch:
        patch.delattr(PreTrainedModel, "from_pretrained")
        for more, names, line in changed:
            with pytest.raises(SystemExit):
                recipe(*flags, *more, output_dir=checkpointed, task=task)
            message = caplog.messages[-1]
            assert "or accept the changes with --allow_changed_settings" in message and line in message
            listed = [text.strip().partition(": ")[0] for text in message.splitlines() if text.startswith("  ")]
            assert set(listed) == names and len(listed) == len(names)
    # what changes no result, and the same data elsewhere
    free = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--logging_steps", "7"]
    free += ["--per_device_eval_batch_size", "3", "--save_total_limit", "4", "--gradient_checkpointing"]
    shutil.rmtree(checkpointed / "checkpoint-3")
    recipe(*flags, *free, "--dataset_name", str(moved), output_dir=checkpointed, task=task)
    assert "with other settings" not in caplog.messages[-1]


def test_changed_settings_are_accepted_with_a_warning_if_asked_for(recipe, flags_of, checkpointed, caplog):
    task, flags = flags_of("full")
    flags = [*flags, "--max_steps", "4", "--seed", "7", "--resume_from_checkpoint", "last", "--allow_changed_settings"]
    recipe(*flags, output_dir=checkpointed, task=task)
    (warning,) = (message for message in caplog.messages if "other settings (saved -> now)" in message)
    assert "  max_steps: 3 -> 4\n  seed: 42 -> 7\nThe changes are accepted" in warning
    # and stand in the next checkpoint
    assert json.loads((checkpointed / "checkpoint-4" / "run_settings.json").read_text())["seed"] == 7
    assert what_is_missing(checkpointed / "checkpoint-4") is None
    # one of an earlier version
    (checkpointed / "checkpoint-4" / "run_settings.json").unlink()
    _require_same_settings(checkpointed / "checkpoint-4", {"seed": 3}, allow=False)
    assert "has no run_settings.json" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("steps", "newest", "best", "limit", "left"),
    [
        ((8, 9, 10), 10, None, 2, {9, 10}),
        ((9, 10, 11), 11, 9, 2, {9, 11}),
        ((9, 10, 11), 11, 10, 1, {10, 11}),
        # resumed at an earlier step than the last
        ((5, 6, 9, 10), 6, None, 2, {5, 6}),
        ((5, 6, 10), 6, None, 1, {6}),
        ((5, 6, 10), 6, 10, 1, {6, 10}),
        ((1, 2, 3), 3, None, None, {1, 2, 3}),
    ],
)
def test_checkpoints_are_removed_by_step_whatever_the_clock_says(tmp_path, steps, newest, best, limit, left):
    for step in steps:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").touch()
        # each is a day older than the one before
        os.utime(folder, (time.time() - 86400 * step,) * 2)
    (tmp_path / "checkpoint-mine").mkdir()
    # of the same run before its folder was moved
    best = f"elsewhere/checkpoint-{best}" if best else None
    remove_old_checkpoints(tmp_path / f"checkpoint-{newest}", best, limit)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (*left, "mine")}


def test_new_checkpoints_are_kept_when_the_clock_is_set_back(recipe, flags_of, checkpointed):
    for path in checkpointed.glob("checkpoint-*"):
        os.utime(path, (time.time() + 86400,) * 2)
    task, flags = flags_of("full")
    shutil.rmtree(checkpointed / "checkpoint-3")
    flags = [*flags, "--max_steps", "3", "--save_total_limit", "1", "--resume_from_checkpoint", "last"]
    recipe(*flags, output_dir=checkpointed, task=task)
    assert [path.name for path in checkpointed.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs takes root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_ends_in_a_message_with_the_last_checkpoint_whole(recipe, flags_of, small_disk, caplog):
    task, flags = flags_of("full")
    flags = [*flags, "--save_total_limit", "9"]
    with pytest.raises(SystemExit) as stopped:
        recipe(*flags, output_dir=small_disk / "run", task=task)
    assert stopped.value.code == 1
    last = small_disk / "run" / f"checkpoint-{last_step(small_disk / 'run')}"
    assert (
        "is full. Free some space" in caplog.text
        and f"{last} is the last complete checkpoint" in caplog.text
        and "Traceback" not in caplog.text
    )
    assert what_is_missing(last) is None
    shutil.copytree(small_disk / "run", small_disk.parent / "elsewhere")
    recipe(*flags, "--resume_from_checkpoint", "last", output_dir=small_disk.parent / "elsewhere", task=task)


def choose_and_hold(barrier, queue):
    barrier.wait()
    queue.put(_choose_output_dir(None, "vqa", None))
    barrier.wait()


def test_runs_started_together_take_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "vqa").mkdir(parents=True)
    (tmp_path / "outputs" / "vqa" / "all_results.json").write_text("{}")
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4, timeout=60), context.Queue()
    processes = [context.Process(target=choose_and_hold, args=(barrier, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    chosen = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert chosen == {f"outputs/vqa-{number}" for number in range(2, 6)}


@pytest.mark.parametrize("resume", [[], ["--resume_from_checkpoint", "last"]])
def test_folder_in_which_a_run_is_writing_is_refused(recipe, flags_of, tmp_path, caplog, resume):
    task, flags = flags_of("full")
    assert claim(tmp_path / "run")
    with pytest.raises(SystemExit):
        recipe(*flags, *resume, output_dir=tmp_path / "run", task=task)
    assert f"output_dir {tmp_path / 'run'} is in use by another program that is still running" in caplog.messages[-1]


HOLD = """
import os, sys, time
from pathlib import Path
from blip_ft.results.files import claim
claim(Path(sys.argv[1]))
if os.fork():
    Path(sys.argv[1], "held").touch()
time.sleep(60)  # the child, as a loader's worker, outlives its parent
"""


def test_killed_run_holds_its_folder_no_longer(tmp_path):
    (tmp_path / "hold.py").write_text(HOLD)
    process = Program(tmp_path / "hold.py", tmp_path / "run", errors=tmp_path / "said")
    try:
        while not (tmp_path / "run" / "held").exists():
            assert process.poll() is None
            time.sleep(0.01)
        assert not claim(tmp_path / "run")
        process.kill()
        process.wait()
        assert (tmp_path / "run" / LOCK).exists() and claim(tmp_path / "run")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        release_folders()
    assert (tmp_path / "run").exists()


def test_run_that_fails_at_once_leaves_no_folder(recipe, flags_of, tmp_path):
    task, flags = flags_of("full")
    with pytest.raises(SystemExit):
        recipe(*flags, "--image_column", "none", output_dir=tmp_path / "run", task=task)
    assert not (tmp_path / "run").exists()
