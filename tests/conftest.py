"""Shared by all tests: no network, and tiny checkpoints made once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# the models are tiny: more threads gain nothing, and on a busy machine they wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import multiprocessing
import runpy
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import distributed
from transformers import BertTokenizer, BlipImageProcessor, BlipProcessor

from blip_ft.modeling import BlipForQuestionAnswering

GOLDEN = Path(__file__).parent / "golden"
RECIPE = Path(__file__).parent.parent / "recipes" / "vqa.py"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The original implementation's weights, inputs and results; see golden/README.md."""
    return GOLDEN


@pytest.fixture(scope="session")
def processor() -> BlipProcessor:
    """The processor of the golden checkpoints: 32 x 32 pixels, 126 words, neither [DEC] nor [ENC]."""
    return BlipProcessor(
        BlipImageProcessor(size={"height": 32, "width": 32}), BertTokenizer(vocab=str(GOLDEN / "vocab.txt"))
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, processor) -> Path:
    """A folder with the golden VQA model and its processor, as a user would have one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    BlipForQuestionAnswering.from_pretrained(GOLDEN / "vqa").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory) -> Path:
    """Eight questions on four pictures, the same rows in the splits train and test."""
    folder = tmp_path_factory.mktemp("pictures")
    questions = [
        ("what color is it ?", ["red", "green", "blue", "white"]),
        ("is it a dog ?", ["yes", "no", "no", "yes"]),
    ]
    rows = []
    for number, color in enumerate([(200, 0, 0), (0, 200, 0), (0, 0, 200), (240, 240, 240)]):
        Image.new("RGB", (40, 36), color).save(folder / f"{number}.png")
        for question, answers in questions:
            row = {"file_name": f"{number}.png", "question": question, "answer": answers[number]}
            rows += [{**row, "split": split} for split in ("train", "test")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory) -> Path:
    """What `make demo` leaves behind; two minutes, once for all tests that need a model that knows something."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(RECIPE), "--output_dir", str(folder), "--use_cpu"])
        runpy.run_path(str(RECIPE), run_name="__main__")
    return folder


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
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            second = pool.apply_async(take_part, (1, store, function, args))
            return [take_part(0, store, function, args), second.get(timeout=60)]

    return run


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """Runs recipes/vqa.py as `python recipes/vqa.py ...` does, in this process, and returns output_dir."""

    def start(*flags: str, output_dir: Path | None = None) -> Path:
        folder = output_dir or tmp_path / "run"
        argv = [str(RECIPE), *flags, "--output_dir", str(folder), "--use_cpu", "--dataloader_num_workers", "0"]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(RECIPE), run_name="__main__")
        return folder

    return start
