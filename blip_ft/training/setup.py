"""Refuse what cannot be trained before weights load, then load the model."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin, Trainer, get_scheduler, set_seed
from transformers.integrations import unset_hf_deepspeed_config

from blip_ft.arguments import (
    BlipTrainingArguments,
    CaptioningArguments,
    DataArguments,
    ModelArguments,
    PeftArguments,
    Settings,
    VqaArguments,
)
from blip_ft.arguments.families import RECIPES, Family, family_of, fill_defaults, frozen_parts
from blip_ft.data.sampling import require_whole_batch
from blip_ft.data.streaming import StreamedRows
from blip_ft.data.tables import CaptionRows
from blip_ft.data.text_formats import Texts, texts_of_checkpoint
from blip_ft.modeling.adapters import (
    add_lora,
    count_parameters,
    freeze_model,
    part_names,
    unknown_layers,
    without_adapter,
)
from blip_ft.modeling.checkpoint_files import ADAPTER_FILE, longest_text, require_positions
from blip_ft.modeling.placement import train_in_float32
from blip_ft.models import ModelLoader, load_model
from blip_ft.results.files import claim, decided_by_main, is_free, names_in, numbered_folders, require_claim
from blip_ft.training.checkpoints import newest_checkpoint, require_readable_state, what_is_missing
from blip_ft.training.engines import check_engine, check_saved_engine, check_untied_head
from blip_ft.training.feature_cache import require_constant_features
from blip_ft.training.run_settings import settle_settings

logger = logging.getLogger(__name__)


@dataclass
class RunSetup:
    """The arguments of a run, and what is known before its rows are read and its weights are loaded.

    Args:
        task: a key of RECIPES.
        task_args: the arguments of the recipe's own, e.g. VqaArguments.
        checkpoint: folder to resume from; None starts from the beginning.
        meta_model: the model that load_for_training returns, without weights, on the meta device.
        processor: as load_for_training returns it.
        family: of the model; it has filled the settings that were None.
        texts: how it reads and writes texts; None in retrieval.
    """

    task: str
    model_args: ModelArguments
    data_args: DataArguments
    task_args: Settings
    peft_args: PeftArguments
    training_args: BlipTrainingArguments
    checkpoint: str | None
    meta_model: PreTrainedModel | PeftModel
    processor: ProcessorMixin
    family: Family
    texts: Texts | None

    @property
    def bad_rows_file(self) -> Path:
        return Path(self.training_args.output_dir) / "bad_rows.jsonl"

    @property
    def other_args(self) -> tuple[Settings, ...]:
        """All arguments but the training arguments."""
        return self.model_args, self.data_args, self.task_args, self.peft_args


def prepare_run(
    task: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    task_args: Settings,
    peft_args: PeftArguments,
    training_args: BlipTrainingArguments,
) -> RunSetup:
    """Choose the output folder and the checkpoint to resume from, and check the arguments against the model's config.

    Raises: ValueError for all that can be refused without the rows and the weights.
    """
    data_args.check_streaming(training_args)
    checkpoint = prepare_output_dir(training_args, RECIPES[task], peft_args)
    # Under ZeRO-3 transformers would shard weights while building a language model or loading: with a config whose
    # batch sizes are not filled in yet, and before the changes of load_for_training, which need unsharded weights.
    # DeepSpeed shards when training begins.
    unset_hf_deepspeed_config()
    meta_model, processor = build_meta_model(task, model_args, peft_args, task_args, training_args)
    config = without_adapter(meta_model).config
    family = family_of(config)
    _require_support(family, task_args, training_args)
    return RunSetup(
        *(task, model_args, data_args, task_args, peft_args, training_args, checkpoint, meta_model, processor, family),
        _texts_of(processor, config, task_args, training_args),
    )


def _require_support(family: Family, task_args: Settings, args: BlipTrainingArguments) -> None:
    """Raises: ValueError for settings that only BLIP has, and for precision and engines that T5 does not support."""
    if not family.reads_prompts:
        return
    if isinstance(task_args, VqaArguments):
        if task_args.answer_mode == "rank":
            raise ValueError(
                f"answer_mode rank is for BLIP. {family.name} generates its answers: leave out answer_mode and "
                "answer_list."
            )
        if task_args.question_start_token != "cls":
            raise ValueError(f"question_start_token is for BLIP. {family.name} has no such token; leave it out.")
    if args.fp16 and family.language_model == "t5":
        raise ValueError("T5 overflows in float16. Use --bf16 instead of --fp16.")
    if family.language_model == "t5":
        check_untied_head(args)


def _texts_of(
    processor: ProcessorMixin, config: PreTrainedConfig, task_args: Settings, args: BlipTrainingArguments
) -> Texts | None:
    """How the run reads and writes texts. Its prompt and clean_questions are written into task_args.

    Without a given value they are those of the checkpoint's training, or the family's prompt and False.

    Raises: ValueError if the lengths leave no room for a question or a caption.
    """
    if isinstance(task_args, VqaArguments):
        given = (task_args.question_prompt, task_args.clean_questions)
        texts = texts_of_checkpoint(processor, config, "vqa", *given)
        lengths = (task_args.max_question_tokens, task_args.max_answer_tokens, args.generation_max_length)
        texts.require_room_for_questions(*lengths)
        task_args.question_prompt, task_args.clean_questions = texts.prompt, texts.clean_questions
        return texts
    if isinstance(task_args, CaptioningArguments):
        texts = texts_of_checkpoint(processor, config, "conditional_generation", task_args.prompt)
        lengths = (task_args.max_caption_tokens, args.generation_max_length, task_args.generation_min_length)
        texts.require_room_for_captions(*lengths)
        task_args.prompt = texts.prompt
        return texts
    return None


def build_meta_model(
    task: str, model_args: ModelArguments, peft_args: PeftArguments, *with_lengths: Any
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """The model that load_for_training returns, without weights, on the meta device; and the processor.

    Settings that are None become the defaults of the model's family.

    with_lengths: arguments whose text lengths must fit the model, see require_positions.
    Raises: ValueError for arguments that do not work with this checkpoint.
    """
    name = model_args.model_name_or_path
    needed = "use_peft needs a checkpoint that can be loaded again under the adapter"
    if peft_args.use_peft and name == "demo":
        raise ValueError(f"{needed}; the weights of the demo model are new in each run.")
    if peft_args.use_peft and model_args.allow_new_weights:
        raise ValueError(
            "An adapter is saved without the weights of its base, so new weights would be lost. Use allow_new_weights "
            "or use_peft, not both."
        )
    loader = ModelLoader(
        name,
        task=task,
        device="cpu",
        image_size=model_args.image_size,
        label_smoothing=model_args.label_smoothing,
        dropout=model_args.dropout,
        drop_path=model_args.drop_path,
        revision=model_args.model_revision,
        allow_pickle=model_args.allow_pickle,
    )
    model, config, base = loader._prepare()
    if base and peft_args.use_peft:
        raise ValueError(
            f'{needed}; {name} is an adapter itself. Merge it first: load_model("{name}", merge=True), then '
            "save_model(...)."
        )
    family = family_of(config)
    fill_defaults(family, task, longest_text(config), model_args, *with_lengths)
    require_positions(config, *with_lengths)
    if peft_args.use_peft:
        with torch.device("meta"):
            model = add_lora(model, peft_args)
    _freeze(model, frozen_parts(family, model_args.freeze, peft_args.use_peft))
    return model, loader.get_processor()


def _freeze(model: PreTrainedModel | PeftModel, names: list[str]) -> None:
    """Freeze the named parts. Raises: ValueError for a name that freezes nothing, and if nothing is left to train."""
    if unknown := unknown_layers(model, names):
        raise ValueError(
            f"freeze takes names of parts of the model. There is no part {', '.join(unknown)}. There are "
            f"{', '.join(part_names(model))}, and their parts, e.g. vision_model.encoder.layers.0"
        )
    if idle := unknown_layers(model, names, trainable_only=True):
        raise ValueError(
            f"freeze names {', '.join(idle)}, where nothing is trained anyway: with use_peft only the adapter is. "
            "Remove it from freeze."
        )
    if names:
        freeze_model(model, names)
    if not count_parameters(model)["trainable"]:
        raise ValueError("Everything is frozen, so nothing would be trained. Remove something from freeze.")


def load_for_training(
    setup: RunSetup, train_rows: Dataset | CaptionRows | StreamedRows, eval_rows: Dataset
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin, dict[str, Any]]:
    """Check the setup against the rows, then load the model: resized, quantized, with an adapter, frozen.

    Returns: model, processor, and the settings to save in each checkpoint, see settle_settings.
    Raises: ValueError, before weights are loaded, for rows that cannot be trained on, and if the checkpoint to resume
        from was saved with other settings or data.
    """
    model_args, peft_args, args = setup.model_args, setup.peft_args, setup.training_args
    _check_training(setup, train_rows)
    run_settings = settle_settings(
        setup.checkpoint, args, setup.other_args, {"train": train_rows, "eval": eval_rows}, setup.meta_model
    )
    # The Trainer seeds later, when random weights (adapter, demo model, missing head) are already there.
    set_seed(args.seed)
    # BLIP-2 and InstructBLIP are mostly frozen: that part needs no float32. What is trained must not be rounded first
    half = torch.bfloat16 if args.bf16 and setup.family.reads_prompts else None
    loaded = load_model(
        model_args.model_name_or_path,
        task=setup.task,
        device="cpu" if half and not peft_args.use_peft else args.device,
        dtype=half if peft_args.use_peft else None,
        load_in_8bit=peft_args.load_in_8bit,
        load_in_4bit=peft_args.load_in_4bit,
        image_size=model_args.image_size,
        label_smoothing=model_args.label_smoothing,
        dropout=model_args.dropout,
        drop_path=model_args.drop_path,
        revision=model_args.model_revision,
        allow_pickle=model_args.allow_pickle,
        allow_new_weights=model_args.allow_new_weights,
        merge=not peft_args.use_peft,  # an adapter given as the start becomes part of the weights
    )
    model = loaded["model"]
    if peft_args.use_peft:
        model = add_lora(model, peft_args, model_args.model_revision)
    if frozen := frozen_parts(setup.family, model_args.freeze, peft_args.use_peft):
        freeze_model(model, frozen)
    if half:
        train_in_float32(model, half)
        model = model if peft_args.use_peft else model.to(args.device)
    if setup.texts:
        _write_texts(without_adapter(model), setup.texts)
    counts = count_parameters(model)
    logger.info(
        "%s: %.1f M parameters, %.1f M of them trained",
        type(loaded["model"]).__name__,
        *(counts["total_millions"], counts["trainable_millions"]),
    )
    return model, loaded["processor"], run_settings


def _write_texts(model: PreTrainedModel, texts: Texts) -> None:
    """Write prompt and clean_questions into the config, and for stock transformers the token that ends an answer."""
    model.config.prompt = texts.prompt
    # False is written over the True of the weights it starts from, which an adapter's base still has
    if texts.clean_questions != getattr(model.config, "clean_questions", False):
        model.config.clean_questions = texts.clean_questions
    if texts.family.reads_prompts:
        end, eos = texts.end_token_id, texts.tokenizer.eos_token_id
        # the Trainer would replace OPT's end token by that of its tokenizer, which ends no answer, but keeps a list
        for config in (model.config.text_config, model.generation_config):
            config.eos_token_id = end if end == eos else [end, eos]


def prepare_output_dir(args: BlipTrainingArguments, recipe: str, peft_args: PeftArguments) -> str | None:
    """Choose args.output_dir before anything is written, and return the checkpoint to resume from, if any.

    If output_dir is not given, it is outputs/<recipe>, or the next free one of outputs/<recipe>-2, -3, ...; with
    `--resume_from_checkpoint last` the newest one that exists. If it is given and not empty, it is refused, unless the
    run resumes. The folder is locked until the run ends: a given folder that another run has locked is refused.
    """
    check_engine(args, recipe, is_quantized=peft_args.load_in_8bit or peft_args.load_in_4bit)
    resume = args.resume_from_checkpoint
    given = args.output_dir if args.output_dir_was_given else None
    args.output_dir = decided_by_main(lambda: _choose_output_dir(given, recipe, resume))
    if not resume:
        return None
    checkpoint = decided_by_main(lambda: _choose_checkpoint(Path(args.output_dir), resume, peft_args, args))
    if checkpoint is None:
        logger.warning("There is no complete checkpoint in %s: starting from the beginning.", args.output_dir)
        return None
    problem = what_is_missing(checkpoint)
    # each machine may have an output_dir on a disk of its own
    problems = gather_object([f"{socket.gethostname()}: {problem}"] if problem else [])
    if problems:
        raise ValueError(
            f"{checkpoint} must be complete on each machine. Found: {', '.join(dict.fromkeys(problems))}. Copy it "
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
                "`last` for the newest complete one in output_dir."
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
    is_adapter = (checkpoint / ADAPTER_FILE).exists()
    if is_adapter != args.use_peft:
        kind, flag = ("an adapter", "Add") if is_adapter else ("a full model", "Leave out")
        raise ValueError(f"{checkpoint} contains {kind}. {flag} --use_peft, or start a new run in another output_dir.")


def _check_training(setup: RunSetup, rows: Dataset | CaptionRows | StreamedRows) -> None:
    """Raises: ValueError if the run trains, and these rows or this model cannot be trained as the arguments say."""
    args = setup.training_args
    if not args.do_train:
        return
    if args.cache_image_features:
        require_constant_features(without_adapter(setup.meta_model))
    _require_optimizer(args, setup.meta_model)
    if not isinstance(rows, StreamedRows):
        require_whole_batch(len(rows), args.train_batch_size * args.world_size * args.gradient_accumulation_steps)


def _require_optimizer(args: BlipTrainingArguments, meta_model: torch.nn.Module) -> None:
    """Create optimizer and scheduler for one weight, as the Trainer does later for all weights."""
    try:
        make, settings = Trainer.get_optimizer_cls_and_kwargs(args, meta_model)
        for name in ("params", "model", "optimizer_dict"):  # some have these for the Trainer, not for the optimizer
            settings.pop(name, None)
        optimizer = make([torch.nn.Parameter(torch.zeros(1))], **settings)
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Cannot create an optimizer and a scheduler from --optim {args.optim.value}, --optim_args, --adam_..., "
            f"--lr_scheduler_type {args.lr_scheduler_type.value} and --lr_scheduler_kwargs: {error}"
        ) from error


def _choose_output_dir(given: str | None, recipe: str, resume: str | None) -> str:
    if given is not None:
        there = next(path for path in (Path(given), *Path(given).absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(
                f"output_dir {given} cannot be created: {there} is not a folder with write permission. Choose another."
            )
        require_claim(Path(given))
        # a run that stopped because of bad rows leaves only this list
        if names_in(Path(given)) - {"bad_rows.jsonl"} and not resume:
            raise ValueError(
                f"output_dir {given} is not empty. Choose another, remove it, or resume the run in it: "
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
        elif claim(folder) and is_free(folder):  # checked again, now that no other program can write there
            return str(folder)
