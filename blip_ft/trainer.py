"""The Trainer with BLIP's loss normalisation and text predictions, and run(): what all recipes do with it."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial, wraps
from itertools import islice
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import ModelCard
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import Trainer, get_scheduler
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from blip_ft.arguments import BlipTrainingArguments, DataArguments, ModelArguments, PeftArguments, changed_settings
from blip_ft.callbacks import (
    BestCallback,
    ContrastiveCallback,
    CurvesCallback,
    EpochCallback,
    SampleCallback,
    Signals,
    StopCallback,
    Stopped,
    StreamCallback,
    TrackerCallback,
    explain_lost_worker,
    hold_sigterm,
    outlive_signals,
    release_sigterm,
    write_curves,
)
from blip_ft.checkpoints import (
    BUILDING,
    explain_full_disk,
    explain_lost_process,
    explain_unreadable,
    finish_checkpoint,
    how_to_resume,
    newest_checkpoint,
    remove_old_checkpoints,
    require_readable_state,
    what_is_missing,
)
from blip_ft.data.checks import why_unreadable
from blip_ft.data.images import open_image
from blip_ft.data.loading import ImageOverlap
from blip_ft.data.sampling import GroupedSampler, require_whole_batch
from blip_ft.data.streaming import StreamedRows
from blip_ft.data.tables import number_images, to_json, write_lines
from blip_ft.data.texts import IGNORED
from blip_ft.engines import (
    SHARDED,
    check_engine,
    check_saved_engine,
    embeddings_in_the_root_group,
    engine_of,
    own_part,
    whole_weight,
)
from blip_ft.feature_store import require_constant_features, store_pictures
from blip_ft.metrics.baselines import smoothing_floor
from blip_ft.modeling.adapters import count_parameters, without_adapter
from blip_ft.modeling.blip.retrieval import BlipForImageTextRetrieval
from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering
from blip_ft.modeling.checkpoint_files import is_finite
from blip_ft.results.curves import is_score
from blip_ft.results.files import claim, decided_by_main, is_free, names_in, numbered_folders, require_claim
from blip_ft.results.model_card import build_model_card
from blip_ft.results.push import GITIGNORE, NOT_PUSHED, describe_hub_error, limit_waiting, upload_command
from blip_ft.results.report import THUMBNAIL_PIXELS, write_report
from blip_ft.results.samples import choose_rows, samples_of
from blip_ft.run_settings import SETTINGS_FILE

logger = logging.getLogger(__name__)

CONTRASTIVE_FILE = "contrastive.safetensors"
NEVER = torch.iinfo(torch.long).max  # a step that no run reaches
LOSS_PARTS = ("loss_itc", "loss_itm", "in_batch_accuracy")  # of retrieval, logged with its loss

Batch = dict[str, torch.Tensor]
# model, batch and the positions of its rows in the data -> what is to be kept of each row
Predict = Callable[[torch.nn.Module, Batch, list[int]], list[dict[str, Any]]]
# a Predict and a word for the progress bar -> its results in the order of the rows; None for an unreadable picture
Collect = Callable[[Predict, str], list[dict[str, Any] | None]]
# rows to evaluate on and how to run the model over them -> what to write of each row, and metrics
Evaluate = Callable[[Dataset, Collect], tuple[list[dict[str, Any] | None], dict[str, float]]]


class Baseline(NamedTuple):
    """What a guess reaches that has learned nothing from an image: without it no score says much.

    words: what it guesses. score: rows evaluated on -> metrics of the same names as the task's, in percent.
    """

    words: str
    score: Callable[[Dataset], dict[str, float]]


class BlipTrainer(Trainer):
    """Trains on grouped batches with the loss of the one big batch, and evaluates on strings.

    Args:
        evaluate_rows: the task's evaluation; the batches that it meets are eval_collator's.
        eval_collator: default data_collator. Either may add `readable` (rows,), False where a picture cannot be read.
        predict, describe: for a few lines every sample_steps; describe puts a row and its prediction into words.
        group: keep the rows of a picture in one batch.
        run_settings: kept in each checkpoint, see settle_settings.
    After evaluate(), `results` holds what evaluate_rows gave for each row of `evaluated_rows`, in their order.
    Until `card` is there, nothing that goes wrong on the Hub stops the training.
    """

    card: ModelCard | None = None

    def __init__(
        self,
        *args: Any,
        evaluate_rows: Evaluate,
        eval_collator: Callable[[list[dict]], Batch] | None = None,
        predict: Predict | None = None,
        describe: Callable[[dict, dict], str] | None = None,
        group: bool = True,
        run_settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.evaluate_rows, self.group, self.run_settings = evaluate_rows, group, run_settings
        self.eval_collator = eval_collator or self.data_collator
        self.results: list[dict[str, Any] | None] = []
        self.evaluated_rows: Dataset | None = None
        # the Trainer has set it once more; with it, generate() waits at each token for the other processes
        unset_hf_deepspeed_config()
        self.class_name = type(self.blip).__name__  # FSDP2 renames the class
        # made now, while each process holds all weights
        self.eval_copy = copy.deepcopy(self.model).cpu() if engine_of(self.args) in SHARDED else None
        if self.is_deepspeed_enabled and self.eval_copy is None and self.blip.device.type != self.args.device.type:
            # the Trainer would place it in train(), and evaluation and the dry run come before
            self._move_model_to_device(self.model, self.args.device)
        self.signals = Signals()
        if self.args.save_on_each_node:  # transformers 5.23 writes weights in the first process alone
            self.blip.should_save_on_this_rank = lambda is_main_process: is_main_process
        if self.is_fsdp_enabled:
            self.accelerator.prepare = embeddings_in_the_root_group(self.model)(self.accelerator.prepare)
        elif self.is_deepspeed_enabled:  # it looks up each weight of the optimizer in the model
            self.accelerator.prepare = self._temperature_in_model()(self.accelerator.prepare)
        self.sampler: GroupedSampler | None = None  # of the rows to train on
        self.building: str | None = None  # where a checkpoint is being written
        self.has_targets = False  # whether a batch had a token to learn
        self.loss_parts: list[torch.Tensor] = []  # since the last log, (3,) each: LOSS_PARTS
        self.first_bad_step = torch.tensor(NEVER)  # the first step of this process with a loss that is not finite
        self.add_callback(BestCallback())
        self.add_callback(EpochCallback(self))
        self.add_callback(ContrastiveCallback(self))
        self.add_callback(CurvesCallback())
        self.add_callback(TrackerCallback(self))
        if isinstance(self.train_dataset, StreamedRows):
            self.args.ignore_data_skip = True  # the callback skips rows, the Trainer would decode each picture
            self.add_callback(StreamCallback())
        if self.args.sample_steps and predict and describe:
            self.add_callback(SampleCallback(self, predict, describe))
        self.add_callback(StopCallback(self))  # last: what the step leaves behind belongs to the checkpoint

    @property
    def blip(self) -> torch.nn.Module:
        """The BLIP model under DDP and PEFT; an adapter's layers are part of it."""
        return without_adapter(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    @contextmanager
    def unsharded_model(self) -> Iterator[torch.nn.Module]:
        """The BLIP model that a process may call on its own. All processes enter together.

        Under ZeRO-3 and FSDP2 every call of a part of the trained model is a collective, and processes have unequal
        numbers of rows and of generated tokens. There it is a copy, on the device as long as the context lasts.
        """
        if self.eval_copy is None:
            yield self.blip
            return
        sharded = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        for parameter, copied in zip(sharded.parameters(), self.eval_copy.parameters(), strict=True):
            with whole_weight(parameter) as weight:
                copied.data = weight.detach().to(self.args.device, copy=True)
        yield without_adapter(self.eval_copy.to(self.args.device))
        self.eval_copy.cpu()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, but always with the weights that stock transformers loads, and each of them once.

        transformers 5.23 saves no weights under FSDP's SHARDED_STATE_DICT and under ZeRO-3 without
        stage3_gather_16bit_weights_on_model_save, and tied ones twice under DeepSpeed.
        """
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            super().save_model(output_dir, _internal_call)
            return
        with self.unsharded_model():
            self._save(output_dir, self.eval_copy.state_dict() if self.eval_copy else None)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def get_train_dataloader(self) -> DataLoader:
        rows, args = self.train_dataset, self.args
        if not isinstance(rows, StreamedRows):
            loader = super().get_train_dataloader()
            plain = loader.base_dataloader  # accelerate's reads its attributes, but not what is set on itself
            plain.worker_init_fn = partial(outlive_signals, init=plain.worker_init_fn)
            return loader
        rows.process, rows.num_processes, rows.batch_size = args.process_index, args.world_size, self._train_batch_size
        # not through accelerate, which would share out once more what each process has for itself
        return DataLoader(
            rows,
            self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),  # a resumed run opens it once more, and dropout must not notice
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> GroupedSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        global_batch = self._train_batch_size * args.world_size * args.gradient_accumulation_steps
        seed = args.seed if args.data_seed is None else args.data_seed
        self.sampler = GroupedSampler(number_images(rows), global_batch, seed, self.group)
        return self.sampler

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor | None:
        """What the loss of a whole step is divided by: the Trainer would count label tokens, BLIP counts questions."""
        if not self.model_accepts_loss_kwargs:
            return None
        self._require_targets(batch_samples)
        items = torch.tensor(sum(self.blip.count_loss_items(batch) for batch in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        return items

    def _require_targets(self, batches: list[Batch]) -> None:
        """Raise ValueError if the first batches have images that can be read, and not one token to learn."""
        if self.has_targets:  # asked once: on a GPU the answer waits for the device
            return
        self.has_targets = any((batch["labels"][:, 1:] != IGNORED).any() for batch in batches)
        if not self.has_targets and any(batch["readable"].any() for batch in batches):
            raise ValueError(
                "The batches of a step hold no token to learn: what comes before the target fills them. Raise "
                "--max_caption_tokens or --max_answer_tokens, or shorten --prompt."
            )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        finally:  # also of a run that is cut
            write_curves(self.args, self.state)

    def compute_loss(
        self, model: torch.nn.Module, inputs: Batch, return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if "loss_itc" in outputs and model.training:
            self.loss_parts.append(torch.stack([outputs[name].float() for name in LOSS_PARTS]).detach())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # remembered on the device: to ask for the value here would wait for it in each step
        self.first_bad_step = self.first_bad_step.to(loss.device)
        step = torch.full_like(self.first_bad_step, self.state.global_step + 1)
        self.first_bad_step = torch.where(loss.isfinite(), self.first_bad_step, self.first_bad_step.minimum(step))
        return loss

    def require_finite(self, weights: bool) -> None:
        """Stop all processes together if a loss since the start, or a trained weight now, is NaN or infinite.

        A collective that waits for the device once. It is called where the loss is logged, and with weights (each of
        them is read) before an evaluation, a checkpoint and the final save.
        Raises: ValueError that names the step, the last complete checkpoint, and what to try.
        """
        step, device = self.state.global_step, self.args.device
        with self._temperature_in_model():
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad and weights]
        finite = [is_finite(own_part(parameter)).to(device) for parameter in trained]
        is_good = torch.stack(finite).all() if finite else torch.tensor(True, device=device)
        found = torch.stack([self.first_bad_step.to(device), torch.where(is_good, NEVER, step)])
        # (processes, 2)
        loss_step, weights_step = self.accelerator.gather(found[None]).amin(0).tolist()
        if loss_step == weights_step == NEVER:
            return
        args, last = self.args, newest_checkpoint(Path(self.args.output_dir))
        is_loss = loss_step <= weights_step
        raise ValueError(
            f"Training stopped: the {'loss' if is_loss else 'weights'} of step {min(loss_step, weights_step)} "
            f"{'is' if is_loss else 'are'} not finite (NaN or infinity). Nothing of that state is saved; "
            f"{f'{last} is the last complete checkpoint' if last else 'no checkpoint had been written before'}. "
            f"Start anew with a lower --learning_rate (now {args.learning_rate:g})"
            + ("" if args.max_grad_norm else ", or with --max_grad_norm 1")
            + (", or with --bf16 instead of --fp16" if args.fp16 else "")
            + "."
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.require_finite(weights=False)
        if "loss" in logs and self.loss_parts:
            parts = self.accelerator.reduce(torch.stack(self.loss_parts).mean(0), "mean").tolist()
            logs |= dict(zip(LOSS_PARTS, parts, strict=True))
            self.loss_parts.clear()
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """All: the original's AdamW decays biases and norms too (train_vqa.py)."""
        return [name for name, _ in model.named_parameters()]

    @contextmanager
    def _temperature_in_model(self) -> Iterator[None]:
        """For what goes through the model's parameters: retrieval's temperature is trained, and is none of them."""
        blip = self.blip
        if blip.contrastive is None or "temperature" in blip._parameters:
            yield
            return
        blip.register_parameter("temperature", blip.contrastive.temperature)
        yield
        del blip.temperature

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        with self._temperature_in_model():
            return super().create_optimizer(*args, **kwargs)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        with self._temperature_in_model():
            return super()._clip_grad_norm(model)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float:
        with self._temperature_in_model():
            return super()._get_grad_norm(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.blip.contrastive and self.args.should_save:
            self.blip.contrastive.save(Path(output_dir) / CONTRASTIVE_FILE)

    def _get_output_dir(self, trial: Any) -> str:
        return self.building or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As the Trainer's, but under its own name only when all files of all processes are there."""
        self.require_finite(weights=True)
        args = self.args
        building = Path(args.output_dir) / BUILDING
        final = building.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if args.should_save:
            shutil.rmtree(building, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.building = str(building)
        push, args.push_to_hub = args.push_to_hub, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.building, args.push_to_hub = None, push
        best = self.state.best_model_checkpoint
        if best and Path(best).parent == building:
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if args.should_save:
            self.state.save_to_json(str(building / final.name / "trainer_state.json"))
            if self.run_settings:
                text = json.dumps(self.run_settings, indent=2)
                (building / final.name / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
            finish_checkpoint(building / final.name, final)
            remove_old_checkpoints(final, self.state.best_model_checkpoint, args.save_total_limit)
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(final))

    def _load_from_checkpoint(self, checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with _explain_other_run(checkpoint):
            super()._load_from_checkpoint(checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with explain_unreadable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _explain_other_run(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint and not self.is_deepspeed_enabled:
                for group in self.optimizer.param_groups:
                    if missing := self.optimizer.defaults.keys() - group.keys():
                        raise ValueError(f"parameter group without {', '.join(sorted(missing))}")
        if self.blip.contrastive and checkpoint:
            self.blip.contrastive.load(Path(checkpoint) / CONTRASTIVE_FILE)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """This process's rows, each row of the whole in one process only; those of a picture side by side."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        order = np.argsort(number_images(rows), kind="stable")
        share = np.array_split(order, self.args.world_size)[self.args.process_index].tolist()
        loader = DataLoader(
            Subset(rows, share),
            self.args.per_device_eval_batch_size,
            collate_fn=self.eval_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=outlive_signals,
            # its own: a run that was stopped in an evaluation goes on with the numbers of an unbroken one
            generator=torch.Generator(),
        )
        loader.row_positions = share
        return loader

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """What evaluate_rows keeps of a row travels between processes, never picture features."""
        rows = dataloader.dataset.dataset
        if self.is_in_train:
            self.require_finite(weights=True)

        def collect(predict: Predict, description: str) -> list[dict[str, Any] | None]:
            return self._collect(dataloader, predict, description)

        self.evaluated_rows = rows
        self.results, metrics = self.evaluate_rows(rows, collect)
        if unreadable := self.results.count(None):
            metrics["unreadable_pictures"] = unreadable
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        if self.is_in_train:
            self.require_best_metric(metrics)
        return EvalLoopOutput(predictions=self.results, label_ids=None, metrics=named, num_samples=len(rows))

    @property
    def best_metric(self) -> str:
        """metric_for_best_model without its prefix; "" if there is none."""
        return (self.args.metric_for_best_model or "").removeprefix("eval_")

    def require_best_metric(self, metrics: Iterable[str]) -> None:
        """Raise ValueError if metric_for_best_model is none of metrics, whose names have no prefix."""
        best = self.best_metric
        if best and best not in metrics:
            raise ValueError(f"metric_for_best_model {best} is none of what is measured here: {', '.join(metrics)}.")

    def _collect(self, dataloader: DataLoader, predict: Predict, description: str) -> list[dict[str, Any] | None]:
        results, positions = [], iter(dataloader.row_positions)
        hold_sigterm()  # while workers are started
        batches = iter(dataloader)
        release_sigterm()
        progress = tqdm(batches, description, len(dataloader), disable=not self.is_local_process_zero(), leave=False)
        with self.unsharded_model() as model:
            model.eval()
            for batch in progress:
                if self.args.world_size == 1:  # others may have fewer batches, and would wait
                    self.signals.stop_if_received()
                readable = batch.pop("readable").tolist()
                here = list(islice(positions, len(readable)))
                with torch.no_grad(), self.compute_loss_context_manager():
                    predicted = predict(model, self._prepare_inputs(batch), here)
                results += [
                    (position, result if good else None)
                    for position, result, good in zip(here, predicted, readable, strict=True)
                ]
        return [result for _, result in sorted(gather_object(results), key=itemgetter(0))]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Ours for the Trainer's; also after the weights are saved for a push, which lets PEFT edit the folder's."""
        if self.card and self.is_world_process_zero():
            self.card.save(Path(self.args.output_dir) / "README.md")

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        limit_waiting()
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of HTTP, of TLS, of the Hub's rules
            if self.card:
                raise
            logger.warning("Nothing is pushed during training; its end tries once more. %s", describe_hub_error(error))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.hub_model_id is None:
            return
        self._warn_of_failed_pushes()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """The Trainer pushes checkpoints in the background and never asks what became of it."""
        if self.hub_model_id is None or self.push_in_progress is None:
            return
        done = [job for job in self.push_in_progress.jobs if job.done()]
        self.push_in_progress.jobs = [job for job in self.push_in_progress.jobs if not job.done()]
        for error in filter(None, (job.exception() for job in done)):
            logger.warning("A checkpoint was not pushed; training goes on. %s", describe_hub_error(error))


def prepare_output_dir(args: BlipTrainingArguments, recipe: str, peft_args: PeftArguments) -> str | None:
    """Settle args.output_dir before anything is written, and return the checkpoint to resume from, if any.

    Not given: outputs/<recipe>, else the next free outputs/<recipe>-2, -3, ...; with `--resume_from_checkpoint last`
    the newest of them. Given and not empty: refused, unless resuming. It is this run's until it ends: a folder in which
    another one is still writing is refused, or passed over if none is given.
    """
    check_engine(args, recipe, is_quantized=peft_args.load_in_8bit or peft_args.load_in_4bit)
    resume = args.resume_from_checkpoint
    given = args.output_dir if args.output_dir_was_given else None
    args.output_dir = decided_by_main(lambda: _choose_output_dir(given, recipe, resume))
    if not resume:
        return None
    checkpoint = decided_by_main(lambda: _choose_checkpoint(Path(args.output_dir), resume, peft_args, args))
    if checkpoint is None:
        logger.warning("There is no whole checkpoint in %s: starting from the beginning.", args.output_dir)
        return None
    problem = what_is_missing(checkpoint)
    # output_dir may lie on a disk of each machine
    problems = gather_object([f"{socket.gethostname()}: {problem}"] if problem else [])
    if problems:
        raise ValueError(
            f"{checkpoint} must be on each machine, and is not on {', '.join(dict.fromkeys(problems))}. Copy it "
            "there, and train with --save_on_each_node or an output_dir that all machines share."
        )
    return str(checkpoint)


def _choose_checkpoint(
    output_dir: Path, resume: str, peft_args: PeftArguments, args: BlipTrainingArguments
) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, None if `last` finds none. Raises: ValueError."""
    if resume == "last":
        checkpoint = newest_checkpoint(output_dir)
        if checkpoint is None:
            return None
    else:
        checkpoint = Path(resume)
        problem = what_is_missing(checkpoint)
        if problem:
            raise ValueError(
                f"resume_from_checkpoint {resume}: {problem}. Give a checkpoint-... folder of an earlier run, or "
                "`last` for the newest whole one of output_dir."
            )
    if not any(checkpoint.glob("rng_state*.pth")):
        raise ValueError(
            f"{checkpoint} was saved with --save_only_model and has no optimizer state, so it cannot be resumed. Start "
            f"a new run from its weights: --model_name_or_path {checkpoint}, with another output_dir."
        )
    require_readable_state(checkpoint)
    check_saved_engine(checkpoint, args)
    _require_same_kind(checkpoint, peft_args)
    return checkpoint


def _require_same_kind(checkpoint: Path, args: PeftArguments) -> None:
    file = checkpoint / "adapter_config.json"
    if file.exists() != args.use_peft:
        kind, flag = ("an adapter", "Add") if file.exists() else ("a whole model", "Leave out")
        raise ValueError(f"{checkpoint} holds {kind}. {flag} --use_peft, or begin in another output_dir.")


def check_run(args: BlipTrainingArguments, rows: Dataset | StreamedRows, meta_model: torch.nn.Module) -> None:
    """Refuse, before weights are loaded, what cannot be trained on these rows or kept of this model, if it is trained.

    meta_model: the model without its weights. Raises: ValueError.
    """
    if not args.do_train:
        return
    if args.cache_image_features:
        require_constant_features(without_adapter(meta_model))
    _require_optimizer(args, meta_model)
    if not isinstance(rows, StreamedRows):
        require_whole_batch(len(rows), args.train_batch_size * args.world_size * args.gradient_accumulation_steps)


@contextmanager
def _explain_other_run(checkpoint: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not any(sign in str(error) for sign in ("size mismatch", "parameter group", "Missing key")):
            with explain_unreadable(checkpoint):
                raise
        raise ValueError(
            f"{checkpoint} is of a run with another model, --image_size, --freeze, --lora_target_modules or --optim. "
            f"Go on with that run's settings, or begin in another output_dir.\n{error}"
        ) from error


def _require_optimizer(args: BlipTrainingArguments, meta_model: torch.nn.Module) -> None:
    """Make optimiser and scheduler for one weight, as the Trainer will after all weights are loaded."""
    try:
        make, settings = Trainer.get_optimizer_cls_and_kwargs(args, meta_model)
        for name in ("params", "model", "optimizer_dict"):  # of some, for the Trainer, not for the optimiser
            settings.pop(name, None)
        optimizer = make([torch.nn.Parameter(torch.zeros(1))], **settings)
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"No optimiser or scheduler can be made of --optim {args.optim.value}, --optim_args, --adam_..., "
            f"--lr_scheduler_type {args.lr_scheduler_type.value} and --lr_scheduler_kwargs: {error}"
        ) from error


def _choose_output_dir(given: str | None, recipe: str, resume: str | None) -> str:
    if given is not None:
        there = next(path for path in (Path(given), *Path(given).absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"output_dir {given} cannot be made: {there} is no folder to write into. Choose another.")
        require_claim(Path(given))
        # the list that a run stopped for bad rows leaves is no run
        if names_in(Path(given)) - {"bad_rows.jsonl"} and not resume:
            raise ValueError(
                f"output_dir {given} is not empty. Choose another, remove it, or go on with what is there: "
                "--resume_from_checkpoint last"
            )
        return given
    newest = None
    for folder in numbered_folders(recipe):
        if not is_free(folder):
            newest = folder
        elif resume and newest:
            require_claim(newest)
            return str(newest)
        elif claim(folder) and is_free(folder):  # once more, for now no other program can write there
            return str(folder)


def _stopping_cleanly(function: Callable) -> Callable:
    """A signal or a full disk ends the run with a whole checkpoint, and a message that says how to go on."""

    @wraps(function)
    def run_on(trainer: BlipTrainer, *args: Any, **kwargs: Any) -> Any:
        folder = Path(trainer.args.output_dir)
        with (
            trainer.signals,
            explain_full_disk(folder),
            explain_lost_process(folder),
            explain_lost_worker(partial(how_to_resume, folder)),
        ):
            try:
                return function(trainer, *args, **kwargs)
            except Stopped:
                step = trainer.state.global_step
                here = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
                if step and what_is_missing(here):
                    trainer._save_checkpoint(trainer.model, trial=None)
                saved = f": {here} is whole" if step else ""
                go_on = f"--output_dir {folder} --resume_from_checkpoint last"
                logger.warning("Stopped after step %d%s. Go on with: %s", step, saved, go_on)
                sys.exit(128 + trainer.signals.received)

    return run_on


@_stopping_cleanly
def run(
    trainer: BlipTrainer,
    checkpoint: str | None,
    pipeline_tag: str | None,
    model_args: ModelArguments,
    data_args: DataArguments,
    more_args: Sequence[Any],
    result_notes: dict[str, Any],
    baseline: Baseline | None = None,
    test_rows: Dataset | None = None,
) -> dict[str, Any]:
    """Train, save, evaluate, write what a run leaves behind into output_dir, and push it where push_to_hub is set.

    Under `do_train: false` evaluate only, and write no weights and no card.

    Args:
        checkpoint: folder to resume from.
        pipeline_tag: the Hub's name of the task, e.g. visual-question-answering; None if it has none.
        more_args: the recipe's other dataclasses, for the model card.
        result_notes: what belongs beside the numbers in all_results.json, e.g. the scoring rule.
        baseline: all_results.json, log, card and report have it beside the scores. A stream is not read for it.
        test_rows: what the final model is evaluated on once, and nothing is chosen by.
    Returns: the content of all_results.json.
    Raises: SystemExit(NOT_PUSHED) if all is written and the push fails.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    parts = (model_args, data_args, *more_args)
    changed = {name for part in (*parts, args) for name in changed_settings(part)}
    arguments = {name: value for part in parts for name, value in asdict(part).items()} | args.to_dict()
    # None and "" are left out unless they were asked for, as in `save_total_limit: null`
    unset = {name for name, value in arguments.items() if value in (None, "") and name not in changed}
    arguments = {name: value for name, value in arguments.items() if name not in unset and value not in ([], {})}
    results: dict[str, Any] = {}
    parameters = count_parameters(trainer.model)  # training may shard them
    notes = _explain_loss(trainer)
    for note in notes if trainer.is_world_process_zero() else []:
        logger.info("%s", note)
    if trainer.is_world_process_zero():
        (folder / ".gitignore").write_text(GITIGNORE, encoding="utf-8")
    finish = partial(
        _evaluate_and_write,
        trainer,
        arguments=arguments,
        parameters=parameters,
        notes=notes,
        checkpoint=checkpoint,
        pipeline_tag=pipeline_tag,
        model_args=model_args,
        data_args=data_args,
        result_notes=result_notes,
        baseline=baseline,
    )
    if args.do_train and checkpoint is None and not args.skip_dry_run:
        _dry_run(trainer, finish, baseline, test_rows)
    if args.cache_image_features and args.do_train:
        if checkpoint and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            # train() would load it too late for a vision model that is new in each run; those two load it wrapped
            trainer._load_from_checkpoint(checkpoint)
        # evaluation keeps its own collator, which decodes
        pictures = store_pictures(
            trainer.blip, trainer.processing_class, trainer.train_dataset, args, trainer.signals.stop_if_received
        )
        trainer.data_collator = replace(trainer.data_collator, look_up=pictures)
    if args.eval_on_start and args.do_train and checkpoint is None:
        # before the clock of training starts; the Trainer's own would run inside it
        results |= trainer.evaluate(metric_key_prefix="before_training")
        logger.info("Results before training:\n%s", to_json(results, indent=2))
    args.eval_on_start = False
    if args.do_train:
        results |= _train(trainer, checkpoint)
    results = finish(results, test_rows=test_rows)
    if args.push_to_hub:
        _push(trainer)
    return results


def _evaluate_and_write(
    trainer: BlipTrainer,
    results: dict[str, Any],
    *,
    arguments: dict[str, Any],
    parameters: dict[str, int | float],
    notes: list[str],
    checkpoint: str | None,
    pipeline_tag: str | None,
    model_args: ModelArguments,
    data_args: DataArguments,
    result_notes: dict[str, Any],
    baseline: Baseline | None,
    test_rows: Dataset | None,
) -> dict[str, Any]:
    """What comes after training, as run() has it: results with those of the evaluation, and the files of output_dir."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    best_step, last_step = _best_step(trainer), trainer.state.global_step
    if best_step:  # the step whose weights these are, for the curves and trackers
        trainer.state.global_step = best_step
    results |= trainer.evaluate()
    eval_results, test_results = trainer.results, []
    if test_rows is not None:
        results |= trainer.evaluate(test_rows, metric_key_prefix="test")
        test_results = trainer.results
    trainer.state.global_step = last_step
    if trainer.is_world_process_zero():
        rows = trainer.eval_dataset
        _write_predictions(folder / "predictions.jsonl", rows, eval_results)
        parts = {"eval": rows}
        if test_rows is not None:
            _write_predictions(folder / "test_predictions.jsonl", test_rows, test_results)
            parts["test"] = test_rows
        scores, baselines = _scores_of(results), {}
        if baseline and not isinstance(trainer.train_dataset, StreamedRows):
            for part, own in parts.items():
                baselines |= {f"{part}_{name}": value for name, value in baseline.score(own).items()}
            result_notes = {**result_notes, "baseline": baseline.words}
        results |= {_name_baseline(name): value for name, value in baselines.items()}
        if args.do_train:
            overlaps = {part: _describe_overlap(own, data_args) for part, own in parts.items()}
            result_notes = {**result_notes, "checkpoint": _describe_choice(trainer, best_step, data_args)}
            notes = [*notes, f"Checkpoint: {result_notes['checkpoint']}."]
            for part, own in parts.items():
                results |= _count_overlap(part, own.image_overlap)
                where = data_args.held_out if part == "eval" else f"{data_args.tested_on} (the final model, once)"
                notes.append(f"Evaluated on {where}. {overlaps[part]}")
            if test_rows is not None:
                results["test_images_evaluated_on"] = test_rows.overlap_with_evaluation.num_shared
        write_report(
            folder / "report.html",
            f"{folder.resolve().name}: {data_args.label}",
            scores=scores,
            samples=samples_of(rows, eval_results),
            open_picture=lambda position: open_image(rows[position]["image"], THUMBNAIL_PIXELS),
            log_history=trainer.state.log_history if args.do_train else (),
            baselines=baselines,
            notes=[*notes, *([f"Baseline: {baseline.words}."] if baselines else [])],
        )
        results = {name: value for name, value in results.items() if name != "epoch"} | result_notes
        (folder / "all_results.json").write_text(to_json(results, indent=2) + "\n", encoding="utf-8")
        if args.do_train:
            trainer.card = build_model_card(
                trainer.hub_model_id or args.hub_model_id or folder.resolve().name,
                task=pipeline_tag,
                stock_class=trainer.class_name,
                is_adapter=hasattr(trainer.model, "peft_config"),
                base_model=model_args.hub_id,
                revision=model_args.model_revision,
                dataset=data_args.label,
                dataset_id=data_args.hub_id,
                held_out=data_args.held_out,
                overlap=overlaps["eval"],
                tested_on=data_args.tested_on,
                test_overlap=overlaps.get("test", ""),
                scores=scores,
                baselines=baselines,
                notes=result_notes,
                facts={**_describe_model(trainer, parameters), **_describe_training(trainer, results, checkpoint)},
                arguments=arguments,
            )
            trainer.create_model_card()
        logger.info("Results, %s:\n%s", folder / "all_results.json", to_json(results, indent=2))
        if baselines:
            logger.info("%s", _beside_baseline(scores, baselines, baseline.words))
    return results


def _train(trainer: BlipTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train and save weights and state, of the best checkpoint under load_best_model_at_end."""
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.require_finite(weights=True)
    trainer.save_model(_internal_call=True)
    if hasattr(trainer.model, "peft_config") and trainer.is_world_process_zero():
        # an adapter's folder tells nothing else of picture size and start tokens
        trainer.blip.config.save_pretrained(trainer.args.output_dir)
    trainer.save_state()
    return trained.metrics


def _best_step(trainer: BlipTrainer) -> int | None:
    """The step of the checkpoint that training ended with, if it was chosen."""
    chosen = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint
    return trainer.state.best_global_step if chosen else None


def _describe_choice(trainer: BlipTrainer, best_step: int | None, data_args: DataArguments) -> str:
    last = trainer.state.global_step
    if best_step is None:
        return f"the last, step {last}; no score chose it"
    return f"step {best_step} of {last}, the best by {trainer.best_metric} on {data_args.held_out}"


def _write_predictions(path: Path, rows: Dataset, results: list[dict[str, Any] | None]) -> None:
    unreadable = {"prediction": "", "unreadable_picture": True}
    pairs = zip(rows.remove_columns("image"), results, strict=True)
    write_lines(path, ({**row, **(result or unreadable)} for row, result in pairs))


def _name_baseline(score: str) -> str:
    """baseline_cider for eval_cider, baseline_test_cider for test_cider."""
    return f"baseline_{score.removeprefix('eval_')}"


def _count_overlap(part: str, overlap: ImageOverlap | None) -> dict[str, int | None]:
    """part: eval or test. None, as images of a stream to train on are not counted, says so."""
    return {
        f"{part}_images": overlap.num_eval if overlap else None,
        f"{part}_images_trained_on": overlap.num_shared if overlap else None,
    }


def _describe_overlap(rows: Dataset, data_args: DataArguments) -> str:
    """For card and report: how many images of rows to evaluate or test on were also trained, or evaluated, on."""
    overlap, more = rows.image_overlap, ""
    also_evaluated = getattr(rows, "overlap_with_evaluation", None)
    if also_evaluated and also_evaluated.num_shared:
        more = f" {also_evaluated.num_shared:,} of them were also evaluated on, and may have chosen the checkpoint."
    if overlap is None:
        return "Whether its images were also trained on was not checked, as those were streamed." + more
    if overlap.num_shared:
        words = f"{overlap.num_shared:,} of its {overlap.num_eval:,} images were also trained on"
        return f"{words}: they say little about new images.{more}"
    compared = "" if data_args.check_images == "full" else ", by the paths of their files; contents were not compared"
    return f"None of its {overlap.num_eval:,} images was trained on in this run{compared}.{more}"


def _dry_run(
    trainer: BlipTrainer, finish: Callable[..., dict[str, Any]], baseline: Baseline | None, test_rows: Dataset | None
) -> None:
    """All stages of a run once on a few rows, so that what fails in one of them does so before the first step.

    A loss, an evaluation, its predictions, report and card, in a folder that is removed. Training does not notice: its
    random numbers, callbacks and state are not touched. All processes enter together.
    Raises: what a stage raises; ValueError if the loss is not finite, or the best metric is not measured.
    """
    args, rows = trainer.args, trainer.eval_dataset
    few = _few_of(rows, max(2, args.world_size))
    logger.info("Dry run of all stages on %d rows before training. --skip_dry_run leaves it out.", len(few))
    level = logger.level
    with (
        TemporaryDirectory() as folder,
        torch.random.fork_rng([args.device] if args.device.type == "cuda" else []),
        _replaced(args, output_dir=folder, dataloader_num_workers=0),
        _replaced(trainer, eval_dataset=few, state=copy.deepcopy(trainer.state), results=[], card=None),
        _replaced(trainer.callback_handler, callbacks=[]),
    ):
        _require_finite_loss(trainer)
        try:
            logger.setLevel(logging.WARNING)  # its results say nothing
            results = finish({}, test_rows=None if test_rows is None else _few_of(test_rows, len(few)))
        finally:
            logger.setLevel(level)
    if args.eval_strategy == "no" or isinstance(trainer.train_dataset, StreamedRows):
        return
    measured = [name.removeprefix("eval_") for name in results]
    if baseline and trainer.best_metric not in ("", *measured):
        measured += baseline.score(rows)  # a few rows do not have all answer types
    trainer.require_best_metric(dict.fromkeys(measured))


def _few_of(rows: Dataset, number: int) -> Dataset:
    few = rows.select(choose_rows(rows, number))
    for name in ("image_overlap", "overlap_with_evaluation"):
        if hasattr(rows, name):  # the second only of rows to test on
            setattr(few, name, getattr(rows, name))
    return few


def _require_finite_loss(trainer: BlipTrainer) -> None:
    """The loss of two rows, without a step. Raises: ValueError if it is not finite in a process."""
    rows = trainer.train_dataset
    first = rows.first_rows() if isinstance(rows, StreamedRows) else map(rows.__getitem__, range(len(rows)))
    readable = (row for row in islice(first, 64) if why_unreadable(row["image"]) is None)
    loss = torch.zeros((), device=trainer.args.device)
    if few := list(islice(readable, 2)):
        batch = trainer._prepare_inputs(trainer.data_collator(few))
        if trainer.model_accepts_loss_kwargs:
            batch["num_items_in_batch"] = max(1, trainer.blip.count_loss_items(batch))
        with trainer.unsharded_model() as model, torch.no_grad(), trainer.compute_loss_context_manager():
            model.eval()  # in training retrieval would fill its queue
            loss = model(**batch).loss.float()
    if not trainer.accelerator.gather(loss[None]).isfinite().all():
        raise ValueError(
            "The loss is not finite (NaN or infinity) before the first step: the weights of the checkpoint are damaged"
            + (", or too large for --fp16. Try --bf16" if trainer.args.fp16 else "")
            + ". Take another checkpoint."
        )


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Other values for attributes of owner, as long as the context lasts."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _push(trainer: BlipTrainer) -> None:
    args = trainer.args
    limit_waiting()
    try:
        trainer.push_to_hub()
    except Exception as error:  # of HTTP, of TLS, of the Hub's rules: what was trained lies in output_dir
        repository = trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).resolve().name
        logger.error(
            "\nNot pushed to the Hub. %s\n%s holds the whole result. Push it later with\n  %s",
            describe_hub_error(error),
            args.output_dir,
            upload_command(args.output_dir, repository, args.hub_private_repo, args.hub_revision),
        )
        sys.exit(NOT_PUSHED)


def _explain_loss(trainer: BlipTrainer) -> list[str]:
    """What a reader of the loss must know."""
    model, args = trainer.blip, trainer.args
    if model.contrastive:
        queue, batch = model.contrastive.queue_size, args.train_batch_size * args.world_size
        if not queue:
            return []
        return [
            "loss_itc is over the pairs of a batch and of a queue, which fills in "
            f"{-(-queue // (batch * args.gradient_accumulation_steps)):,} steps. Until then it rises, as it "
            f"must: a guess has a loss of {math.log(batch):.2f} among {batch} pairs, and of "
            f"{math.log(batch + queue):.2f} among {batch + queue:,}. in_batch_accuracy, the percent of pairs that are "
            "found within their batch, does not depend on the queue."
        ]
    if isinstance(model, BlipForImageTextRetrieval) or not model.text_decoder.label_smoothing:
        return []
    smoothing = model.text_decoder.label_smoothing
    floor = smoothing_floor(model.config.text_config.vocab_size, smoothing)
    if isinstance(model, BlipForQuestionAnswering):
        whole = f"the sum over its answer's tokens, at least {2 * floor:.2f} for one word and [SEP]"
    else:
        whole = "the mean over its tokens"
    return [
        f"Label smoothing of {smoothing} gives the loss a floor: that of a token is never below {floor:.2f}, and that "
        f"of a row is {whole}."
    ]


def _beside_baseline(scores: dict[str, float], baselines: dict[str, float], words: str) -> str:
    """Each score with its baseline, and a word if none is above it."""
    pairs = {name: (score, baselines[name]) for name, score in scores.items() if name in baselines}
    lines = [
        f"  {name.removeprefix('eval_'):<28}{score:8.2f}   baseline {baseline:8.2f}"
        for name, (score, baseline) in pairs.items()
    ]
    if not any(score > baseline for score, baseline in pairs.values()):
        lines.append("No score is above its baseline: the model has learned nothing yet that needs the image.")
    return "\n".join([f"Beside the baseline ({words}):", *lines])


def _describe_training(trainer: BlipTrainer, results: dict[str, Any], checkpoint: str | None) -> dict[str, str]:
    """For the card, in words."""
    args, rows = trainer.args, trainer.train_dataset
    held_out, seconds = trainer.eval_dataset, round(results.get("train_runtime", 0))
    trained_on = "a stream"
    if not isinstance(rows, StreamedRows):
        trained_on = f"{len(rows):,} of {number_images(rows).max() + 1:,} images"
    device = f"CPU ({platform.machine()}), torch's threads: {torch.get_num_threads()}"
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


def _describe_model(trainer: BlipTrainer, parameters: dict[str, int | float]) -> dict[str, str]:
    size = trainer.blip.config.vision_config.image_size
    return {
        "parameters": f"{parameters['total']:,}, of them trained {parameters['trainable']:,}",
        "image size": f"{size} x {size} pixels",
    }


def _scores_of(results: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in results.items()
        for prefix in ("eval_", "test_")
        if name.startswith(prefix) and is_score(name.removeprefix(prefix))
    }
