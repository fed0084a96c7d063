"""Run all stages once on a few rows before training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset

from blip_ft.data.checks import why_unreadable
from blip_ft.data.streaming import StreamedRows
from blip_ft.results.samples import choose_rows
from blip_ft.training.notes import Baseline
from blip_ft.training.trainer import BlipTrainer

logger = logging.getLogger(__name__)


def dry_run(
    trainer: BlipTrainer, finish: Callable[..., dict[str, Any]], baseline: Baseline | None, test_rows: Dataset | None
) -> None:
    """Run all stages once on a few rows, so that errors occur before the first step and not after hours.

    The stages are a loss, an evaluation, and its predictions, report and card, in a folder that is removed. Random
    numbers, callbacks and state of the training do not change. All processes must enter together.
    Raises: any exception of a stage; ValueError if the loss is not finite, or the best metric is not measured.
    """
    args, rows = trainer.args, trainer.eval_dataset
    few = _few_of(rows, max(2, args.world_size))
    logger.info("Dry run of all stages on %d rows before training. Skip it with --skip_dry_run.", len(few))
    package_logger = logging.getLogger(__package__)
    level = package_logger.level
    with (
        TemporaryDirectory() as folder,
        torch.random.fork_rng([args.device] if args.device.type == "cuda" else []),
        _replaced(args, output_dir=folder, dataloader_num_workers=0),
        _replaced(trainer, eval_dataset=few, state=copy.deepcopy(trainer.state), results=[], card=None),
        _replaced(trainer.callback_handler, callbacks=[]),
    ):
        _require_finite_loss(trainer)
        try:
            package_logger.setLevel(logging.WARNING)  # the scores of a few rows are meaningless
            results = finish({}, None if test_rows is None else _few_of(test_rows, len(few)))
        finally:
            package_logger.setLevel(level)
    if args.eval_strategy == "no" or isinstance(trainer.train_dataset, StreamedRows):
        return
    measured = [name.removeprefix("eval_") for name in results if name.startswith("eval_")]
    if baseline and trainer.best_metric not in ("", *measured):
        measured += baseline.score(rows)  # a few rows may not have all answer types
    trainer.require_best_metric(dict.fromkeys(measured))


def _few_of(rows: Dataset, number: int) -> Dataset:
    few = rows.select(choose_rows(rows, number))
    for name in ("image_overlap", "overlap_with_evaluation"):
        if hasattr(rows, name):  # only test rows have the second
            setattr(few, name, getattr(rows, name))
    return few


def _require_finite_loss(trainer: BlipTrainer) -> None:
    """Compute the loss of two rows. Raises: ValueError if it is not finite in one of the processes."""
    rows = trainer.train_dataset
    first = rows.first_rows() if isinstance(rows, StreamedRows) else map(rows.__getitem__, range(len(rows)))
    readable = (row for row in islice(first, 64) if why_unreadable(row["image"]) is None)
    loss = torch.zeros((), device=trainer.args.device)
    if few := list(islice(readable, 2)):
        batch = trainer._prepare_inputs(trainer.data_collator(few))
        if trainer.model_accepts_loss_kwargs:
            batch["num_items_in_batch"] = trainer.blip.loss_items(batch).sum().clamp(min=1)
        with trainer.unsharded_model() as model, torch.no_grad(), trainer.compute_loss_context_manager():
            model.eval()  # in training mode retrieval would fill its queue
            loss = model(**batch).loss.float()
    if not trainer.accelerator.gather(loss[None]).isfinite().all():
        raise ValueError(
            "The loss is not finite (NaN or infinity) before the first step: the weights of the checkpoint are damaged"
            + (", or too large for --fp16. Try --bf16" if trainer.args.fp16 else "")
            + ". Use another checkpoint."
        )


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Replace attributes of owner inside the context."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
