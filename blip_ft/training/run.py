"""What all recipes do with a trainer: train, save, evaluate, write the results, push."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from blip_ft.arguments import changed_settings
from blip_ft.data.images import open_image
from blip_ft.data.streaming import StreamedRows
from blip_ft.data.tables import to_json, write_lines
from blip_ft.modeling.adapters import count_parameters
from blip_ft.modeling.blip2.base import QFormerModel
from blip_ft.results.model_card import build_model_card
from blip_ft.results.predictions import Line, build_lines, samples_of
from blip_ft.results.push import GITIGNORE, NOT_PUSHED, describe_hub_error, limit_waiting, upload_command
from blip_ft.results.report import THUMBNAIL_PIXELS, write_report
from blip_ft.training.checkpoints import (
    explain_full_disk,
    explain_lost_process,
    how_to_resume,
    what_is_missing,
)
from blip_ft.training.dry_run import dry_run
from blip_ft.training.engines import engine_of
from blip_ft.training.feature_cache import GB, PARTS, store_images
from blip_ft.training.idle_parts import IdleParts
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
from blip_ft.training.setup import RunSetup
from blip_ft.training.signals import Stopped, explain_lost_worker
from blip_ft.training.trainer import BlipTrainer

logger = logging.getLogger(__name__)

PREDICTION_FILES = {"eval": "predictions.jsonl", "test": "test_predictions.jsonl"}

# "eval" and "test" -> rows, and what evaluate_rows returned for each of them
Parts = dict[str, tuple[Dataset, list[dict[str, Any] | None]]]


def _stop_cleanly(function: Callable) -> Callable:
    """After a signal or on a full disk, end with a complete checkpoint and a message that says how to resume."""

    @wraps(function)
    def run_until_stopped(trainer: BlipTrainer, *args: Any, **kwargs: Any) -> Any:
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
                saved = f": {here} is complete" if step else ""
                flags = f"--output_dir {folder} --resume_from_checkpoint last"
                logger.warning("Stopped after step %d%s. Resume with: %s", step, saved, flags)
                sys.exit(128 + trainer.signals.received)

    return run_until_stopped


@_stop_cleanly
def run(
    trainer: BlipTrainer,
    setup: RunSetup,
    result_notes: dict[str, Any],
    baseline: Baseline | None = None,
    test_rows: Dataset | None = None,
) -> dict[str, Any]:
    """Train, save, evaluate, write the results into output_dir, and push them if push_to_hub is set.

    With `do_train: false` only evaluate, and write neither weights nor a model card.

    Args:
        result_notes: text beside the numbers in all_results.json, e.g. the scoring rule.
        baseline: shown beside the scores in all_results.json, log, card and report, unless the data is streamed.
        test_rows: the final model is evaluated on them once; they choose nothing.
    Returns: the content of all_results.json.
    Raises: SystemExit(NOT_PUSHED) if everything is written and the push fails.
    """
    args, folder, checkpoint = trainer.args, Path(trainer.args.output_dir), setup.checkpoint
    loss_notes = explain_loss(trainer)
    if trainer.is_world_process_zero():
        for note in loss_notes:
            logger.info("%s", note)
        (folder / ".gitignore").write_text(GITIGNORE, encoding="utf-8")
    # before training, which may shard the parameters
    finish = _Finish(
        trainer, setup, result_notes, baseline, loss_notes, _arguments_of(setup), count_parameters(trainer.model)
    )
    if args.do_train and checkpoint is None and not args.skip_dry_run:
        dry_run(trainer, finish, baseline, test_rows)
    if args.cache_image_features and args.do_train:
        _cache_image_features(trainer, checkpoint)
    results: dict[str, Any] = {}
    if args.eval_on_start and args.do_train and checkpoint is None:
        # here and not by the Trainer, which would count it as training time
        results |= trainer.evaluate(metric_key_prefix="before_training")
        logger.info("Results before training:\n%s", to_json(results, indent=2))
    args.eval_on_start = False
    if args.do_train:
        results |= _train(trainer, checkpoint)
    results = finish(results, test_rows)
    if args.push_to_hub:
        _push(trainer)
    return results


def _arguments_of(setup: RunSetup) -> dict[str, Any]:
    """The arguments of a run for its model card, without the unset ones."""
    parts = (*setup.other_args, setup.training_args)
    changed = {name for part in parts for name in changed_settings(part)}
    arguments = {name: value for part in setup.other_args for name, value in asdict(part).items()}
    arguments |= setup.training_args.to_dict()
    # None and "" are listed only if the user asked for them, as in `save_total_limit: null`
    unset = {name for name, value in arguments.items() if value in (None, "") and name not in changed}
    return {name: value for name, value in arguments.items() if name not in unset and value not in ([], {})}


def _cache_image_features(trainer: BlipTrainer, checkpoint: str | None) -> None:
    """Train on stored image features. Evaluation has its own collator, which decodes images.

    The parts of a BLIP-2 or InstructBLIP that computed the features are on the CPU while training. Not those of a BLIP,
    whose device is that of its vision model.
    """
    if checkpoint and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        # a vision model with new weights in each run: train() would load the checkpoint too late. FSDP and DeepSpeed
        # load it into the wrapped model
        trainer._load_from_checkpoint(checkpoint)
    images = store_images(
        trainer.blip, trainer.processing_class, trainer.train_dataset, trainer.args, trainer.signals.stop_if_received
    )
    trainer.data_collator = replace(trainer.data_collator, look_up=images)
    if not isinstance(trainer.blip, QFormerModel) or engine_of(trainer.args) != "DDP":
        return
    idle_parts = IdleParts(trainer.blip, PARTS[images.level], trainer.args.device)
    trainer.add_callback(idle_parts)
    if trainer.args.device.type != "cpu":
        logger.info("Not on the device while training: weights of %.2f GB", idle_parts.num_bytes / GB)


@dataclass
class _Finish:
    """Evaluate after training, and write the files of output_dir."""

    trainer: BlipTrainer
    setup: RunSetup
    result_notes: dict[str, Any]
    baseline: Baseline | None
    loss_notes: list[str]
    arguments: dict[str, Any]
    parameters: dict[str, int | float]

    def __call__(self, results: dict[str, Any], test_rows: Dataset | None) -> dict[str, Any]:
        """results, extended by those of the evaluation; in the main process the content of all_results.json."""
        best_step = best_step_of(self.trainer)
        scores, parts = self._evaluate(best_step, test_rows)
        results = results | scores
        return self._write(results, parts, best_step) if self.trainer.is_world_process_zero() else results

    def _evaluate(self, best_step: int | None, test_rows: Dataset | None) -> tuple[dict[str, float], Parts]:
        trainer, last_step = self.trainer, self.trainer.state.global_step
        if best_step:  # curves and trackers show the scores at the step that these weights are from
            trainer.state.global_step = best_step
        scores = trainer.evaluate()
        parts = {"eval": (trainer.eval_dataset, trainer.results)}
        if test_rows is not None:
            scores |= trainer.evaluate(test_rows, metric_key_prefix="test")
            parts["test"] = (test_rows, trainer.results)
        trainer.state.global_step = last_step
        return scores, parts

    def _write(self, results: dict[str, Any], parts: Parts, best_step: int | None) -> dict[str, Any]:
        trainer, data_args = self.trainer, self.setup.data_args
        file = Path(trainer.args.output_dir) / "all_results.json"
        lines = {part: build_lines(rows, predicted) for part, (rows, predicted) in parts.items()}
        for part, of_part in lines.items():
            write_lines(file.with_name(PREDICTION_FILES[part]), of_part)
        scores, baselines = scores_of(results), self._score_baseline(parts)
        results = results | {name_baseline(name): value for name, value in baselines.items()}
        result_notes = self.result_notes | ({"baseline": self.baseline.words} if baselines else {})
        overlaps, notes = {}, [*self.loss_notes]
        if trainer.args.do_train:
            result_notes["checkpoint"] = describe_choice(trainer, best_step, data_args)
            notes.append(f"Checkpoint: {result_notes['checkpoint']}.")
            for part, (rows, _) in parts.items():
                results |= count_overlap(part, rows)
                overlaps[part] = describe_overlap(rows, data_args)
                where = data_args.held_out if part == "eval" else f"{data_args.tested_on} (the final model, once)"
                notes.append(f"Evaluated on {where}. {overlaps[part]}")
        if baselines:
            notes.append(f"Baseline: {self.baseline.words}.")
        self._write_report(file.with_name("report.html"), parts["eval"][0], lines["eval"], scores, baselines, notes)
        results = {name: value for name, value in results.items() if name != "epoch"} | result_notes
        file.write_text(to_json(results, indent=2) + "\n", encoding="utf-8")
        if trainer.args.do_train:
            self._write_card(results, scores, baselines, overlaps, result_notes)
        logger.info("Results, %s:\n%s", file, to_json(results, indent=2))
        if baselines:
            logger.info("%s", beside_baseline(scores, baselines, self.baseline.words))
        return results

    def _score_baseline(self, parts: Parts) -> dict[str, float]:
        if self.baseline is None or isinstance(self.trainer.train_dataset, StreamedRows):
            return {}
        return {
            f"{part}_{name}": value
            for part, (rows, _) in parts.items()
            for name, value in self.baseline.score(rows).items()
        }

    def _write_report(
        self,
        path: Path,
        rows: Dataset,
        lines: list[Line],
        scores: dict[str, float],
        baselines: dict[str, float],
        notes: list[str],
    ) -> None:
        trainer = self.trainer
        write_report(
            path,
            f"{path.parent.resolve().name}: {self.setup.data_args.label}",
            scores=scores,
            samples=samples_of(lines),
            open_image=lambda position: open_image(rows[position]["image"], THUMBNAIL_PIXELS),
            log_history=trainer.state.log_history if trainer.args.do_train else (),
            baselines=baselines,
            notes=notes,
        )

    def _write_card(
        self,
        results: dict[str, Any],
        scores: dict[str, float],
        baselines: dict[str, float],
        overlaps: dict[str, str],
        result_notes: dict[str, Any],
    ) -> None:
        trainer, setup, args = self.trainer, self.setup, self.trainer.args
        model_args, data_args = setup.model_args, setup.data_args
        facts = describe_model(trainer, self.parameters) | describe_training(trainer, results, setup.checkpoint)
        family = setup.family
        trainer.card = build_model_card(
            trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).resolve().name,
            task=setup.task,
            family=family.name,
            model_type=trainer.blip.config.model_type,
            stock_class=trainer.class_name,
            is_adapter=hasattr(trainer.model, "peft_config"),
            base_model=model_args.hub_id,
            revision=model_args.model_revision,
            dataset=data_args.label,
            dataset_ids=data_args.hub_ids,
            held_out=data_args.held_out,
            overlap=overlaps["eval"],
            tested_on=data_args.tested_on,
            test_overlap=overlaps.get("test", ""),
            scores=scores,
            baselines=baselines,
            notes=result_notes,
            facts=facts,
            arguments=self.arguments,
            language_model=family.language_model if family.reads_prompts else None,
            prompt=setup.texts.prompt if setup.texts else "",
            max_new_tokens=args.generation_max_length,
        )
        trainer.create_model_card()


def _train(trainer: BlipTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train, and save weights and state; those of the best checkpoint with load_best_model_at_end."""
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.require_finite(weights=True)
    trainer.save_model(_internal_call=True)
    if hasattr(trainer.model, "peft_config") and trainer.is_world_process_zero():
        # PEFT saves neither the image size nor the start tokens
        trainer.blip.config.save_pretrained(trainer.args.output_dir)
    trainer.save_state()
    return trained.metrics


def _push(trainer: BlipTrainer) -> None:
    args = trainer.args
    limit_waiting()
    try:
        trainer.push_to_hub()
    except Exception as error:  # HTTP, TLS, the rules of the Hub: the result is in output_dir in any case
        repository = trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).resolve().name
        logger.error(
            "\nNot pushed to the Hub. %s\n%s contains the complete result. Push it later with\n  %s",
            describe_hub_error(error),
            args.output_dir,
            upload_command(args.output_dir, repository, args.hub_private_repo, args.hub_revision),
        )
        sys.exit(NOT_PUSHED)
