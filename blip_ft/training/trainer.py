"""The Trainer with the loss normalization of BLIP, complete checkpoints and text predictions."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from blip_ft.data.batches import Batch, match_rows
from blip_ft.data.sampling import GroupedSampler, share_of_process
from blip_ft.data.streaming import StreamedRows
from blip_ft.data.tables import number_images
from blip_ft.data.texts import IGNORED
from blip_ft.modeling.adapters import without_adapter
from blip_ft.training.callbacks import (
    BestCallback,
    ContrastiveCallback,
    CurvesCallback,
    EpochCallback,
    SampleCallback,
    StopEarlyCallback,
    StreamCallback,
    TrackerCallback,
    write_curves,
)
from blip_ft.training.checkpoints import (
    BUILDING,
    explain_other_run,
    explain_unreadable,
    finish_checkpoint,
    remove_old_checkpoints,
)
from blip_ft.training.engines import (
    SHARDED,
    engine_of,
    layers_to_shard,
    shard_embeddings_with_head,
    unsharded_weight,
)
from blip_ft.training.optimization import OptimizingTrainer, cosine_per_epoch
from blip_ft.training.progress import ProgressLog
from blip_ft.training.run_settings import SETTINGS_FILE
from blip_ft.training.signals import Signals, StopCallback, block_sigterm, ignore_signals_in_worker, unblock_sigterm

logger = logging.getLogger(__name__)

CONTRASTIVE_FILE = "contrastive.safetensors"

LOSS_PARTS = ("loss_itc", "loss_itm", "in_batch_accuracy")  # logged with the loss of retrieval

# model, batch and the positions of its rows in the data -> a result for each row
Predict = Callable[[torch.nn.Module, Batch, list[int]], list[dict[str, Any]]]

# a Predict and the text of the progress bar -> its results in the order of the rows; None for an unreadable image
Collect = Callable[[Predict, str], list[dict[str, Any] | None]]

# rows to evaluate on, and the function that runs the model over them -> a result for each row, and metrics
Evaluate = Callable[[Dataset, Collect], tuple[list[dict[str, Any] | None], dict[str, float]]]


class BlipTrainer(OptimizingTrainer):
    """Trains on batches grouped by image, with the loss of one large batch, and evaluates text.

    Args:
        evaluate_rows: the evaluation of the task, on batches of eval_collator.
        eval_collator: default data_collator. Both may add `readable` (rows,), False for an image that cannot be read.
        predict, describe: log a few predictions every sample_steps; describe turns a row and its prediction into text.
        group: keep the rows of an image in one batch.
        run_settings: saved in each checkpoint, see settle_settings.
    After evaluate(), `results` are those that evaluate_rows returned for `evaluated_rows`, in the order of the rows.
    """

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
        # the Trainer has set it again; with it, generate() waits for the other processes at each token
        unset_hf_deepspeed_config()
        self.class_name = type(self.blip).__name__  # FSDP2 renames the class
        # created now, while each process has all weights
        self.eval_copy = copy.deepcopy(self.model).cpu() if engine_of(self.args) in SHARDED else None
        if self.is_deepspeed_enabled and self.eval_copy is None and self.blip.device.type != self.args.device.type:
            # the Trainer would move it in train(), after the dry run and an evaluation at the start
            self._move_model_to_device(self.model, self.args.device)
        self.signals = Signals()
        if self.args.save_on_each_node:  # transformers 5.23 writes weights in the first process only
            self.blip.should_save_on_this_rank = lambda is_main_process: is_main_process
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or layers_to_shard(self.blip)
            self.accelerator.prepare = shard_embeddings_with_head(self.model)(self.accelerator.prepare)
        elif self.is_deepspeed_enabled:  # which looks up each weight of the optimizer in the model
            self.accelerator.prepare = self._temperature_in_model()(self.accelerator.prepare)
        self.sampler: GroupedSampler | None = None  # of the training rows
        self.building: str | None = None  # folder of a checkpoint that is being written
        self.has_targets = False  # whether a batch had a token to learn
        self.loss_parts: list[torch.Tensor] = []  # LOSS_PARTS (3,) of each step since the last log
        for shown in (ProgressCallback, PrinterCallback):
            if self.pop_callback(shown):
                self.add_callback(ProgressLog())
        self.add_callback(BestCallback())
        if self.args.early_stopping_patience:
            self.add_callback(StopEarlyCallback())
        self.add_callback(EpochCallback(self))
        self.add_callback(ContrastiveCallback(self))
        self.add_callback(CurvesCallback())
        self.add_callback(TrackerCallback(self))
        if isinstance(self.train_dataset, StreamedRows):
            self.args.ignore_data_skip = True  # the Trainer would decode the rows to skip; StreamCallback does not
            self.add_callback(StreamCallback())
        if self.args.sample_steps and predict and describe:
            self.add_callback(SampleCallback(self, predict, describe))
        self.add_callback(StopCallback(self))  # last, so that a checkpoint includes the effects of the others

    @contextmanager
    def unsharded_model(self) -> Iterator[torch.nn.Module]:
        """A BLIP model that each process can call independently. All processes must enter together.

        Under ZeRO-3 and FSDP2 every submodule call of the trained model is a collective, and ranks have different
        numbers of rows and generate different numbers of tokens. The model is then an unsharded copy, which is on the
        device inside the context only.
        """
        if self.eval_copy is None:
            yield self.blip
            return
        sharded = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        for parameter, copied in zip(sharded.parameters(), self.eval_copy.parameters(), strict=True):
            with unsharded_weight(parameter) as weight:
                copied.data = weight.detach().to(self.args.device, copy=True)
        yield without_adapter(self.eval_copy.to(self.args.device))
        self.eval_copy.cpu()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights so that stock transformers loads them, and tied weights once.

        transformers 5.23 saves no weights with SHARDED_STATE_DICT (FSDP) and without
        stage3_gather_16bit_weights_on_model_save (ZeRO-3), and it saves tied weights twice under DeepSpeed.
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
            plain = loader.base_dataloader  # setting an attribute of accelerate's own loader has no effect
            plain.worker_init_fn = partial(ignore_signals_in_worker, init=plain.worker_init_fn)
            return loader
        rows.process, rows.num_processes, rows.batch_size = args.process_index, args.world_size, self._train_batch_size
        # without accelerate, which would split the rows of this process among the processes again
        return DataLoader(
            rows,
            self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=ignore_signals_in_worker,
            generator=torch.Generator(),  # a resumed run creates one loader more, which must not change dropout
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> GroupedSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        self.sampler = GroupedSampler(number_images(rows), self.rows_a_step, self.args.order_seed, self.group)
        return self.sampler

    @property
    def rows_a_step(self) -> int:
        """Rows of an optimizer step, over all processes."""
        return self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.args.cosine_per_epoch and self.lr_scheduler is None:
            steps_per_epoch = len(self.sampler) // self.rows_a_step
            self.lr_scheduler = cosine_per_epoch(optimizer or self.optimizer, num_training_steps, steps_per_epoch)
            self._created_lr_scheduler = True  # otherwise the Trainer would keep it for the next train()
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor | None:
        """The divisor of a step's loss. The Trainer would count label tokens; the model knows what its mean is over."""
        if not self.model_accepts_loss_kwargs:
            return None
        self._require_targets(batch_samples)
        items = sum(self.blip.loss_items(batch).sum() for batch in batch_samples).to(device, torch.float)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        return items

    def _require_targets(self, batches: list[Batch]) -> None:
        """Raise ValueError if the first batches have readable images but no token to learn."""
        if self.has_targets:  # checked once, because the check waits for the GPU
            return
        self.has_targets = any((batch["labels"][:, 1:] != IGNORED).any() for batch in batches)
        if not self.has_targets and any(batch["readable"].any() for batch in batches):
            raise ValueError(
                "The batches of a step contain no token to learn: the text before the target fills them. Raise "
                "--max_caption_tokens or --max_answer_tokens, or shorten --prompt."
            )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        finally:  # also if the run is interrupted
            write_curves(self.args, self.state)

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.control.should_training_stop:  # a run that had stopped early; the Trainer would train one more step
            unblock_sigterm()  # as the first step does
            return
        super()._run_epoch(**kwargs)

    def compute_loss(
        self, model: torch.nn.Module, inputs: Batch, return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if "loss_itc" in outputs and model.training:
            self.loss_parts.append(torch.stack([outputs[name].float() for name in LOSS_PARTS]).detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.require_finite(weights=False)
        if "loss" in logs and self.loss_parts:
            parts = self.accelerator.reduce(torch.stack(self.loss_parts).mean(0), "mean").tolist()
            logs |= dict(zip(LOSS_PARTS, parts, strict=True))
            self.loss_parts.clear()
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.blip.contrastive and self.args.should_save:
            self.blip.contrastive.save(Path(output_dir) / CONTRASTIVE_FILE)

    def _get_output_dir(self, trial: Any) -> str:
        return self.building or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Build the checkpoint in another folder, and rename it when all processes have written all files."""
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
        """A loader of the rows that this process evaluates; rows of an image are adjacent."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        share = share_of_process(number_images(rows), self.args.process_index, self.args.world_size)
        loader = DataLoader(
            Subset(rows, share),
            self.args.per_device_eval_batch_size,
            collate_fn=self.eval_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=ignore_signals_in_worker,
            # its own: a run that resumes after it was stopped in an evaluation draws the same random numbers
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
        """Evaluate with evaluate_rows. Processes exchange its results for each row, not image features."""
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
        """metric_for_best_model without its prefix; "" if it is not set."""
        return (self.args.metric_for_best_model or "").removeprefix("eval_")

    def require_best_metric(self, metrics: Iterable[str]) -> None:
        """Raise ValueError if metric_for_best_model is not one of metrics, whose names have no prefix."""
        best = self.best_metric
        if best and best not in metrics:
            raise ValueError(f"metric_for_best_model {best} is not measured here. Choose one of {', '.join(metrics)}.")

    def _collect(self, dataloader: DataLoader, predict: Predict, description: str) -> list[dict[str, Any] | None]:
        results = []
        block_sigterm()  # while workers start
        batches = iter(dataloader)
        unblock_sigterm()
        hidden = self.args.disable_tqdm or not self.is_local_process_zero()
        progress = tqdm(batches, description, len(dataloader), disable=hidden, leave=False)
        with self.unsharded_model() as model:
            model.eval()
            for batch, here, readable in match_rows(progress, dataloader.row_positions):
                if self.args.world_size == 1:  # another process may have fewer batches, and would wait
                    self.signals.stop_if_received()
                with torch.no_grad(), self.compute_loss_context_manager():
                    predicted = predict(model, self._prepare_inputs(batch), here)
                results += [
                    (position, result if good else None)
                    for position, result, good in zip(here, predicted, readable, strict=True)
                ]
        return [result for _, result in sorted(gather_object(results), key=itemgetter(0))]
