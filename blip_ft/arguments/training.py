"""The Trainer's settings with the defaults of BLIP."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import Seq2SeqTrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_torch_bf16_gpu_available

from blip_ft.arguments.settings import Settings

NOT_ADAM = ("adafactor", "adagrad", "rmsprop", "sgd")

_EVALUATION = "Leave it out: evaluation always generates text, in the precision of training, and scores every row."

_ORDER = "Leave it out: each epoch is shuffled by image and cut to full batches."

# settings of the Trainer that have no effect here -> what to do instead
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
    "do_predict": "Leave it out: use recipes/predict.py to predict.",
    "generation_config": "Use --generation_max_length and --generation_num_beams.",
    "use_cache": "Leave it out: generation decides.",
    "use_liger_kernel": "Leave it out: Liger has no kernels for BLIP.",
    "liger_kernel_config": "Leave it out: Liger has no kernels for BLIP.",
    "include_num_input_tokens_seen": "Leave it out: it would count pixels as tokens.",
    "enable_jit_checkpoint": "Leave it out: SIGTERM always saves a checkpoint.",
    "parallelism_config": "Leave it out: BLIP is not split across devices.",
    "label_smoothing_factor": "Use --label_smoothing, which is part of the model's loss. The Trainer does not shift "
    "BLIP's labels and would smooth the wrong tokens.",
    "logging_nan_inf_filter": "Leave it out: a loss that is not finite stops the run.",
    "remove_unused_columns": "Leave it out: it would drop image, question and answers.",
    "hub_token": "Set the environment variable HF_TOKEN instead: the flag would be pickled into training_args.bin.",
}

HELP_TEXTS = {
    "max_steps": "Optimizer steps; -1: train num_train_epochs.",
    "lr_scheduler_type": "Learning rate schedule. E.g. cosine, linear or constant.",
    "weight_decay": "Weight decay of all parameters. Biases and norms are included in BLIP, as in the paper, and "
    "excluded in BLIP-2 and InstructBLIP, as in LAVIS.",
    "gradient_accumulation_steps": "Batches per optimizer step.",
    "gradient_checkpointing": "Recompute activations to save memory. Slower.",
    "seed": "Random seed of data, initialization and dropout.",
    "use_cpu": "Use the CPU even if there is a GPU.",
    "eval_steps": "Steps between evaluations. Below 1, a share of all steps. Requires --eval_strategy steps.",
    "save_strategy": "When to save: no, epoch, steps or best. Default: as eval_strategy with load_best_model_at_end, "
    "otherwise epoch.",
    "save_steps": "Steps between checkpoints. Below 1, a share of all steps. Requires --save_strategy steps.",
    "save_total_limit": "Number of checkpoints to keep.",
    "logging_steps": "Steps between log entries. Below 1, a share of all steps.",
    "metric_for_best_model": "Metric that selects the best checkpoint. Default: the loss if it is measured, otherwise "
    "the recipe's first metric.",
    "resume_from_checkpoint": "A checkpoint-... folder, or `last`. The latter is the newest complete checkpoint of "
    "output_dir.",
    "eval_on_start": "Evaluate once before training. The results are named before_training_...",
    "report_to": "Tracker: tensorboard, trackio, wandb or none. Each is installed with pip.",
    "average_tokens_across_devices": "Divide the loss by the number of questions, or caption tokens, in the step over "
    "all processes.",
    "data_seed": "Seed of the order of rows. Default: seed. Not for --streaming.",
    "debug": "underflow_overflow: find the layer in which numbers overflow. For tracebacks of errors: --traceback.",
    "push_to_hub": "Push the result to the Hub.",
    "hub_model_id": "Repository to push to: OWNER/NAME. Default: the name of output_dir.",
    "hub_private_repo": "Make a new repository private. An existing one is not changed.",
    "bf16": "Mixed precision in bfloat16. Needs a GPU that supports it, or --use_cpu.",
    "fp16": "Mixed precision in float16. Needs a GPU; prefer bf16 if the GPU supports it.",
    "disable_tqdm": "Show no progress bars. Default: bars are shown in a terminal, and not in a log file.",
    "optim_target_modules": "Layers that GaLore or APOLLO train at low rank.",
}

# what --help shows; the Trainer's other settings are in --help-all
HELP_GROUPS = {
    "Training": (
        *("output_dir", "do_train", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "cosine_per_epoch", "warmup_steps"),
        "weight_decay",
        *("max_grad_norm", "bf16", "gradient_checkpointing", "cache_image_features", "cache_dtype", "cache_limit_gb"),
        *("dataloader_num_workers", "use_cpu", "seed", "skip_dry_run", "resume_from_checkpoint"),
        "allow_changed_settings",
    ),
    "Evaluation, checkpoints and logs": (
        *("per_device_eval_batch_size", "generation_max_length", "generation_num_beams", "eval_strategy", "eval_steps"),
        *("eval_on_start", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end"),
        *("metric_for_best_model", "early_stopping_patience", "logging_steps", "sample_steps", "report_to"),
    ),
    "Hub": ("push_to_hub", "hub_model_id", "hub_private_repo"),
}


@dataclass
class BlipTrainingArguments(Seq2SeqTrainingArguments, Settings):
    """The Trainer's arguments, with the defaults of the BLIP paper."""

    _argument_group_name = "Training"
    without_effect = WITHOUT_EFFECT
    help_texts = HELP_TEXTS
    help_groups = HELP_GROUPS
    metrics: ClassVar[tuple[str, ...]] = ()  # what the recipe measures; () is not checked

    output_dir: str | None = HfArg(
        default=None, help="Folder for results. Default: outputs/<recipe>, or the next free outputs/<recipe>-2, -3, ..."
    )
    # of questions, also for DataPipeline; each recipe sets its own
    per_device_train_batch_size: int = HfArg(default=16, help="Training rows per device and batch.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Evaluation rows per device and batch.")
    # None: the value of the model's family, in families.py
    learning_rate: float | None = HfArg(
        default=None, help="Peak learning rate. Default: 2e-5 for vqa with BLIP, otherwise 1e-5."
    )
    num_train_epochs: float | None = HfArg(
        default=None, help="Number of training epochs. Default: 10 for vqa with BLIP, 6 for retrieval, otherwise 5."
    )
    warmup_steps: float | None = HfArg(
        default=None, help="Warmup steps; below 1, a share of all steps. Default: 0 for BLIP, otherwise 0.09."
    )
    generation_max_length: int | None = HfArg(
        default=None,
        help="Maximum tokens of an answer or caption. For BLIP, the first, the last and a prompt count too. For "
        "others, only new tokens count. Default: that of the authors.",
    )
    generation_num_beams: int | None = HfArg(
        default=None, help="Beams of beam search. Default: 3 for BLIP, otherwise 5."
    )
    do_train: bool = HfArg(
        default=True,
        help="Train the model. With false, model_name_or_path is evaluated and tested, and no weights are saved.",
    )
    do_eval: bool = True
    include_num_input_tokens_seen: str = "no"  # the parser would make a bool of it, and then it is not its default
    # train_vqa.py: AdamW(lr, weight_decay=0.05) on all parameters, no clipping, cosine
    weight_decay: float = 0.05
    max_grad_norm: float = HfArg(
        default=0.0, help="Maximum gradient norm; 0: no clipping. As the paper; the summed loss has norms over 10."
    )
    lr_scheduler_type: str = "cosine"
    cosine_per_epoch: bool = HfArg(
        default=False,
        help="Cosine learning rate that is constant within an epoch, without warmup, as the original.",
    )
    logging_steps: float = 50
    logging_nan_inf_filter: bool = False  # it would hide them, and wait for the device in each step
    eval_strategy: str | None = HfArg(
        default=None,
        help="When to evaluate: no, epoch or steps. Default: as save_strategy with load_best_model_at_end, "
        "otherwise no.",
    )
    save_strategy: str | None = None  # as eval_strategy with load_best_model_at_end, otherwise epoch
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = HfArg(
        default=False,
        # as the originals: CIDEr-D for captions, mean recall for retrieval
        help="End with the best checkpoint, not the last. Each checkpoint is evaluated. On for captioning and "
        "retrieval, off for vqa, as the originals.",
    )
    early_stopping_patience: int | None = HfArg(
        default=None,
        help="Stop after this number of evaluations in a row without a better metric_for_best_model. Turns on "
        "load_best_model_at_end.",
    )
    dataloader_num_workers: int = HfArg(
        default_factory=lambda: min(4, os.cpu_count() or 1),
        help="Processes that read and resize images. By default one per core, at most 4.",
    )
    # the collators need every column, and all heads are used in each step
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    cache_image_features: bool = HfArg(
        default=False,
        help="Cache features of frozen image encoders. For vqa and captioning with --freeze vision_model: each "
        "training image is encoded once, and the result is kept on disk for this and later runs. For BLIP-2 that of a "
        "frozen Q-Former is kept. Evaluation still encodes.",
    )
    cache_dtype: Literal["bf16", "fp32"] = HfArg(
        default="bf16",
        help="Dtype of cached features. With fp32, the cache reproduces the uncached loss at twice the disk space.",
    )
    cache_limit_gb: float = HfArg(
        default=50.0,
        help="Disk space of all cached features, in GB. They are under HF_HOME. An image of 384 pixels takes 0.9 "
        "MB in bf16.",
    )
    skip_dry_run: bool = HfArg(
        default=False,
        help="Skip the dry run before training. It runs loss, evaluation, report and card on a few rows to find "
        "errors early. A resumed run has none.",
    )
    allow_changed_settings: bool = HfArg(
        default=False,
        help="Resume in spite of changed settings. Settings, data or base checkpoint may differ from the "
        "checkpoint's; differences are listed. Otherwise they are refused.",
    )
    sample_steps: int = HfArg(
        default=500, help="Steps between sample predictions in the log. With 0, there are none. Not for retrieval."
    )

    def __post_init__(self) -> None:
        self.output_dir_was_given = self.output_dir is not None
        self.strategy_was_given = bool(self.eval_strategy or self.save_strategy)
        self.load_best_model_at_end |= self.early_stopping_patience is not None
        self._settle_strategies()
        self.check_values()
        self.require_effect()
        self._check_objects()
        self._check_run()
        self._check_precision()
        self._settle_metric()
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # each update of a bar is a line of a log file
        # torch warns in each epoch if there is no device to pin memory for
        self.dataloader_pin_memory &= torch.cuda.is_available() and not self.use_cpu
        # None is the default of the model's family; the Trainer's own checks need a number
        unset = [name for name in ("learning_rate", "warmup_steps") if getattr(self, name) is None]
        for name in unset:
            setattr(self, name, 0)
        try:
            super().__post_init__()
        except (TypeError, AttributeError) as error:  # an object with unknown keys, e.g. accelerator_config
            raise ValueError(
                f"The training settings contain an unknown key or a value of the wrong type: {error}"
            ) from error
        for name in unset:
            setattr(self, name, None)
        self._check_devices()
        self._check_trackers()

    def _check_run(self) -> None:
        """Raise ValueError for settings of steps, checkpoints, workers or the Hub that do not fit together."""
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
        if self.hub_model_id:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise ValueError(f"hub_model_id must be OWNER/NAME, found {self.hub_model_id!r}. {error}") from error

    def _check_precision(self) -> None:
        needs_bf16 = self.bf16 and not self.use_cpu
        if needs_bf16 and not is_torch_bf16_gpu_available():
            raise ValueError(
                "bf16 needs a GPU that supports bfloat16, and none was found. Leave it out (--bf16 false), or add "
                "--use_cpu to compute in bfloat16 on the CPU."
            )

    @property
    def _schedule_follows_metric(self) -> bool:
        return self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")

    def _settle_metric(self) -> None:
        """Choose metric_for_best_model if something needs it. Raises: ValueError if it is not measured."""
        if self._schedule_follows_metric and self.eval_strategy == "no":
            raise ValueError(
                f"lr_scheduler_type {self.lr_scheduler_type} follows a metric. Add --eval_strategy epoch or steps."
            )
        # the Trainer's default is the loss for load_best_model_at_end and these schedules, nothing for save_strategy
        takes_loss = self.load_best_model_at_end or self._schedule_follows_metric
        without_default = self.save_strategy == "best" or (takes_loss and "loss" not in self.metrics)
        if self.metrics and without_default:
            self.metric_for_best_model = self.metric_for_best_model or self.metrics[0]
        best = self.metric_for_best_model
        # names may be longer: with an answer type or a k
        if self.metrics and best and not best.removeprefix("eval_").startswith(self.metrics):
            raise ValueError(
                f"metric_for_best_model must be one of {', '.join(self.metrics)}; found {self.metric_for_best_model}."
            )

    def _check_devices(self) -> None:
        """Checks that need the Trainer's own __post_init__: it finds the device and makes objects of dicts."""
        if self.torch_compile_mode:
            modes = torch._inductor.list_mode_options()
            if self.torch_compile_mode not in modes:
                raise ValueError(
                    f"torch_compile_mode must be one of {', '.join(sorted(modes))}; found {self.torch_compile_mode!r}."
                )
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU, and this run is on the CPU. Leave it out, or use --bf16 --use_cpu.")
        if self._schedule_follows_metric and self.greater_is_better:
            # torch's default, min, would lower the learning rate while the score rises
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches:
            raise ValueError(
                "split_batches and dispatch_batches of accelerator_config split a batch by rows, which would separate "
                "images from their questions. Leave them out: each process makes batches of its own."
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"Found {self.n_gpu} GPUs but one process. Start with `accelerate launch --multi_gpu` or `torchrun "
                "--nproc_per_node`, or hide the other GPUs with CUDA_VISIBLE_DEVICES=0."
            )

    def _check_trackers(self) -> None:
        """Raise ValueError now for a tracker that is not installed: the Trainer would fail after loading the model."""
        try:
            for make_callback in get_reporting_integration_callbacks(self.report_to):
                make_callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(
                f"report_to must be tensorboard, trackio, wandb (each installed with pip) or none: {error}"
            ) from error

    def _settle_strategies(self) -> None:
        """Evaluate and save at the same steps if load_best_model_at_end is on.

        Raises: ValueError if that is impossible: the best evaluation could be of weights that were not saved.
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
            stops = self.early_stopping_patience is not None
            raise ValueError(
                f"{'early_stopping_patience' if stops else 'load_best_model_at_end'} needs checkpoints that are both "
                f"evaluated and saved. Found eval_strategy {evaluated} and save_strategy {saved}. Set only one of the "
                f"two, and the other follows; or {'leave out --early_stopping_patience and ' if stops else ''}add "
                "--load_best_model_at_end false to end with the last weights."
            )

    @property
    def order_seed(self) -> int:
        """Seed of the order of rows and of the views of their images."""
        return self.seed if self.data_seed is None else self.data_seed

    def go_by_steps(self) -> None:
        """For a stream, which is one epoch: evaluate and save ten times if load_best_model_at_end is on."""
        if self.load_best_model_at_end and not self.strategy_was_given:
            self.eval_strategy, self.save_strategy = IntervalStrategy.STEPS, SaveStrategy.STEPS
            self.eval_steps = self.save_steps = 0.1  # of max_steps

    def _check_objects(self) -> None:
        """Raise ValueError for a value that should be a JSON object and is not; some settings also take a file."""
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
        # its newer name, activation_checkpointing, does not exist in transformers 5.17; the Trainer sets both
        of_checkpointing = () if self.gradient_checkpointing else ("activation_checkpointing_kwargs",)
        of_trackio = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
        of_schedule = ("lr_scheduler_type", "lr_scheduler_kwargs") if self.cosine_per_epoch else ()
        of_schedule += ("warmup_steps",) if self.cosine_per_epoch and self.warmup_steps else ()
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
            **dict.fromkeys(of_schedule, "beside --cosine_per_epoch"),
            **dict.fromkeys(of_optim, f"beside --optim {optim}"),
            **by_step,
            **({"eval_delay": "without --eval_strategy epoch or steps"} if self.eval_strategy == "no" else {}),
            **({} if self.resume_from_checkpoint else {"allow_changed_settings": "without --resume_from_checkpoint"}),
        }
