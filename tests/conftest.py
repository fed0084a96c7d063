"""Shared by all tests: no network, and tiny checkpoints made once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer, BlipImageProcessor, BlipProcessor

GOLDEN = Path(__file__).parent / "golden"


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
