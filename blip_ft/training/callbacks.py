"""Callbacks of the Trainer: momentum weights, streams, early stopping, curves, sample predictions and trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    default_logdir,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from blip_ft.arguments import BlipTrainingArguments
from blip_ft.data.images import open_image
from blip_ft.results.curves import draw_curves
from blip_ft.results.files import decided_by_main
from blip_ft.results.predictions import build_lines, samples_of
from blip_ft.results.report import THUMBNAIL_PIXELS
from blip_ft.results.samples import choose_rows

logger = logging.getLogger(__name__)


class EpochCallback(TrainerCallback):
    """Sets the epoch of the sampler and of the augmentation: the order of the rows, and the views of their images.

    If several processes resume in the middle of an epoch, the data loader has two wrappers, and transformers 5.23 and
    accelerate 1.15 do not reach the sampler: it would repeat the order of the first epoch.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = int(state.epoch)
        if self.trainer.sampler:
            self.trainer.sampler.set_epoch(epoch)
        if augmentation := self.trainer.data_collator.augmentation:
            augmentation.set_epoch(epoch)


class ContrastiveCallback(TrainerCallback):
    """Updates the momentum weights once per optimizer step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.blip.contrastive and args.gradient_accumulation_steps > 1:
            logger.warning(
                "gradient_accumulation_steps averages the contrastive loss over small batches, and pairs of different "
                "batches are not negatives of each other. A larger batch, more processes or a longer queue give more "
                "negatives."
            )

    def on_step_begin(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if contrastive := self.trainer.blip.contrastive:
            contrastive.begin_step(state.epoch)
            if self.trainer.is_deepspeed_enabled:
                from deepspeed.utils import safe_set_full_fp32_param  # optional, not in requirements.txt

                # the clamped value must also reach the optimizer's copy, which overwrites the parameter in each step
                safe_set_full_fp32_param(contrastive.temperature, contrastive.temperature.detach())


class StreamCallback(TrainerCallback):
    """Lets a resumed run continue with the next row of its stream."""

    def on_train_begin(
        self, args: BlipTrainingArguments, state: Any, control: Any, train_dataloader: DataLoader, **kwargs: Any
    ) -> None:
        train_dataloader.dataset.first_batch = state.global_step * args.gradient_accumulation_steps

    def on_step_end(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps  # the Trainer would count from the resumed step


class BestCallback(TrainerCallback):
    """Lets a resumed run find its best checkpoint in output_dir, also if that folder was moved."""

    def on_train_begin(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.best_global_step is None:
            return
        best = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        is_there = decided_by_main(best.is_dir)
        if args.load_best_model_at_end and not is_there:
            logger.warning("The best checkpoint so far, %s, is gone. It is now chosen among later ones.", best)
        state.best_model_checkpoint = str(best) if is_there else None
        if not is_there:
            state.best_metric = state.best_global_step = None


class StopEarlyCallback(TrainerCallback):
    """Stops after early_stopping_patience evaluations in a row without a better metric_for_best_model.

    It counts as transformers' EarlyStoppingCallback, but in the log, which each checkpoint includes: a resumed run
    continues the count, and a run that had stopped does not train again. transformers 5.23 forgets the count, or
    restores it together with the flags of the interrupted run (restore_callback_states_from_checkpoint).
    """

    def on_train_begin(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = evaluations_since_best(args, state) >= args.early_stopping_patience

    def on_evaluate(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= evaluations_since_best(args, state) >= args.early_stopping_patience

    def on_train_end(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and state.is_world_process_zero:
            logger.info(
                "Stopped early at step %d of %d. Evaluations in a row without a better %s: %d.",
                *(state.global_step, state.max_steps, args.metric_for_best_model, args.early_stopping_patience),
            )


def evaluations_since_best(args: BlipTrainingArguments, state: Any) -> int:
    """The number of evaluations after the first one with the best metric_for_best_model, 0 if there is none yet."""
    name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    best, since = None, 0
    for value in (entry[name] for entry in state.log_history if name in entry):
        if best is None or (value > best if args.greater_is_better else value < best):
            best, since = value, 0
        else:
            since += 1
    return since


class CurvesCallback(TrainerCallback):
    """Draws training_curves.png at each evaluation."""

    def __init__(self) -> None:
        self.before_training: list[dict[str, Any]] = []

    def on_evaluate(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.do_train:
            return
        if state.global_step == 0:
            self.before_training = list(state.log_history)
        write_curves(args, state)

    def on_train_begin(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # train() starts with an empty state, or with that of a checkpoint, which includes these entries
        state.log_history = state.log_history or self.before_training


class TrackerCallback(TrainerCallback):
    """Sends a few rows with images and predictions to TensorBoard, W&B and Trackio at each evaluation."""

    def __init__(self, trainer: Trainer, num_rows: int = 8) -> None:
        self.trainer, self.num_rows = trainer, num_rows
        for callback in trainer.callback_handler.callbacks:
            # without a folder, an evaluation before training makes transformers 5.23 write all logs to ./runs
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(Path(trainer.args.output_dir) / default_logdir())

    def on_evaluate(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        trackers = (TensorBoardCallback, WandbCallback, TrackioCallback)
        callbacks = [one for one in self.trainer.callback_handler.callbacks if isinstance(one, trackers)]
        if not callbacks or not state.is_world_process_zero:
            return
        chosen = choose_rows(self.trainer.evaluated_rows, self.num_rows)
        rows = self.trainer.evaluated_rows.select(chosen)
        samples = samples_of(build_lines(rows, [self.trainer.results[position] for position in chosen]))
        shown = [position for position, sample in enumerate(samples) if sample.readable]
        images = [open_image(rows[position]["image"], THUMBNAIL_PIXELS) for position in shown]
        columns = ["question", "references", "prediction", "score"]
        table = [
            [sample.question, ", ".join(dict.fromkeys(sample.references)), sample.prediction, sample.score]
            for sample in (samples[position] for position in shown)
        ]
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback):
                for number, (image, row) in enumerate(zip(images, table, strict=True)):
                    pixels = np.asarray(image.resize((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)))
                    callback.tb_writer.add_image(f"samples/{number}", pixels, state.global_step, dataformats="HWC")
                    lines = [f"**{name}** {value}" for name, value in zip(columns, row, strict=True)]
                    callback.tb_writer.add_text(f"samples/{number}", "  \n".join(lines), state.global_step)
                continue
            package = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
            data = [[package.Image(image), *row] for image, row in zip(images, table, strict=True)]
            logged = package.Table(columns=["image", *columns], data=data)
            package.log({"samples": logged, "train/global_step": state.global_step})


class SampleCallback(TrainerCallback):
    """Logs a few rows with their predictions every sample_steps."""

    def __init__(
        self, trainer: Trainer, predict: Callable[..., list[dict[str, Any]]], describe: Callable[[dict, dict], str]
    ) -> None:
        self.trainer, self.predict, self.describe = trainer, predict, describe

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        rows = self.trainer.eval_dataset
        return rows.select(choose_rows(rows, 4)).to_list()

    def on_step_end(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.sample_steps:
            return
        trainer = self.trainer
        with trainer.unsharded_model() as model:
            if not state.is_world_process_zero:
                return
            batch = trainer._prepare_inputs(trainer.eval_collator(self.rows))
            del batch["readable"]
            training = model.training
            model.eval()
            with torch.no_grad(), trainer.compute_loss_context_manager():
                predicted = self.predict(model, batch, list(range(len(self.rows))))
            model.train(training)
        lines = [f"  {self.describe(*pair)}" for pair in zip(self.rows, predicted, strict=True)]
        logger.info("Step %d of %d:\n%s", state.global_step, state.max_steps, "\n".join(lines))


def write_curves(args: BlipTrainingArguments, state: Any) -> None:
    if state.is_world_process_zero and (curves := draw_curves(state.log_history)):
        path = Path(args.output_dir) / "training_curves.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(curves)
