"""Device, dtype and quantization of a model that is loaded."""

from __future__ import annotations

import logging

import torch
from transformers import (
    BitsAndBytesConfig,
)


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def existing_device(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"There is no device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices. "
            "device=None takes the best there is."
        )
    return device


def to_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    named = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(named, torch.dtype):
        raise ValueError(f"dtype is a torch dtype or its name, e.g. bfloat16, or auto; found {dtype!r}.")
    return named


def quantization_config(bits: int, device: torch.device) -> BitsAndBytesConfig:
    if bits == 8:
        # bitsandbytes 0.50 says at every call of every layer that it casts to float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
