"""What DeepSpeed and FSDP2 need beyond DDP: what each of them trains, and the whole weights of a sharded model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import str_to_bool
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

Engine = Literal["DDP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP1", "FSDP2"]

# each process holds a part of every weight
SHARDED: tuple[Engine, ...] = ("ZeRO-3", "FSDP1", "FSDP2")


def engine_of(args: TrainingArguments) -> Engine:
    """What trains on several processes, as the launcher's configuration and the flags say; DDP also for one process."""
    if args.deepspeed_plugin is not None:
        return f"ZeRO-{args.deepspeed_plugin.zero_stage}"
    if args.fsdp_plugin_args is not None:  # --fsdp
        return f"FSDP{args.fsdp_plugin_args['fsdp_version']}"
    if str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):  # accelerate launch
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return "DDP"


def check_engine(args: TrainingArguments, recipe: str, is_quantized: bool) -> None:
    """Raises: ValueError if the engine cannot train this, with one that can."""
    engine = engine_of(args)
    if engine == "FSDP1":
        raise ValueError(
            "FSDP1 is deprecated in torch and accelerate. Set fsdp_version: 2, as accelerate_configs/fsdp.yaml does."
        )
    instead = "Launch with accelerate_configs/multi_gpu.yaml or deepspeed_zero2.yaml."
    if engine in SHARDED and recipe == "retrieval":
        raise ValueError(
            f"Retrieval does not support {engine}: the momentum encoder needs unsharded weights. {instead}"
        )
    if engine in SHARDED and is_quantized:
        raise ValueError(f"{engine} cannot shard 8- and 4-bit weights, which are packed bytes. {instead}")


def check_saved_engine(checkpoint: Path, args: TrainingArguments) -> None:
    """Raises: ValueError if the engine of this run cannot read the optimizer state that checkpoint holds."""
    now, saved = engine_of(args), _engine_that_saved(checkpoint)
    if now.replace("ZeRO-1", "ZeRO-2") != saved:  # both write the same files
        raise ValueError(
            f"{checkpoint} was saved under {saved}, and this run uses {now}, which cannot read its optimizer state. "
            f"Resume under {saved}, or start a new run from its weights: --model_name_or_path {checkpoint}, with "
            "another output_dir."
        )
    processes = len(list(checkpoint.glob("rng_state*.pth")))
    if now.startswith("ZeRO") and processes != args.world_size and not args.save_on_each_node:
        raise ValueError(
            f"{checkpoint} was saved by {processes} processes, and {now} splits its optimizer state among them; this "
            f"run has {args.world_size}. Resume with {processes} processes."
        )


def _engine_that_saved(checkpoint: Path) -> Engine:
    if list(checkpoint.glob("pytorch_model_fsdp*")):
        return "FSDP2"
    states = [path for folder in checkpoint.glob("global_step*") for path in folder.glob("*_states.pt")]
    if not states:
        return "DDP"
    if any(path.name.startswith("zero_pp_rank_") and "model" in path.name for path in states):
        return "ZeRO-3"
    return "ZeRO-2" if any("optim" in path.name for path in states) else "ZeRO-0"


def own_part(parameter: nn.Parameter) -> torch.Tensor:
    """What this process holds of a parameter: all of it, unless it is sharded."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.detach()  # DeepSpeed's, under ZeRO-3


@contextmanager
def whole_weight(parameter: nn.Parameter) -> Iterator[torch.Tensor]:
    """All of a parameter, of which this process may hold a part. A collective: all processes enter together."""
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):  # DeepSpeed's mark under ZeRO-3
        import deepspeed  # not among the requirements

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter


@contextmanager
def embeddings_in_the_root_group(model: nn.Module) -> Iterator[None]:
    """Let accelerate shard the word embeddings together with the head whose weight they are.

    accelerate 1.15 gives what get_input_embeddings returns a group of its own unless get_output_embeddings returns a
    module with the same weight. BLIP's head shares its weight and its bias with modules that no such pair names, and
    torch 2.13 refuses a weight in two groups.
    """
    model.get_input_embeddings = lambda: None
    yield
    del model.get_input_embeddings
