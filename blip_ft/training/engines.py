"""DeepSpeed and FSDP2: what each of them can train and resume, and the weights of a sharded model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import str_to_bool
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

Engine = Literal["DDP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP1", "FSDP2"]

# each process has a part of every weight
SHARDED: tuple[Engine, ...] = ("ZeRO-3", "FSDP1", "FSDP2")


def engine_of(args: TrainingArguments) -> Engine:
    """The engine that the launcher's configuration and the flags choose; DDP also for a single process."""
    if args.deepspeed_plugin is not None:
        return f"ZeRO-{args.deepspeed_plugin.zero_stage}"
    if args.fsdp_plugin_args is not None:  # --fsdp
        return f"FSDP{args.fsdp_plugin_args['fsdp_version']}"
    if str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):  # accelerate launch
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return "DDP"


def check_engine(args: TrainingArguments, recipe: str, is_quantized: bool) -> None:
    """Raises: ValueError if the engine cannot train this model. The message names an engine that can."""
    engine = engine_of(args)
    if engine == "FSDP1":
        raise ValueError(
            "FSDP1 is deprecated in torch and accelerate. Set fsdp_version: 2, as accelerate_configs/fsdp.yaml does."
        )
    if engine.startswith("ZeRO"):
        _require_own_optimizer(args.deepspeed_plugin.hf_ds_config.config)
    instead = "Launch with accelerate_configs/multi_gpu.yaml or deepspeed_zero2.yaml."
    if engine in SHARDED and recipe == "retrieval":
        raise ValueError(
            f"Retrieval does not support {engine}: the momentum encoder needs unsharded weights. {instead}"
        )
    if engine in SHARDED and is_quantized:
        raise ValueError(f"{engine} cannot shard 8- and 4-bit weights, which are packed bytes. {instead}")


def _require_own_optimizer(config: dict[str, Any]) -> None:
    """Raises: ValueError for an optimizer or scheduler of DeepSpeed.

    DeepSpeed decays all weights alike. transformers 5.23 replaces "auto" before the model's family has set the learning
    rate, so that it would be 0.
    """
    if found := [name for name in ("optimizer", "scheduler") if name in config]:
        raise ValueError(
            f"The DeepSpeed config has a section {' and a section '.join(found)}, which the recipes do not use. Remove "
            "it, and set --optim, --learning_rate, --weight_decay, --lr_scheduler_type and --warmup_steps."
        )


def check_untied_head(args: TrainingArguments) -> None:
    """Raises: ValueError if accelerate would tie the head of Flan-T5, whose config wrongly says that it is tied."""
    if engine_of(args) == "FSDP2" and str_to_bool(os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")):
        raise ValueError(
            "With fsdp_cpu_ram_efficient_loading, accelerate ties T5's head to its embeddings, which differ from it. "
            "Set fsdp_cpu_ram_efficient_loading: false, as accelerate_configs/fsdp.yaml does."
        )


def check_saved_engine(checkpoint: Path, args: TrainingArguments) -> None:
    """Raises: ValueError if the engine of this run cannot read the optimizer state of the checkpoint."""
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


def local_part(parameter: nn.Parameter) -> torch.Tensor:
    """The part of a parameter that this process has: all of it, unless it is sharded."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    # DeepSpeed sets ds_tensor under ZeRO-3
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.detach()


@contextmanager
def unsharded_weight(parameter: nn.Parameter) -> Iterator[torch.Tensor]:
    """The full tensor of a parameter that may be sharded. A collective: all processes must enter together."""
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):  # set by DeepSpeed under ZeRO-3
        import deepspeed  # optional, not in requirements.txt

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter


def layers_to_shard(model: PreTrainedModel) -> list[str]:
    """Class names of the layers that FSDP2 gathers one by one.

    Embeddings are left to shard_embeddings_with_head. The methods of BLIP-2 call parts of the language model, not its
    forward, and only layers gather their weights themselves.
    """
    return sorted(name for name in model._no_split_modules if not name.endswith("Embeddings"))


@contextmanager
def shard_embeddings_with_head(model: nn.Module) -> Iterator[None]:
    """Let accelerate shard word embeddings and head in the FSDP group of the whole model.

    accelerate 1.15 puts each of them into a group of its own, unless get_input_embeddings and get_output_embeddings
    return modules with the same weight. In BLIP these methods do not describe how the head shares its weight and bias,
    and T5 has its embeddings under several names. torch 2.13 refuses a weight in two groups.
    """
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    yield
    del model.get_input_embeddings, model.get_output_embeddings
