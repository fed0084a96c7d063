"""Shared by all tests: no network, and tiny checkpoints made once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# the models are tiny: more threads gain nothing, and on a busy machine they wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import io
import json
import runpy
import shutil
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import datasets.config
import golden_blip2
import pytest
import torch
from PIL import Image
from programs import CONTEXT
from torch import distributed
from transformers import BertTokenizer, BlipImageProcessor, BlipProcessor

from blip_ft.data import checks
from blip_ft.modeling.blip.captioning import BlipForConditionalGeneration
from blip_ft.modeling.blip.retrieval import BlipForImageTextRetrieval
from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering
from blip_ft.results import report
from blip_ft.results.curves import panel_of
from blip_ft.training import callbacks

GOLDEN = Path(__file__).parent / "golden"
RECIPES = Path(__file__).parent.parent / "recipes"
# also the names of the recipes
TASKS = {
    "vqa": BlipForQuestionAnswering,
    "captioning": BlipForConditionalGeneration,
    "retrieval": BlipForImageTextRetrieval,
}


# made once in a session: with several pytest workers, one of them takes all tests that ask for it
MADE_ONCE = ("demo_run", "url")
# fixtures of the longest tests, which start first so that no worker ends long after the others
LONGEST = ("demo_run", "reference", "flags_of")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: min((LONGEST.index(name) for name in LONGEST if name in item.fixturenames), default=9))
    for item in items:
        for name in set(MADE_ONCE) & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(name))


def pytest_collection_finish():
    # each run collects garbage, which takes half a second if it looks at all imported modules
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """Nothing is remembered of the images and data sets of other tests."""
    monkeypatch.setattr(checks, "HF_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache" / "datasets"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The original implementation's weights, inputs and results; see golden/README.md."""
    return GOLDEN


@pytest.fixture
def copied(golden, tmp_path):
    """A golden checkpoint to change."""
    return lambda name: Path(shutil.copytree(golden / name, tmp_path / name))


@pytest.fixture
def answers_of(golden, monkeypatch):
    return partial(golden_blip2.answers_of, golden, monkeypatch)


@pytest.fixture(scope="session")
def processor() -> BlipProcessor:
    """The processor of the golden checkpoints: 32 x 32 pixels, 126 words, neither [DEC] nor [ENC]."""
    return BlipProcessor(
        BlipImageProcessor(size={"height": 32, "width": 32}), BertTokenizer(vocab=str(GOLDEN / "vocab.txt"))
    )


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, processor) -> dict[str, Path]:
    """For each task a folder with the golden model and its processor, as a user would have one."""
    folders = {task: tmp_path_factory.mktemp(task) for task in TASKS}
    for task, folder in folders.items():
        TASKS[task].from_pretrained(GOLDEN / task).save_pretrained(folder)
        processor.save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def checkpoint(checkpoints) -> Path:
    return checkpoints["vqa"]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Eight questions, and eight captions, on four images; the same rows in the splits train and test."""
    folder = tmp_path_factory.mktemp("images")
    texts = [
        ("what color is it ?", ["red", "green", "blue", "white"], "{} dog on the grass"),
        ("is it a dog ?", ["yes", "no", "no", "yes"], "a picture of {} sky and a large {} cat"),
    ]
    rows = []
    for number, color in enumerate([(200, 0, 0), (0, 200, 0), (0, 0, 200), (240, 240, 240)]):
        Image.new("RGB", (40, 36), color).save(folder / f"{number}.png")
        for question, answers, caption in texts:
            row = {"file_name": f"{number}.png", "question": question, "answer": answers[number]}
            row["caption"] = caption.replace("{}", texts[0][1][number])
            rows += [{**row, "split": split} for split in ("train", "test")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def data_of(checkpoints, image_folder):
    """Flags that name a task's checkpoint and the eight rows."""

    def flags(task: str) -> list[str]:
        few_pairs = ["--queue_size", "24", "--k_test", "3"] if task == "retrieval" else []
        return [
            *("--model_name_or_path", str(checkpoints[task]), "--dataset_name", str(image_folder), *few_pairs),
            *("--eval_split", "test", "--learning_rate", "3e-3", "--per_device_train_batch_size", "8"),
        ]

    return flags


def results_of(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def history_of(folder: Path) -> list[dict]:
    return [
        entry for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]


def predictions_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def start_recipe(patch: pytest.MonkeyPatch, task: str, folder: Path, *flags: str) -> Path:
    """Run a recipe as `python recipes/<task>.py ...` does, in this process."""
    path = str(RECIPES / f"{task}.py")
    patch.setattr(sys, "argv", [path, *flags, "--output_dir", str(folder), "--use_cpu"])
    runpy.run_path(path, run_name="__main__")
    return folder


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """What a recipe leaves behind that is started without a flag: a minute or two, once for all tests of a task."""
    runs = {}

    def run(task: str) -> Path:
        if task not in runs:
            with pytest.MonkeyPatch.context() as patch:
                runs[task] = start_recipe(patch, task, tmp_path_factory.mktemp("demo") / task)
        return runs[task]

    return run


def take_part(rank: int, store: Path, function, args: tuple):
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        return function(rank, *args)
    finally:
        distributed.destroy_process_group()


@pytest.fixture
def on_two_processes(tmp_path):
    """Calls function(rank, *args) on two gloo processes, this one the first, and returns both results.

    function stands at a test module's top, and returns numbers and lists rather than tensors.
    """

    def run(function, *args) -> list:
        store = tmp_path / "store"
        with CONTEXT.Pool(1) as pool:
            second = pool.apply_async(take_part, (1, store, function, args))
            return [take_part(0, store, function, args), second.get(timeout=60)]

    return run


def draw_blank(log_history: list[dict], columns: int = 2) -> bytes | None:
    """In the place of draw_curves: one pixel if there is anything to draw."""
    if not any(panel_of(name) for entry in log_history for name in entry):
        return None
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def recipe(monkeypatch, tmp_path, request):
    """Runs a recipe in this process, by default vqa, and returns output_dir.

    Its curves are drawn only if the test is marked draws_curves: they take half a second each time.
    """
    if not request.node.get_closest_marker("draws_curves"):
        for module in (callbacks, report):
            monkeypatch.setattr(module, "draw_curves", draw_blank)

    def start(*flags: str, output_dir: Path | None = None, task: str = "vqa") -> Path:
        folder = output_dir or tmp_path / "run"
        return start_recipe(monkeypatch, task, folder, *flags, "--dataloader_num_workers", "0")

    return start
