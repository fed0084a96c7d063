"""What all recipes do with a trainer: train, save, evaluate, write the results, push."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from blip_ft.arguments import DataArguments, ModelArguments, changed_settings
from blip_ft.data.images import open_image
from blip_ft.data.streaming import StreamedRows
from blip_ft.data.tables import to_json, write_lines
from blip_ft.modeling.adapters import count_parameters
from blip_ft.results.model_card import build_model_card
from blip_ft.results.push import GITIGNORE, NOT_PUSHED, describe_hub_error, limit_waiting, upload_command
from blip_ft.results.report import THUMBNAIL_PIXELS, write_report
from blip_ft.results.samples import samples_of
from blip_ft.training.checkpoints import (
    explain_full_disk,
    explain_lost_process,
    how_to_resume,
    what_is_missing,
)
from blip_ft.training.dry_run import dry_run
from blip_ft.training.feature_cache import store_images
from blip_ft.training.notes import (
    Baseline,
    beside_baseline,
    best_step_of,
    count_overlap,
    describe_choice,
    describe_model,
    describe_overlap,
    describe_training,
    explain_loss,
    name_baseline,
    scores_of,
)
from blip_ft.training.signals import (
    Stopped,
    explain_lost_worker,
)
from blip_ft.training.trainer import BlipTrainer

logger = logging.getLogger(__name__)


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
    notes = explain_loss(trainer)
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
        dry_run(trainer, finish, baseline, test_rows)
    if args.cache_image_features and args.do_train:
        if checkpoint and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            # train() would load it too late for a vision model that is new in each run; those two load it wrapped
            trainer._load_from_checkpoint(checkpoint)
        # evaluation keeps its own collator, which decodes
        images = store_images(
            trainer.blip, trainer.processing_class, trainer.train_dataset, args, trainer.signals.stop_if_received
        )
        trainer.data_collator = replace(trainer.data_collator, look_up=images)
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
    best_step, last_step = best_step_of(trainer), trainer.state.global_step
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
        scores, baselines = scores_of(results), {}
        if baseline and not isinstance(trainer.train_dataset, StreamedRows):
            for part, own in parts.items():
                baselines |= {f"{part}_{name}": value for name, value in baseline.score(own).items()}
            result_notes = {**result_notes, "baseline": baseline.words}
        results |= {name_baseline(name): value for name, value in baselines.items()}
        if args.do_train:
            overlaps = {part: describe_overlap(own, data_args) for part, own in parts.items()}
            result_notes = {**result_notes, "checkpoint": describe_choice(trainer, best_step, data_args)}
            notes = [*notes, f"Checkpoint: {result_notes['checkpoint']}."]
            for part, own in parts.items():
                results |= count_overlap(part, own.image_overlap)
                where = data_args.held_out if part == "eval" else f"{data_args.tested_on} (the final model, once)"
                notes.append(f"Evaluated on {where}. {overlaps[part]}")
            if test_rows is not None:
                results["test_images_evaluated_on"] = test_rows.overlap_with_evaluation.num_shared
        write_report(
            folder / "report.html",
            f"{folder.resolve().name}: {data_args.label}",
            scores=scores,
            samples=samples_of(rows, eval_results),
            open_image=lambda position: open_image(rows[position]["image"], THUMBNAIL_PIXELS),
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
                facts={**describe_model(trainer, parameters), **describe_training(trainer, results, checkpoint)},
                arguments=arguments,
            )
            trainer.create_model_card()
        logger.info("Results, %s:\n%s", folder / "all_results.json", to_json(results, indent=2))
        if baselines:
            logger.info("%s", beside_baseline(scores, baselines, baseline.words))
    return results


def _train(trainer: BlipTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train and save weights and state, of the best checkpoint under load_best_model_at_end."""
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.require_finite(weights=True)
    trainer.save_model(_internal_call=True)
    if hasattr(trainer.model, "peft_config") and trainer.is_world_process_zero():
        # an adapter's folder tells nothing else of image size and start tokens
        trainer.blip.config.save_pretrained(trainer.args.output_dir)
    trainer.save_state()
    return trained.metrics


def _write_predictions(path: Path, rows: Dataset, results: list[dict[str, Any] | None]) -> None:
    unreadable = {"prediction": "", "unreadable_image": True}
    pairs = zip(rows.remove_columns("image"), results, strict=True)
    write_lines(path, ({**row, **(result or unreadable)} for row, result in pairs))


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
