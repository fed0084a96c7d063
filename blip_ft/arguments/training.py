"""The Trainer's settings with the defaults of BLIP."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import Seq2SeqTrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_torch_bf16_gpu_available

from blip_ft.arguments.settings import Settings

NOT_ADAM = ("adafactor", "adagrad", "rmsprop", "sgd")

_EVALUATION = "Leave it out: evaluation always generates texts, in the precision of training, and scores all of them."

_ORDER = "Leave it out: each epoch is shuffled by image and cut to whole batches."

# the Trainer's settings that BlipTrainer does not read, or reads in vain -> what to do
WITHOUT_EFFECT = {
    **dict.fromkeys(
        (
            *("bf16_full_eval", "fp16_full_eval", "predict_with_generate", "prediction_loss_only", "label_names"),
            *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "batch_eval_metrics"),
            "include_for_metrics",
        ),
        _EVALUATION,
    ),
    **dict.fromkeys(
        ("train_sampling_strategy", "length_column_name", "sortish_sampler", "dataloader_drop_last"), _ORDER
    ),
    "do_eval": "Leave it out: a run ends with an evaluation.",
    "do_predict": "Leave it out: recipes/predict.py predicts.",
    "generation_config": "Use --generation_max_length and --generation_num_beams.",
    "use_cache": "Leave it out: generation decides for itself.",
    "use_liger_kernel": "Leave it out: Liger has no kernels for BLIP.",
    "liger_kernel_config": "Leave it out: Liger has no kernels for BLIP.",
    "include_num_input_tokens_seen": "Leave it out: it would count pixels as tokens.",
    "enable_jit_checkpoint": "Leave it out: SIGTERM saves a checkpoint in any case.",
    "parallelism_config": "Leave it out: BLIP is not cut up among devices.",
    "label_smoothing_factor": "It would smooth the wrong tokens, for the Trainer does not shift BLIP's labels. Use "
    "--label_smoothing, which goes into the model's own loss.",
    "logging_nan_inf_filter": "Leave it out: a loss that is not finite stops the run.",
    "remove_unused_columns": "It would drop image, question and answers. Leave it off.",
    "hub_token": "It would be pickled into training_args.bin. Set the environment variable HF_TOKEN instead.",
}

HELP_TEXTS = {
    "weight_decay": "Weight decay of all parameters, biases and norms included, as in the paper.",
    "metric_for_best_model": "Metric that chooses the best checkpoint. Default: the loss if it is measured, else the "
    "recipe's first metric.",
    "resume_from_checkpoint": "`last`: the newest complete checkpoint of output_dir; or a checkpoint-... folder.",
    "eval_on_start": "Evaluate once before training; the results are named before_training_...",
    "report_to": "tensorboard, trackio or wandb, each installed with pip, or none.",
    "average_tokens_across_devices": "Divide the loss by what all processes together have to learn in a step: "
    "questions, or tokens of captions.",
    "data_seed": "Seed of the order of rows. Default: seed. Not for --streaming.",
    "debug": "Without a value: show the traceback of a mistake. With underflow_overflow: find where numbers overflow.",
    "push_to_hub": "Push the result to the Hub at the end, and on the way as hub_strategy says.",
    "hub_private_repo": "Make the repository private. It has no effect on one that exists.",
    "bf16": "Compute in bfloat16 where that is safe. Needs a GPU that has it, or --use_cpu.",
    "fp16": "Compute in float16 where that is safe. Needs a GPU; bf16 is the safer choice where there is one.",
    "optim_target_modules": "Layers that GaLore or APOLLO train at low rank.",
}


@dataclass
class BlipTrainingArguments(Seq2SeqTrainingArguments, Settings):
    """The Trainer's arguments, with the defaults of the BLIP paper where it has one."""

    _argument_group_name = "Training"
    without_effect = WITHOUT_EFFECT
    help_texts = HELP_TEXTS
    metrics: ClassVar[tuple[str, ...]] = ()  # what the recipe's evaluation gives; () is not checked

    output_dir: str | None = field(
        default=None, metadata={"help": "Default: outputs/<recipe>, or the next free outputs/<recipe>-2, -3, ..."}
    )
    # of questions, also for DataPipeline; each recipe sets its own
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 64
    do_train: bool = field(
        default=True,
        metadata={
            "help": "false: evaluate model_name_or_path, on the rows to evaluate on and those to test on; nothing is "
            "trained, and no weights are written."
        },
    )
    do_eval: bool = True
    include_num_input_tokens_seen: str = "no"  # as a bool, which the parser would make of it, it is not its default
    # train_vqa.py: AdamW(lr, weight_decay=0.05) on all parameters, no clipping, cosine
    weight_decay: float = 0.05
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "0: no clipping, as the paper. The summed loss has norms over 10."}
    )
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 50
    logging_nan_inf_filter: bool = False  # it would hide them, and wait for the device in each step
    eval_strategy: str | None = field(
        default=None,
        metadata={
            "help": "Evaluate while training: no, epoch or steps. Default: with each checkpoint under "
            "load_best_model_at_end, else no."
        },
    )
    save_strategy: str | None = None  # as eval_strategy under load_best_model_at_end, else epoch
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = field(
        default=False,
        metadata={
            "help": "Evaluate with each checkpoint, and end with the best of them instead of the last one. Default: as "
            "the originals, on for captions (CIDEr-D) and retrieval (mean recall), off for questions."
        },
    )
    dataloader_num_workers: int = field(
        default_factory=lambda: min(4, os.cpu_count() or 1),
        metadata={"help": "Processes that read and resize images. Default: one a core, at most 4."},
    )
    # every column is the collator's business, and all heads are used in each step
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    cache_image_features: bool = field(
        default=False,
        metadata={
            "help": "With --freeze vision_model, for questions and captions: encode each training image once, before "
            "the first epoch, and keep the result on disk for this and later runs. Evaluation still encodes."
        },
    )
    cache_dtype: Literal["bf16", "fp32"] = field(
        default="bf16",
        metadata={"help": "Of the kept features. fp32: the loss of a run without cache, twice the size."},
    )
    cache_limit_gb: float = field(
        default=50.0,
        metadata={"help": "Of all features kept under HF_HOME. An image of 384 pixels takes 0.9 MB in bf16."},
    )
    skip_dry_run: bool = field(
        default=False,
        metadata={
            "help": "Train at once. Default: first run all stages (loss, evaluation, report, card) on a few rows, so "
            "that what fails in one of them is found before training. Not if a run is resumed."
        },
    )
    allow_changed_settings: bool = field(
        default=False,
        metadata={
            "help": "Resume although settings, data or base checkpoint are not those that the checkpoint was saved "
            "with; the differences are listed. Default: refused."
        },
    )
    sample_steps: int = field(
        default=500,
        metadata={"help": "Log a few predictions every so many steps. 0: never; retrieval has none."},
    )

    def __post_init__(self) -> None:
        self.output_dir_was_given = self.output_dir is not None
        self.strategy_was_given = bool(self.eval_strategy or self.save_strategy)
        self._settle_strategies()
        self.check_values()
        self.require_effect()
        self._check_objects()
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps must be at least 1, or -1 to train num_train_epochs; found {self.max_steps}.")
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ValueError("save_strategy best saves after an evaluation. Add --eval_strategy epoch or steps.")
        for name in ("push_to_hub", "resume_from_checkpoint"):
            if not self.do_train and getattr(self, name):
                raise ValueError(
                    f"{name} has no effect with --do_train false, which evaluates model_name_or_path and saves no "
                    "weights. Leave it out; a checkpoint-... folder can be the --model_name_or_path."
                )
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise ValueError("dataloader_persistent_workers needs workers: set --dataloader_num_workers above 0.")
        needs_bf16 = self.bf16 and not self.use_cpu
        if needs_bf16 and not is_torch_bf16_gpu_available():
            raise ValueError(
                "bf16 needs a GPU that computes in bfloat16, and none is found. Leave it out (--bf16 false), or add "
                "--use_cpu to compute in bfloat16 on the CPU."
            )
        follows_metric = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        if follows_metric and self.eval_strategy == "no":
            raise ValueError(
                f"lr_scheduler_type {self.lr_scheduler_type} follows a metric. Add --eval_strategy epoch or steps."
            )
        # for load_best_model_at_end and these schedulers the Trainer takes the loss, for save_strategy best nothing
        takes_loss = self.load_best_model_at_end or follows_metric
        without_default = self.save_strategy == "best" or (takes_loss and "loss" not in self.metrics)
        if self.metrics and without_default:
            self.metric_for_best_model = self.metric_for_best_model or self.metrics[0]
        best = self.metric_for_best_model
        # a longer name is that of an answer type or a k
        if self.metrics and best and not best.removeprefix("eval_").startswith(self.metrics):
            raise ValueError(
                f"metric_for_best_model must be one of {', '.join(self.metrics)}; found {self.metric_for_best_model}."
            )
        if self.hub_model_id:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise ValueError(f"hub_model_id is OWNER/NAME, found {self.hub_model_id!r}. {error}") from error
        # torch warns in each epoch where there is nothing to pin for
        self.dataloader_pin_memory &= torch.cuda.is_available() and not self.use_cpu
        try:
            super().__post_init__()
        except (TypeError, AttributeError) as error:  # of an object with unknown keys, e.g. accelerator_config
            raise ValueError(
                f"The training settings hold an unknown key or a value of the wrong kind: {error}"
            ) from error
        if self.torch_compile_mode:
            modes = torch._inductor.list_mode_options()
            if self.torch_compile_mode not in modes:
                raise ValueError(
                    f"torch_compile_mode must be one of {', '.join(sorted(modes))}; found {self.torch_compile_mode!r}."
                )
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU, and this run is on the CPU. Leave it out, or use --bf16 --use_cpu.")
        if follows_metric and self.greater_is_better:
            # torch's default, min, would lower the learning rate while the score rises
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches:
            raise ValueError(
                "split_batches and dispatch_batches of accelerator_config cut a batch by its rows, and one of images "
                "and their questions cannot be. Leave them out: each process makes batches of its own."
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs and one process: start with `accelerate launch --multi_gpu` or `torchrun "
                "--nproc_per_node`, or hide the other cards with CUDA_VISIBLE_DEVICES=0."
            )
        try:
            # the Trainer would make them after the model is loaded
            for make_callback in get_reporting_integration_callbacks(self.report_to):
                make_callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(
                f"report_to takes tensorboard, trackio, wandb or none, each installed with pip: {error}"
            ) from error

    def _settle_strategies(self) -> None:
        """Evaluate and save at the same steps if the best checkpoint is to be the result.

        Raises: ValueError if it could not be: an evaluation of weights that are not kept may be the best one.
        """
        if not self.load_best_model_at_end:
            self.eval_strategy, self.save_strategy = self.eval_strategy or "no", self.save_strategy or "epoch"
            return
        if self.eval_strategy is None:
            self.eval_strategy = "epoch" if self.save_strategy in (None, "best") else self.save_strategy
        by_steps = self.eval_strategy == "steps"
        if by_steps:
            self.eval_steps = self.eval_steps or self.save_steps
        if self.save_strategy is None:
            self.save_strategy = self.eval_strategy
            if by_steps and self.save_steps == type(self).save_steps:
                self.save_steps = self.eval_steps
        together = self.eval_strategy == self.save_strategy and (not by_steps or self.eval_steps == self.save_steps)
        if self.eval_strategy == "no" or not (together or self.save_strategy == "best"):
            evaluated = f"{self.eval_strategy}{f' ({self.eval_steps})' if by_steps else ''}"
            saved = f"{self.save_strategy}{f' ({self.save_steps})' if self.save_strategy == 'steps' else ''}"
            raise ValueError(
                "load_best_model_at_end ends with the best checkpoint, so each one must be both evaluated and kept. "
                f"Found eval_strategy {evaluated} and save_strategy {saved}. Name one of the two alone, and the other "
                "follows; or add --load_best_model_at_end false, to end with the last weights."
            )

    def go_by_steps(self) -> None:
        """For a stream, which is one epoch: evaluate and save ten times in a run, if the best is to be the result."""
        if self.load_best_model_at_end and not self.strategy_was_given:
            self.eval_strategy, self.save_strategy = IntervalStrategy.STEPS, SaveStrategy.STEPS
            self.eval_steps = self.save_steps = 0.1  # of max_steps

    def _check_objects(self) -> None:
        """Raise ValueError for text in the place of an object, where no file is taken either."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str) or not (value.startswith("{") or name.endswith("_kwargs")):
                continue
            try:
                is_object = isinstance(json.loads(value), dict)
            except ValueError:
                is_object = False
            if not is_object:
                raise ValueError(f"{name} needs a JSON object like '{{\"name\": 1}}', found {value!r}.")

    def unread(self) -> dict[str, str]:
        cache = () if self.cache_image_features else ("cache_dtype", "cache_limit_gb")
        optim = str(self.optim.value)
        of_optim = ("adam_beta1", "adam_beta2", "adam_epsilon") if optim in NOT_ADAM else ()
        of_optim += ("optim_args",) if optim in ("adamw_torch", "adamw_torch_fused", "adafactor") else ()
        of_optim += () if optim.startswith(("galore", "apollo")) else ("optim_target_modules",)
        # gradient_checkpointing, the older name, is mirrored in both
        of_checkpointing = () if self.activation_checkpointing else ("activation_checkpointing_kwargs",)
        of_trackio = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
        hub = () if self.push_to_hub else ("hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision")
        by_step = {
            f"{what}_steps": f"without --{what}_strategy steps"
            for what in ("eval", "save", "logging")
            if getattr(self, f"{what}_strategy") != "steps"
        }
        return {
            **dict.fromkeys(cache, "without --cache_image_features"),
            **dict.fromkeys(hub, "without --push_to_hub"),
            **dict.fromkeys(of_checkpointing, "without --activation_checkpointing"),
            **dict.fromkeys(() if "trackio" in self.report_to else of_trackio, "without --report_to trackio"),
            **dict.fromkeys(of_optim, f"beside --optim {optim}"),
            **by_step,
            **({"eval_delay": "without --eval_strategy epoch or steps"} if self.eval_strategy == "no" else {}),
            **({} if self.resume_from_checkpoint else {"allow_changed_settings": "without --resume_from_checkpoint"}),
        }
