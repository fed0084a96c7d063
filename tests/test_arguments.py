"""A YAML first, the command line over it, and errors that name the way out."""

from dataclasses import dataclass

import pytest

from blip_ft.arguments import (
    BlipTrainingArguments,
    CaptioningArguments,
    DataArguments,
    ModelArguments,
    PeftArguments,
    RetrievalArguments,
    VqaArguments,
    parse,
)

ALL = (ModelArguments, DataArguments, VqaArguments, PeftArguments, BlipTrainingArguments)


def parsed(tmp_path, yaml="", *flags):
    (tmp_path / "run.yaml").write_text(yaml)
    base = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    return parse(*ALL, argv=[*base, *flags])


def test_command_line_overrides_yaml_and_yaml_overrides_defaults(tmp_path):
    model, data, _, _, training = parsed(tmp_path, "image_size: 96\ntrain_split: dev\nseed: 3\n", "--image_size", "64")
    assert (model.image_size, data.train_split, training.seed, training.weight_decay) == (64, "dev", 3, 0.05)


def test_yaml_scalars_get_the_type_of_their_field(tmp_path):
    yaml = "learning_rate: 1e-4\neval_strategy: no\nbf16: false\nuse_peft: true\nlora_target_modules: [query, value]\n"
    _, _, _, peft, training = parsed(tmp_path, yaml + "lr_scheduler_kwargs: {min_lr: 1e-6}\nimage_size: null\n")
    assert training.learning_rate == 1e-4 and training.eval_strategy == "no" and training.bf16 is False
    assert peft.use_peft is True and peft.lora_target_modules == ["query", "value"]


def test_unknown_yaml_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"run\.yaml has the unknown key 'learning_rte'. Did you mean learning_rate\?"):
        parsed(tmp_path, "learning_rte: 1e-4\n")


def test_abbreviated_flag_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Did you mean learning_rate"):
        parsed(tmp_path, "", "--learning_rat", "1e-4")


@pytest.mark.parametrize(
    ("yaml", "line", "key"),
    [
        ("seed: 1\nbf16: false\nseed: 2\n", 3, "seed"),
        ("learning_rate: 1e-4\nlearning-rate: 1e-5\n", 2, "learning_rate"),
        ("lr_scheduler_kwargs:\n  min_lr: 1\n  min_lr: 2\n", 3, "min_lr"),
    ],
)
def test_key_that_stands_twice_in_a_yaml_is_refused_with_its_line(tmp_path, yaml, line, key):
    with pytest.raises(ValueError, match=rf"run\.yaml is not valid YAML in line {line}: the key '{key}' stands twice"):
        parsed(tmp_path, yaml)


def test_broken_yaml_and_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not valid YAML"):
        parsed(tmp_path, "a: [1\n")
    with pytest.raises(ValueError, match="needs a YAML file that can be read; /no/such.yaml"):
        parse(*ALL, argv=["--config", "/no/such.yaml"])
    with pytest.raises(ValueError, match="must hold `key: value` lines"):
        parsed(tmp_path, "- a\n")


def test_value_of_the_wrong_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--image_size"):
        parsed(tmp_path, "image_size: large\n")


def test_values_within_a_yaml_dict_have_their_types(tmp_path):
    text = "lr_scheduler_kwargs: {min_lr: 1e-5, num_cycles: 2, mode: cos, last: null}\n"
    text += "gradient_checkpointing_kwargs: {use_reentrant: False}\n"
    args = parsed(tmp_path, text)[-1]
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5, "num_cycles": 2, "mode": "cos", "last": None}
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_model_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--dataset_name demo"):
        parse(*ALL, argv=["--model_name_or_path", "x"], demo_config=tmp_path / "unread.yaml")


def test_overridden_default_keeps_its_help(capsys):
    @dataclass
    class Model(ModelArguments):
        label_smoothing: float = 0.2

    with pytest.raises(SystemExit):
        parse(Model, argv=["--help"])
    assert "Of the language-modelling loss" in capsys.readouterr().out


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
        (["--questions_file", "q", "--annotations_file", "a"], "needs image_folder"),
        (["--eval_fraction", "1.5"], "between 0 and 1"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, found 0"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1"),
        (["--max_eval_samples", "0"], "max_eval_samples must be at least 1"),
        (["--label_smoothing", "nan"], "label_smoothing must be between 0 and 1, found nan"),
        (["--dropout", "-0.1"], "dropout must be between 0 and 1"),
        (["--lora_r", "0"], "lora_r must be at least 1"),
        (["--max_answer_tokens", "2"], "max_answer_tokens must be between 3 and 512"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, "", *flags)
