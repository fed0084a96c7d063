"""Settings that cannot work, or have no effect, are refused with the way out."""

import ast
import dataclasses
from pathlib import Path

import pytest
import transformers
from conftest import RECIPES
from test_cli import ALL, parsed, recipe_classes

from blip_ft.arguments import (
    BlipTrainingArguments,
    CaptioningArguments,
    DataArguments,
    PeftArguments,
    RetrievalArguments,
    changed_settings,
)
from blip_ft.cli import parse
from blip_ft.training.hub import PushingTrainer
from blip_ft.training.optimization import OptimizingTrainer
from blip_ft.training.trainer import BlipTrainer


@pytest.mark.parametrize(
    ("arguments", "flags", "message"),
    [
        (CaptioningArguments, ["--repetition_penalty", "0"], "repetition_penalty must be above 0, found 0.0"),
        (RetrievalArguments, ["--queue_size", "-1"], "queue_size must be at least 0, found -1"),
        (RetrievalArguments, ["--momentum", "1.5"], "momentum must be between 0 and 1"),
    ],
)
def test_settings_of_a_task_that_cannot_work_are_refused(arguments, flags, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments, argv=flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hub_token", "x"], "HF_TOKEN"),
        (["--remove_unused_columns", "true"], "would drop image"),
        (["--accelerator_config", '{"split_batches": true}'], "each process makes batches of its own"),
        (["--questions_file", "q.json"], "come in pairs"),
        (["--questions_file", "q", "--annotations_file", "a"], "requires image_folder"),
        (["--eval_fraction", "1.5"], "between 0 and 1"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, found 0"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1"),
        (["--max_eval_samples", "0"], "max_eval_samples must be at least 1"),
        (["--label_smoothing", "nan"], "label_smoothing must be between 0 and 1, found nan"),
        (["--dropout", "-0.1"], "dropout must be between 0 and 1"),
        (["--lora_r", "0"], "lora_r must be between 1 and 1024"),
        (["--max_answer_tokens", "2"], "max_answer_tokens must be between 3 and 512"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, "", *flags)


def names_read(path: Path, leave_out=frozenset()) -> set[str]:
    """Names after a dot, and words in lists of names, of all functions but those left out."""
    read = set()

    def visit(node):
        if isinstance(node, ast.FunctionDef) and node.name in leave_out:
            return
        if isinstance(node, ast.Attribute):
            read.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            read.add(node.value)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return read


def names_read_by(name: str) -> set[str]:
    """By a recipe, by the package, and by those functions of the Trainer that a run goes through."""
    own = RECIPES.parent / "blip_ft"
    package = [path for path in own.rglob("*.py") if path.parent.name != "arguments" and path.stem != "cli"]
    read = set().union(*map(names_read, [RECIPES / f"{name}.py", *package]))
    if name in ("predict", "bootstrap"):
        return read
    overrides = vars(BlipTrainer).keys() | vars(OptimizingTrainer).keys() | vars(PushingTrainer).keys()
    of_trainer = {name for name in overrides if callable(getattr(BlipTrainer, name))}
    # those call the Trainer's own
    of_trainer -= {
        "__init__",
        "get_train_dataloader",
        "train",
        "compute_loss",
        "log",
        "create_optimizer",
        "create_scheduler",
        "_run_epoch",
        "_save_checkpoint",
    }
    of_trainer -= {
        "_save_optimizer_and_scheduler",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "init_hf_repo",
    }
    of_trainer -= {"_get_output_dir", "_push_from_checkpoint", "_finish_current_push"}
    never = {"prediction_step", "_get_eval_sampler", "predict", "hyperparameter_search", "get_test_dataloader"}
    folder = Path(transformers.__file__).parent
    read |= names_read(folder / "trainer.py", of_trainer | never)
    setters = {name for name in vars(transformers.TrainingArguments) if name.startswith("set_")}
    read |= names_read(folder / "training_args.py", setters)
    more = ("trainer_callback", "trainer_utils", "trainer_optimizer", "integrations/integration_utils")
    return read.union(*(names_read(folder / f"{module}.py") for module in more))


# answer_list says as much, and arguments.py sees to it that they agree
CHECKED_ALONE = {"answer_mode"}


@pytest.mark.parametrize("name", ["vqa", "captioning", "retrieval", "predict", "bootstrap"])
def test_every_setting_is_read_or_refused(name):
    """A setting that a later version of transformers brings is met here too."""
    read = names_read_by(name)
    for part in recipe_classes(name):
        names = {entry.name for entry in dataclasses.fields(part)}
        assert set(part.without_effect) <= names
        unread = names - read - set(part.without_effect) - CHECKED_ALONE
        assert not unread, unread


NO_WORDS = {
    **dict.fromkeys(("eval_accumulation_steps", "generation_max_length", "generation_num_beams"), "7"),
    **{"check_images": "header", "train_sampling_strategy": "sequential"},
    **dict.fromkeys(("max_train_samples", "group_questions", "label_smoothing"), "1"),
}


@pytest.mark.parametrize("name", ["vqa", "retrieval", "predict"])
def test_each_setting_without_effect_is_refused_and_not_in_help(name, tmp_path, capsys):
    classes = recipe_classes(name)
    with pytest.raises(SystemExit):
        parse(*classes, argv=["--help"])
    shown = capsys.readouterr().out.split()
    needed = ["--model_name_or_path", "x", "--dataset_name", "x", "--eval_split", "test"]
    hidden = {setting: part for part in classes for setting in part.without_effect}
    assert hidden
    for setting, part in hidden.items():
        if setting in ("parallelism_config", "liger_kernel_config"):  # no text makes one
            continue
        default = part.__dataclass_fields__[setting].default
        by_type = {bool: str(not default).lower(), int: "7", float: "0.7"}
        value = NO_WORDS.get(setting, by_type.get(type(default), "x"))
        with pytest.raises(ValueError, match=f"{setting} has no effect here|{setting} requires"):
            parse(*classes, argv=[*needed, f"--{setting}", value])
        assert f"--{setting}" not in shown and f"--{setting}," not in shown


BESIDE = [
    (["--lora_r", "4"], "lora_r 4 has no effect without --use_peft"),
    (["--lora_target_modules", "query"], "without --use_peft"),
    (["--model_revision", "v2", "--model_name_or_path", "demo"], "without a checkpoint of the Hub"),
    (["--dataset_config", "small", "--dataset_name", "{folder}"], "dataset_config small has no effect without a data"),
    (["--dataset_config", "small", "--dataset_name", "demo"], "without a data set of the Hub"),
    (["--shuffle_buffer", "9", "--dataset_name", "demo"], "without --streaming"),
    (["--eval_fraction", "0.2", "--eval_split", "test"], "beside other data to evaluate on"),
    (["--eval_questions_file", "q.json", "--eval_annotations_file", "a.json"], "requires questions_file"),
    (["--k_test", "9"], "k_test 9 has no effect without --answer_mode rank"),
    (["--cache_dtype", "fp32"], "without --cache_image_features"),
    (["--eval_steps", "5"], "without --eval_strategy steps"),
    (["--save_steps", "5"], "without --save_strategy steps"),
    (["--hub_private_repo", "true"], "without --push_to_hub"),
    (["--adam_beta1", "0.8", "--optim", "sgd"], "beside --optim sgd"),
    (["--activation_checkpointing_kwargs", "{{}}"], "without --activation_checkpointing"),
    (["--gradient_checkpointing_kwargs", "{{}}"], "without --activation_checkpointing"),
    (["--trackio_space_id", "a/b"], "without --report_to trackio"),
    (["--optim_args", "rank=4"], "beside --optim adamw_torch_fused"),
    (["--optim_target_modules", "query"], "beside --optim adamw_torch_fused"),
    (["--allow_changed_settings"], "without --resume_from_checkpoint"),
]


@pytest.mark.parametrize(("flags", "message"), BESIDE)
def test_setting_that_another_leaves_unread_is_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, "", *(flag.format(folder=tmp_path) for flag in flags))


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("vqa", ["--caption_column", "text"], "caption_column has no effect here.*Use --answer_column"),
        ("captioning", ["--question_column", "q"], "question_column has no effect here.*Use --caption_column"),
        ("retrieval", ["--answer_column", "a"], "answer_column has no effect here.*Use --caption_column"),
        ("predict", ["--allow_image_overlap"], "allow_image_overlap has no effect here.*nothing is trained"),
        ("predict", ["--model_revision", "v2"], "model_revision v2 has no effect without a checkpoint of the Hub"),
    ],
)
def test_setting_that_this_program_does_not_read_is_refused(tmp_path, name, flags, message):
    local = ["--model_name_or_path", str(tmp_path), "--dataset_name", str(tmp_path)]
    with pytest.raises(ValueError, match=message):
        parse(*recipe_classes(name), argv=[*local, *flags])


def test_dataset_config_is_for_a_data_set_of_the_hub_even_to_evaluate_on(tmp_path):
    parsed(tmp_path, "", "--dataset_config", "small", "--dataset_name", "owner/data")
    data = parsed(
        *(tmp_path, "", "--dataset_config", "small", "--dataset_name", str(tmp_path)),
        *("--eval_dataset_name", "owner/data"),
    )[1]
    dataclasses.replace(data, dataset_name="owner/data", eval_dataset_name=None)


@pytest.mark.parametrize(
    "flags",
    [
        ["--data_seed", "3"],
        ["--dataloader_prefetch_factor", "4"],
        ["--dataloader_multiprocessing_context", "spawn"],
        ["--no_dataloader_in_order"],
        ["--ignore_data_skip"],
    ],
)
def test_settings_that_a_stream_does_not_read_are_refused(tmp_path, flags):
    stream = ["--streaming", "--max_steps", "5", "--eval_split", "test", "--dataloader_num_workers", "2"]
    _, data, _, _, training = parsed(tmp_path, "", "--dataset_name", "x", *stream, *flags)
    with pytest.raises(ValueError, match=f"{flags[0][2:].removeprefix('no_')} has no effect with --streaming"):
        data.check_streaming(training)


LORA = sorted((RECIPES / "configs").glob("*lora.yaml"))
FLOATS = [
    (part, entry.name)
    for part in (*ALL, CaptioningArguments, RetrievalArguments)
    for entry in dataclasses.fields(part)
    if "float" in str(entry.type)
]


@pytest.mark.parametrize(("part", "name"), FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_is_nan_or_infinite(part, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*, found {value}|{name} has no effect"):
        parse(part, argv=[f"--{name}={value}"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_dropout", "1"], "lora_dropout must be between 0 and 1, 1 excluded, found 1.0"),
        (["--dropout", "1"], "1 excluded"),
        (["--lora_alpha", "0"], "lora_alpha must be at least 1, found 0"),
        (["--use_peft", "--lora_r", "100000"], "lora_r must be between 1 and 1024, found 100000"),
        (["--adam_epsilon", "0"], "adam_epsilon must be at least 1e-20, found 0"),
        (["--save_total_limit", "-1"], "save_total_limit must be at least 1, found -1"),
        (["--eval_steps", "0", "--eval_strategy", "steps"], "eval_steps must be at least 1e-06, found 0"),
        (["--lr_scheduler_kwargs", "min_lr=1"], "lr_scheduler_kwargs needs a JSON object like .*found 'min_lr=1'"),
        (["--accelerator_config", '{"x": 1}'], "an unknown key.*unexpected keyword argument 'x'"),
        (["--accelerator_config", "{x"], "accelerator_config needs a JSON object"),
        (["--max_steps", "0"], "max_steps must be at least 1, or -1 to train num_train_epochs; found 0"),
        (["--warmup_steps", "nan"], "warmup_steps must be at least 0, found nan"),
        (["--bf16", "--use_cpu", "false"], "bf16 needs a GPU that supports bfloat16.*add --use_cpu"),
        (["--fp16"], "fp16 needs a GPU"),
        (["--torch_compile_mode", "x"], "torch_compile_mode must be one of default, .*found 'x'"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "reduce_lr_on_plateau follows a metric. Add --eval_strategy"),
    ],
)
def test_values_that_train_nothing_or_cannot_be_are_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, "", *flags)


@pytest.mark.parametrize(("name", "metric", "mode"), [("vqa", "loss", None), ("retrieval", "recall_mean", "max")])
def test_scheduler_that_follows_a_metric_follows_one_that_is_measured(tmp_path, name, metric, mode):
    follows = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch", "--use_cpu"]
    args = parse(*recipe_classes(name), argv=[*follows, "--output_dir", str(tmp_path / "run")])[-1]
    assert args.metric_for_best_model == metric and (args.lr_scheduler_kwargs or {}).get("mode") == mode


def test_adapters_are_trained_at_the_rate_of_the_readme():
    rates = {yaml.name: parse(*ALL, argv=["--config", str(yaml), "--use_cpu"])[-1].learning_rate for yaml in LORA}
    assert set(rates.values()) == {1e-4} and len(rates) >= 3
    assert "--use_peft --learning_rate 1e-4" in (RECIPES.parent / "README.md").read_text()


def test_settings_that_were_changed_are_those_that_differ_from_their_default():
    assert changed_settings(PeftArguments(use_peft=True, lora_r=16)) == {"use_peft": True}


BEST = ["--load_best_model_at_end", "--use_cpu", "--output_dir", "x"]


@pytest.mark.parametrize(
    ("flags", "evaluated", "saved"),
    [
        ([], ("epoch", None), ("epoch", 500)),
        (["--save_strategy", "steps"], ("steps", 500), ("steps", 500)),
        (["--save_strategy", "steps", "--save_steps", "7"], ("steps", 7), ("steps", 7)),
        (["--eval_strategy", "steps", "--eval_steps", "3"], ("steps", 3), ("steps", 3)),
        (["--eval_strategy", "steps"], ("steps", 500), ("steps", 500)),
        (["--eval_strategy", "epoch"], ("epoch", None), ("epoch", 500)),
        (["--save_strategy", "best"], ("epoch", None), ("best", 500)),
        (["--save_strategy", "best", "--eval_strategy", "steps", "--eval_steps", "3"], ("steps", 3), ("best", 500)),
        (["--load_best_model_at_end", "false"], ("no", None), ("epoch", 500)),
        (["--load_best_model_at_end", "false", "--save_strategy", "no"], ("no", None), ("no", 500)),
    ],
)
def test_evaluations_and_checkpoints_come_together_if_the_best_is_kept(flags, evaluated, saved):
    args = parse(BlipTrainingArguments, argv=[*BEST, *flags])[0]
    assert ((args.eval_strategy, args.eval_steps), (args.save_strategy, args.save_steps)) == (evaluated, saved)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--save_strategy", "no"], "eval_strategy no and save_strategy no"),
        (["--eval_strategy", "no"], "eval_strategy no and save_strategy no"),
        (
            ["--eval_strategy", "steps", "--save_strategy", "epoch"],
            r"eval_strategy steps \(500\) and save_strategy epoch",
        ),
        # the checkpoint of an evaluation at step 3 would never be there
        (
            ["--eval_strategy", "steps", "--eval_steps", "3", "--save_strategy", "steps", "--save_steps", "6"],
            r"eval_strategy steps \(3.0\) and save_strategy steps \(6.0\)",
        ),
    ],
)
def test_best_checkpoint_that_would_not_be_kept_is_refused(flags, found):
    with pytest.raises(ValueError, match=f"{found}. Set only one of the two.*--load_best_model_at_end false"):
        parse(BlipTrainingArguments, argv=[*BEST, *flags])


@pytest.mark.parametrize(("name", "metric"), [("captioning", "cider"), ("retrieval", "recall_mean"), ("vqa", None)])
def test_best_checkpoint_is_the_default_of_captions_and_retrieval(name, metric):
    args = parse(*recipe_classes(name), argv=["--use_cpu", "--output_dir", "x"])[-1]
    assert (args.load_best_model_at_end, args.metric_for_best_model) == (metric is not None, metric)


def test_test_rows_of_vqa_v2_files_are_refused_with_what_to_do_instead():
    files = {"questions_file": "q.json", "annotations_file": "a.json", "image_folder": "."}
    with pytest.raises(ValueError, match="require dataset_name.*--do_train false --eval_questions_file"):
        DataArguments(**files, test_split="test")
