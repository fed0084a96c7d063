"""Every engine that the documentation names, on two CPU processes, started as users start them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from conftest import GOLDEN, RECIPES, TASKS, history_of, predictions_of, results_of
from peft import PeftModel
from programs import Program, free_port, run_ranks
from safetensors.torch import load_file

from blip_ft.training import feature_cache
from blip_ft.training.checkpoints import what_is_missing

ROOT = RECIPES.parent
# row of the table in docs/distributed.md -> recipe, its flags
RUNS = {
    "vqa": ("vqa", []),
    "captioning": ("captioning", []),
    "retrieval": ("retrieval", []),
    "LoRA": ("vqa", ["--use_peft", "--lora_dropout", "0"]),
    "cached features": ("vqa", ["--freeze", "vision_model", "--cache_image_features", "--cache_dtype", "fp32"]),
}
# the golden models of BLIP-2 and InstructBLIP; RUNS without one have the checkpoint of their recipe
MODELS = {
    "BLIP-2": "blip2_opt",
    "BLIP-2, nothing frozen": "blip2_opt",
    "BLIP-2, LoRA": "blip2_opt",
    "BLIP-2 with T5, nothing frozen": "blip2_t5",
    "InstructBLIP, LoRA": "instructblip_vicuna",
}
for row, model in MODELS.items():
    own = ["--use_peft", "--lora_dropout", "0"] if "LoRA" in row else []
    own += ["--freeze", "none"] if "nothing frozen" in row else []
    # a decay that shows which weights it takes
    RUNS[row] = ("vqa", ["--model_name_or_path", str(GOLDEN / model), "--weight_decay", "0.5", *own])
# their gradient is rounding, which Adam turns into steps as large as those of any weight; in qkv it is a third
KEY_BIASES = ("qkv.bias", "key.bias", "k_proj.bias")
# step 4 of 5 is the second step of an epoch, so a resumed run starts in the middle of an epoch
STEPS = ["--max_steps", "5", "--save_strategy", "steps", "--save_steps", "3", "--logging_steps", "1"]
STEPS += ["--load_best_model_at_end", "false"]
STEPS += ["--eval_strategy", "steps", "--eval_steps", "2", "--sample_steps", "2", "--max_eval_samples", "7"]
CONFIGS = {"ZeRO-2": "deepspeed_zero2", "ZeRO-3": "deepspeed_zero3", "FSDP2": "fsdp"}
NOT_SUPPORTED = [("FSDP2", "retrieval"), ("ZeRO-3", "retrieval")]

slow = pytest.mark.slow
MATRIX = [
    pytest.param(engine, run, marks=[] if (engine, run) in QUICK else slow)
    for QUICK in [{("ZeRO-2", "retrieval"), ("ZeRO-3", "BLIP-2"), ("FSDP2", "BLIP-2")}]
    for engine in ("DDP", *CONFIGS)
    for run in RUNS
    if (engine, run) not in NOT_SUPPORTED
]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(cache), "DS_ACCELERATOR": "cpu"}


def command_of(engine: str, recipe: str) -> list[str]:
    """The command without the flags of the recipe."""
    program = str(RECIPES / f"{recipe}.py")
    if engine == "DDP":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", program]
    if "ZeRO" in engine and not find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed")
    config = str(ROOT / "accelerate_configs" / f"{CONFIGS[engine]}.yaml")
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--quiet", "--config_file", config]
    launch += ["--main_process_port", "0"]
    # each engine rounds bf16, which the file asks for, in its own way
    return [*launch, "--num_processes", "2", "--mixed_precision", "no", str(ROOT / "tests" / "cpu_as_gpu.py"), program]


def flags_of(name: str, data_of, folder: Path, *flags: str) -> list[str]:
    recipe, own = RUNS[name]
    # accumulation too; retrieval's negatives stand in the batch, where accumulation is another loss
    share = ["2"] if recipe == "retrieval" else ["1", "--gradient_accumulation_steps", "2"]
    flags = [*data_of(recipe), *own, *STEPS, "--per_device_train_batch_size", *share, *flags]
    return [*flags, "--output_dir", str(folder), "--use_cpu", "--dataloader_num_workers", "0"]


@pytest.fixture
def start(data_of, tmp_path):
    """With the launcher, whose variables are then in launched.json."""

    def run(engine: str, name: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command_of(engine, RUNS[name][0]), *flags_of(name, data_of, folder, *flags)],
            capture_output=True,
            text=True,
            env={**environment(tmp_path / "cache"), "LAUNCHED_WITH": str(tmp_path / "launched.json")},
            timeout=300,
        )

    return run


@pytest.fixture
def start_again(data_of, tmp_path):
    """Without the launcher, but with what it has set: no time to import libraries, and the same processes else."""

    def run(engine: str, name: str, folder: Path, *flags: str) -> None:
        *_, program = command_of(engine, RUNS[name][0])
        words, variables = [program, *flags_of(name, data_of, folder, *flags)], environment(tmp_path / "cache")
        if engine != "DDP":
            words.insert(0, str(ROOT / "tests" / "cpu_as_gpu.py"))
            variables |= json.loads((tmp_path / "launched.json").read_text())
        for code, errors in run_ranks(*words, folder=tmp_path / "said", variables=variables):
            assert code == 0, errors[-3000:]

    return run


@pytest.fixture
def reference(recipe, start_again, data_of, tmp_path, monkeypatch):
    """A run with the same global batch in one process; of retrieval, whose processes share negatives, under DDP."""

    def run(name: str) -> Path:
        task, own = RUNS[name]
        folder = tmp_path / "reference"
        if task == "retrieval":
            start_again("DDP", name, folder)
            return folder
        monkeypatch.setattr(feature_cache, "HF_CACHE_HOME", str(tmp_path / "cache"))
        flags = [*data_of(task), *own, *STEPS, "--per_device_train_batch_size", "4"]
        return recipe(*flags, output_dir=folder, task=task)

    return run


def numbers_of(folder: Path) -> dict[tuple[int, str], float]:
    """Losses, gradient norms and scores by step, without times."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {
        (entry["step"], name): value
        for entry in log
        for name, value in entry.items()
        if name in ("loss", "grad_norm") or (name.startswith("eval_") and not name.endswith(("runtime", "second")))
    }


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("engine", "name"), MATRIX)
def test_engine_gives_the_numbers_of_one_process_and_resumes_bitwise(
    start, start_again, reference, checkpoints, tmp_path, engine, name
):
    done = start(engine, name, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert name == "retrieval" or "Step 4 of 5:\n" in done.stderr
    one, run = reference(name), tmp_path / "run"
    assert numbers_of(run) == pytest.approx(numbers_of(one), rel=1e-4)
    assert len(history_of(run)) == 5
    for row, other in zip(predictions_of(run), predictions_of(one), strict=True):
        assert row["prediction"] == other["prediction"]
    assert {path.name for path in one.iterdir()} == {path.name for path in run.iterdir()}

    base = GOLDEN / MODELS[name] if name in MODELS else checkpoints[RUNS[name][0]]
    stock = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    assert f"{stock.__name__}.from_pretrained" in (run / "README.md").read_text()
    if name.endswith("LoRA"):
        PeftModel.from_pretrained(stock.from_pretrained(base), run)
    else:
        _, info = stock.from_pretrained(run, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # tied weights are saved once
    weights, expected = weights_of(run), weights_of(one)
    assert weights.keys() == expected.keys()
    if name in MODELS:
        # a wrong decay would change a norm's weight of 1 by 7e-3
        different = {key for key in weights if not torch.allclose(weights[key], expected[key], rtol=0, atol=2e-5)}
        assert not {key for key in different if not key.endswith(KEY_BIASES)}

    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed, ignore=shutil.ignore_patterns("checkpoint-5"))
    start_again(engine, name, resumed, "--resume_from_checkpoint", "last")
    assert weights_of(resumed).keys() == weights_of(run).keys()
    assert all(torch.equal(weights_of(resumed)[key], tensor) for key, tensor in weights_of(run).items())


@slow
@pytest.mark.parametrize(("engine", "name"), [pair.values for pair in MATRIX if pair.values[0] != "DDP"])
def test_engine_trains_in_the_precision_of_its_file(start, tmp_path, engine, name):
    done = start(engine, name, tmp_path / "run", "--bf16")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [entry["loss"] for entry in history_of(tmp_path / "run")]
    assert len(losses) == 5 and all(0 < loss < 10 for loss in losses)


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize(
    ("section", "params"),
    [("optimizer", {"lr": "auto", "weight_decay": "auto"}), ("scheduler", {"warmup_max_lr": "auto"})],
)
def test_optimizer_and_scheduler_of_deepspeed_are_refused_before_weights_load(
    data_of, tmp_path, monkeypatch, caplog, recipe, section, params
):
    """Their "auto" would be a learning rate of 0: the model's family sets it later."""
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    file = tmp_path / "zero2.json"
    file.write_text(json.dumps({**config, section: {"type": "AdamW", "params": params}}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    monkeypatch.setattr(TASKS["vqa"], "from_pretrained", None)
    with pytest.raises(SystemExit):
        recipe(*data_of("vqa"))
    assert f"has a section {section}" in caplog.messages[-1] and "set --optim, --learning_rate" in caplog.messages[-1]


REFUSED = {
    "FSDP2": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "Retrieval does not support FSDP2"),
    "FSDP1": ({"ACCELERATE_USE_FSDP": "true"}, "Set fsdp_version: 2"),
    "ZeRO-3": (
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        "Retrieval does not support ZeRO-3",
    ),
}


@pytest.mark.parametrize("engine", REFUSED)
def test_engine_that_cannot_train_retrieval_is_refused_before_weights_load(
    data_of, tmp_path, monkeypatch, caplog, recipe, engine
):
    if engine == "ZeRO-3" and not find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed")
    variables, message = REFUSED[engine]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(TASKS["retrieval"], "from_pretrained", None)
    with pytest.raises(SystemExit):
        recipe(*data_of("retrieval"), task="retrieval")
    assert message in caplog.messages[-1]
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_engine_is_not_resumed(recipe, data_of, monkeypatch, caplog):
    folder = recipe(*data_of("vqa"), "--max_steps", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(SystemExit):
        recipe(*data_of("vqa"), "--resume_from_checkpoint", "last", output_dir=folder)
    assert "was saved under DDP, and this run uses FSDP2" in caplog.messages[-1]


def process_of_rank(rank: int, folder: Path) -> int:
    """The process id of a rank of the run that writes to folder."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables, words = (path / "environ").read_bytes(), (path / "cmdline").read_bytes()
        except OSError:
            continue
        if f"\0RANK={rank}\0".encode() in b"\0" + variables and str(folder).encode() in words:
            return int(path.name)
    raise ValueError(f"no process of rank {rank}")


def test_killed_process_ends_the_others_and_leaves_the_last_checkpoint_complete(data_of, tmp_path):
    folder = tmp_path / "run"
    flags = [*data_of("vqa"), "--max_steps", "5000", "--save_strategy", "steps", "--save_steps", "5", "--use_cpu"]
    flags += ["--per_device_train_batch_size", "2", "--dataloader_num_workers", "0", "--output_dir", str(folder)]
    launcher = subprocess.Popen(
        [*command_of("DDP", "vqa"), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path / "cache"),
    )
    while not list(folder.glob("checkpoint-*")):
        assert launcher.poll() is None
        time.sleep(0.05)
    survivor = process_of_rank(0, folder)
    os.kill(process_of_rank(1, folder), signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)  # torchrun kills after 30 s
    assert launcher.returncode == 1
    assert not Path(f"/proc/{survivor}").exists()
    assert "Another process of this run has ended" in errors
    assert f"--output_dir {folder} --resume_from_checkpoint last" in errors
    checkpoints = list(folder.glob("checkpoint-*"))
    assert checkpoints and not any(map(what_is_missing, checkpoints))


@pytest.mark.slow
def test_two_machines_without_a_shared_disk_train_and_resume_where_each_has_the_checkpoint(
    data_of, reference, tmp_path
):
    """Two launchers, each with a folder of its own, stand for two machines; later runs start without launchers."""
    machines = [tmp_path / f"machine{number}" for number in range(2)]
    flags = [*STEPS, "--per_device_train_batch_size", "2", "--output_dir", "run", "--use_cpu"]
    words = [str(RECIPES / "vqa.py"), *data_of("vqa"), *flags, "--dataloader_num_workers", "0"]
    variables = environment(tmp_path / "cache")

    processes, port = [], str(free_port())
    for number, machine in enumerate(machines):
        machine.mkdir()
        where = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(number)]
        where += ["--master_addr", "127.0.0.1", "--master_port", port]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *where, *words, "--save_on_each_node"],
                cwd=machine,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=variables,
            )
        )
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-3000:]

    def run_again(*flags: str) -> list[tuple[int, str]]:
        one_each = variables | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        one_each |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        programs = [
            Program(
                *(*words, *flags), cwd=machine, errors=machine / "said", variables={**one_each, "RANK": str(number)}
            )
            for number, machine in enumerate(machines)
        ]
        return [program.wait() for program in programs]

    one = reference("vqa")
    assert numbers_of(machines[0] / "run") == pytest.approx(numbers_of(one), rel=1e-4)
    assert results_of(machines[0] / "run")["eval_loss"] == pytest.approx(results_of(one)["eval_loss"], rel=1e-4)
    for machine in machines:
        assert what_is_missing(machine / "run" / "checkpoint-3") is None
    unbroken = weights_of(machines[0] / "run")

    for machine in machines:
        shutil.rmtree(machine / "run" / "checkpoint-5")
    shutil.move(machines[1] / "run" / "checkpoint-3", tmp_path / "kept")
    ended = run_again("--resume_from_checkpoint", "last")
    assert [code for code, _ in ended] == [1, 1]
    for _, errors in ended:
        assert "checkpoint-3 must be complete on each machine" in errors or "checkpoint" not in errors
    assert any("checkpoint-3 must be complete on each machine" in errors for _, errors in ended)

    shutil.move(tmp_path / "kept", machines[1] / "run" / "checkpoint-3")
    for code, errors in run_again("--save_on_each_node", "--resume_from_checkpoint", "last"):
        assert code == 0, errors[-3000:]
    assert all(torch.equal(weights_of(machines[0] / "run")[name], tensor) for name, tensor in unbroken.items())
