"""The Trainer with the loss normalization of BLIP, whole checkpoints and text predictions."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import ModelCard
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from blip_ft.data.sampling import GroupedSampler
from blip_ft.data.streaming import StreamedRows
from blip_ft.data.tables import number_images
from blip_ft.data.texts import IGNORED
from blip_ft.modeling.adapters import without_adapter
from blip_ft.modeling.weight_checks import is_finite
from blip_ft.results.push import describe_hub_error, limit_waiting
from blip_ft.training.callbacks import (
    BestCallback,
    ContrastiveCallback,
    CurvesCallback,
    EpochCallback,
    SampleCallback,
    StreamCallback,
    TrackerCallback,
    write_curves,
)
from blip_ft.training.checkpoints import (
    BUILDING,
    explain_unreadable,
    finish_checkpoint,
    newest_checkpoint,
    remove_old_checkpoints,
)
from blip_ft.training.engines import (
    SHARDED,
    embeddings_in_the_root_group,
    engine_of,
    own_part,
    whole_weight,
)
from blip_ft.training.run_settings import SETTINGS_FILE
from blip_ft.training.signals import (
    Signals,
    StopCallback,
    block_sigterm,
    ignore_signals_in_worker,
    unblock_sigterm,
)

logger = logging.getLogger(__name__)

CONTRASTIVE_FILE = "contrastive.safetensors"

NEVER = torch.iinfo(torch.long).max  # a step that no run reaches

LOSS_PARTS = ("loss_itc", "loss_itm", "in_batch_accuracy")  # of retrieval, logged with its loss

Batch = dict[str, torch.Tensor]

# model, batch and the positions of its rows in the data -> what is to be kept of each row
Predict = Callable[[torch.nn.Module, Batch, list[int]], list[dict[str, Any]]]

# a Predict and a word for the progress bar -> its results in the order of the rows; None for an unreadable image
Collect = Callable[[Predict, str], list[dict[str, Any] | None]]

# rows to evaluate on and how to run the model over them -> what to write of each row, and metrics
Evaluate = Callable[[Dataset, Collect], tuple[list[dict[str, Any] | None], dict[str, float]]]


class BlipTrainer(Trainer):
    """Trains on grouped batches with the loss of the one big batch, and evaluates on strings.

    Args:
        evaluate_rows: the task's evaluation; the batches that it meets are eval_collator's.
        eval_collator: default data_collator. Either may add `readable` (rows,), False where an image cannot be read.
        predict, describe: for a few lines every sample_steps; describe puts a row and its prediction into words.
        group: keep the rows of an image in one batch.
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
            self.args.ignore_data_skip = True  # the callback skips rows, the Trainer would decode each image
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
            plain.worker_init_fn = partial(ignore_signals_in_worker, init=plain.worker_init_fn)
            return loader
        rows.process, rows.num_processes, rows.batch_size = args.process_index, args.world_size, self._train_batch_size
        # not through accelerate, which would share out once more what each process has for itself
        return DataLoader(
            rows,
            self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=ignore_signals_in_worker,
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
        with explain_other_run(checkpoint):
            super()._load_from_checkpoint(checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with explain_unreadable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with explain_other_run(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint and not self.is_deepspeed_enabled:
                for group in self.optimizer.param_groups:
                    if missing := self.optimizer.defaults.keys() - group.keys():
                        raise ValueError(f"parameter group without {', '.join(sorted(missing))}")
        if self.blip.contrastive and checkpoint:
            self.blip.contrastive.load(Path(checkpoint) / CONTRASTIVE_FILE)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """This process's rows, each row of the whole in one process only; those of an image side by side."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        order = np.argsort(number_images(rows), kind="stable")
        share = np.array_split(order, self.args.world_size)[self.args.process_index].tolist()
        loader = DataLoader(
            Subset(rows, share),
            self.args.per_device_eval_batch_size,
            collate_fn=self.eval_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=ignore_signals_in_worker,
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
        """What evaluate_rows keeps of a row travels between processes, never image features."""
        rows = dataloader.dataset.dataset
        if self.is_in_train:
            self.require_finite(weights=True)

        def collect(predict: Predict, description: str) -> list[dict[str, Any] | None]:
            return self._collect(dataloader, predict, description)

        self.evaluated_rows = rows
        self.results, metrics = self.evaluate_rows(rows, collect)
        if unreadable := self.results.count(None):
            metrics["unreadable_images"] = unreadable
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
        block_sigterm()  # while workers are started
        batches = iter(dataloader)
        unblock_sigterm()
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


@contextmanager
def explain_other_run(checkpoint: str | None) -> Iterator[None]:
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
