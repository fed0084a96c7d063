"""Describe a run in words, for log, report and model card."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from blip_ft.arguments import DataArguments
from blip_ft.data.streaming import StreamedRows
from blip_ft.data.tables import number_images
from blip_ft.metrics.baselines import smoothing_floor
from blip_ft.modeling.blip.retrieval import BlipForImageTextRetrieval
from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering
from blip_ft.results.curves import is_score
from blip_ft.training.trainer import BlipTrainer


class Baseline(NamedTuple):
    """A guess that uses no image: the scores that a model must exceed.

    words: what is guessed. score: rows to evaluate on -> metrics named like those of the task, in percent.
    """

    words: str
    score: Callable[[Dataset], dict[str, float]]


def best_step_of(trainer: BlipTrainer) -> int | None:
    """The step of the best checkpoint, if its weights are the result."""
    chosen = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint
    return trainer.state.best_global_step if chosen else None


def describe_choice(trainer: BlipTrainer, best_step: int | None, data_args: DataArguments) -> str:
    last, planned, patience = trainer.state.global_step, trainer.state.max_steps, trainer.args.early_stopping_patience
    if best_step is None:
        return f"the last, step {last}; not chosen by a score"
    chosen = f"step {best_step} of {last}, the best by {trainer.best_metric} on {data_args.held_out}"
    if patience and last < planned:
        chosen += f"; stopped early at step {last} of {planned} (early_stopping_patience {patience})"
    return chosen


def name_baseline(score: str) -> str:
    """baseline_cider for eval_cider, baseline_test_cider for test_cider."""
    return f"baseline_{score.removeprefix('eval_')}"


def count_overlap(part: str, rows: Dataset) -> dict[str, int | None]:
    """For all_results.json. part: eval or test. None: images of streamed training data are not counted."""
    overlap, with_evaluation = rows.image_overlap, getattr(rows, "overlap_with_evaluation", None)
    counts = {
        f"{part}_images": overlap.num_eval if overlap else None,
        f"{part}_images_trained_on": overlap.num_shared if overlap else None,
    }
    return counts | ({f"{part}_images_evaluated_on": with_evaluation.num_shared} if with_evaluation else {})


def describe_overlap(rows: Dataset, data_args: DataArguments) -> str:
    """For card and report: how many images of rows were also trained on, and evaluated on if rows are test rows."""
    overlap, more = rows.image_overlap, ""
    with_evaluation = getattr(rows, "overlap_with_evaluation", None)
    if with_evaluation and with_evaluation.num_shared:
        more = f" {with_evaluation.num_shared:,} of them were also evaluated on, and may have chosen the checkpoint."
    if overlap is None:
        return "It was not checked whether its images were also trained on, because those were streamed." + more
    if overlap.num_shared:
        words = f"{overlap.num_shared:,} of its {overlap.num_eval:,} images were also trained on"
        return f"{words}: they say little about new images.{more}"
    compared = "" if data_args.check_images == "full" else ", judging by file paths; contents were not compared"
    return f"None of its {overlap.num_eval:,} images was trained on in this run{compared}.{more}"


def explain_loss(trainer: BlipTrainer) -> list[str]:
    """Sentences that explain the values of the loss."""
    model, args = trainer.blip, trainer.args
    if model.contrastive:
        queue, batch = model.contrastive.queue_size, args.train_batch_size * args.world_size
        if not queue:
            return []
        return [
            "loss_itc compares each pair with those of its batch and of a queue, which is full after "
            f"{-(-queue // (batch * args.gradient_accumulation_steps)):,} steps. Until then loss_itc normally rises: "
            f"a random guess has a loss of {math.log(batch):.2f} among {batch} pairs, and of "
            f"{math.log(batch + queue):.2f} among {batch + queue:,}. in_batch_accuracy, the percentage of pairs that "
            "are matched within their batch, does not depend on the queue."
        ]
    if isinstance(model, BlipForImageTextRetrieval) or not getattr(model.config.text_config, "label_smoothing", 0):
        return []
    smoothing = model.text_decoder.label_smoothing
    floor = smoothing_floor(model.config.text_config.vocab_size, smoothing)
    if isinstance(model, BlipForQuestionAnswering):
        of_row = f"the sum over the tokens of its answer, at least {2 * floor:.2f} for one word and [SEP]"
    else:
        of_row = "the mean over its tokens"
    return [
        f"Label smoothing of {smoothing} sets a lower bound for the loss. The loss of a token is never below "
        f"{floor:.2f}; the loss of a row is {of_row}."
    ]


def beside_baseline(scores: dict[str, float], baselines: dict[str, float], words: str) -> str:
    """Each score with its baseline, and a warning if no score is above its baseline."""
    pairs = {name: (score, baselines[name]) for name, score in scores.items() if name in baselines}
    lines = [
        f"  {name.removeprefix('eval_'):<28}{score:8.2f}   baseline {baseline:8.2f}"
        for name, (score, baseline) in pairs.items()
    ]
    if not any(score > baseline for score, baseline in pairs.values()):
        lines.append("No score is above its baseline: the model has not learned anything yet that needs the image.")
    return "\n".join([f"Compared with the baseline ({words}):", *lines])


def describe_training(trainer: BlipTrainer, results: dict[str, Any], checkpoint: str | None) -> dict[str, str]:
    """The run, in words for the model card."""
    args, rows = trainer.args, trainer.train_dataset
    held_out, seconds = trainer.eval_dataset, round(results.get("train_runtime", 0))
    trained_on = "a stream"
    if not isinstance(rows, StreamedRows):
        trained_on = f"{len(rows):,} of {number_images(rows).max() + 1:,} images"
    device = f"CPU ({platform.machine()}), torch threads: {torch.get_num_threads()}"
    if args.device.type != "cpu":
        device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    return {
        "rows trained on": trained_on,
        "rows evaluated on": f"{len(held_out):,} of {number_images(held_out).max() + 1:,} images",
        "epochs": f"{trainer.state.epoch:.4g}",
        "optimizer steps": f"{trainer.state.global_step:,}",
        "rows a step": f"{args.train_batch_size * args.world_size * args.gradient_accumulation_steps:,}",
        "time": f"{timedelta(seconds=seconds)}" + (f", after {Path(checkpoint).name}" if checkpoint else ""),
        "hardware": f"{args.world_size} x {device}" if args.world_size > 1 else device,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
    }


def describe_model(trainer: BlipTrainer, parameters: dict[str, int | float]) -> dict[str, str]:
    size = trainer.blip.config.vision_config.image_size
    return {
        "parameters": f"{parameters['total']:,}, {parameters['trainable']:,} of them trained",
        "image size": f"{size} x {size} pixels",
    }


def scores_of(results: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in results.items()
        for prefix in ("eval_", "test_")
        if name.startswith(prefix) and is_score(name.removeprefix(prefix))
    }
