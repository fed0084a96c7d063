"""Device, dtype and quantization of a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn
from transformers import BitsAndBytesConfig


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def existing_device(device: str | torch.device) -> torch.device:
    """Raises: ValueError if it is a CUDA device that does not exist."""
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"The device {device} does not exist: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA "
            "devices. Use device=None for the best device of this machine."
        )
    return device


def to_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """Turn a name such as bfloat16 or torch.bfloat16 into a dtype; "auto" stays. Raises: ValueError."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    named = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(named, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype, its name, e.g. bfloat16, or auto; found {dtype!r}.")
    return named


def quantization_config(
    bits: int, device: torch.device, unquantized: Sequence[str] | None = None
) -> BitsAndBytesConfig:
    """Settings for 8 bits, or for 4 bits as in QLoRA (NF4, double quantization).

    unquantized: names of layers to leave as they are. None: the layers tied to the embeddings.
    """
    skipped = None if unquantized is None else list(unquantized)
    if bits == 8:
        # bitsandbytes 0.50 logs at each call of each layer that it casts to float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    compute = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skipped,
    )


def train_in_float32(model: nn.Module, frozen: torch.dtype) -> None:
    """Cast what is trained to float32 and what is not to `frozen`, in place. Quantized weights stay as they are."""
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)


def keep_quantized_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights on the CPU.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weights in evaluation, and training then fails.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
