"""A YAML first, the command line over it, help that can be read, and errors that name the way out."""

import dataclasses
import json
import re
import runpy
from dataclasses import dataclass

import pytest
import transformers
from conftest import RECIPES

from blip_ft.arguments import (
    BlipTrainingArguments,
    CaptioningArguments,
    DataArguments,
    ModelArguments,
    PeftArguments,
    RetrievalArguments,
    VqaArguments,
)
from blip_ft.cli import parse, read_text, start_recipe

ALL = (ModelArguments, DataArguments, VqaArguments, PeftArguments, BlipTrainingArguments)


def recipe_classes(name):
    program = runpy.run_path(str(RECIPES / f"{name}.py"))
    if name == "predict":
        return (program["Prediction"], program["Data"])
    if name == "bootstrap":
        return (program["Bootstrap"], program["Data"])
    if name == "app":
        return (program["App"],)
    if name == "check_data":
        return (program["Model"], DataArguments, program["AnyTask"], program["Peft"], program["Training"])
    task = {"vqa": VqaArguments, "captioning": CaptioningArguments, "retrieval": RetrievalArguments}[name]
    return (program["Model"], program["Data"], task, PeftArguments, program["Training"])


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
    with pytest.raises(ValueError, match=rf"run\.yaml is not valid YAML in line {line}: the key '{key}' appears twice"):
        parsed(tmp_path, yaml)


def test_broken_yaml_and_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not valid YAML"):
        parsed(tmp_path, "a: [1\n")
    with pytest.raises(ValueError, match="needs a YAML file that can be read; /no/such.yaml"):
        parse(*ALL, argv=["--config", "/no/such.yaml"])
    with pytest.raises(ValueError, match="needs `key: value` lines"):
        parsed(tmp_path, "- a\n")


def test_value_of_the_wrong_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--image_size"):
        parsed(tmp_path, "image_size: large\n")


def test_values_within_a_yaml_dict_have_their_types(tmp_path):
    text = "lr_scheduler_kwargs: {min_lr: 1e-5, num_cycles: 2, mode: cos, last: null}\n"
    text += "gradient_checkpointing: true\ngradient_checkpointing_kwargs: {use_reentrant: False}\n"
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
    assert "--label_smoothing 0.2 Label smoothing of BLIP's language-modeling loss." in " ".join(
        capsys.readouterr().out.split()
    )


def test_null_in_a_yaml_is_none_and_an_empty_string_is_one(tmp_path):
    _, data, _, _, training = parsed(tmp_path, "save_total_limit: null\nimage_folder: ~\neval_split:\nrun_name: ''\n")
    assert training.save_total_limit is None and data.image_folder is None and data.eval_split is None
    assert training.run_name == ""
    assert parsed(tmp_path, "save_total_limit: null\n", "--save_total_limit", "3")[-1].save_total_limit == 3
    (caption,) = parse(CaptioningArguments, argv=["--config", str(written(tmp_path, 'prompt: ""\n'))])
    assert caption.prompt == ""
    with pytest.raises(ValueError, match=r"run.yaml: weight_decay needs a value. Leave the line out"):
        parsed(tmp_path, "weight_decay: null\n")
    # the model's family decides
    assert parsed(tmp_path, "learning_rate: null\n")[-1].learning_rate is None


def written(folder, text):
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def test_null_takes_back_what_the_demo_yaml_says(tmp_path):
    (tmp_path / "demo.yaml").write_text("model_name_or_path: demo\ndataset_name: demo\nmax_eval_samples: 9\n")
    flags = ["--config", str(written(tmp_path, "max_eval_samples: null\n")), "--use_cpu"]
    model, data, *_ = parse(*ALL, argv=flags, demo_config=tmp_path / "demo.yaml")
    assert model.model_name_or_path == "demo" and data.max_eval_samples is None


def test_mapping_is_read_as_the_yaml_of_the_same_content(tmp_path):
    text = "learning_rate: 1e-4\nbf16: false\nsave_total_limit: null\nlora_target_modules: [query, value]\n"
    text += "use_peft: true\nfreeze: [vision_model, text_encoder]\nrun_name: ''\nmax_steps: 3\n"
    text += "lr_scheduler_kwargs: {min_lr: 1e-6, mode: cos, last: null}\n"
    content = {"learning_rate": 1e-4, "bf16": False, "save_total_limit": None, "run_name": "", "max_steps": 3}
    content |= {"use_peft": True, "lora_target_modules": ["query", "value"], "freeze": ["vision_model", "text_encoder"]}
    content |= {"lr_scheduler_kwargs": {"min_lr": 1e-6, "mode": "cos", "last": None}}
    flags = ["--use_cpu", "--output_dir", "x"]
    of_yaml = parse(*ALL, argv=["--config", str(written(tmp_path, text)), *flags])
    of_mapping = parse(*ALL, argv=flags, config=content)
    assert list(map(dataclasses.asdict, of_mapping)) == list(map(dataclasses.asdict, of_yaml))
    # yaml.safe_load gives a string for 1e-4
    assert parse(*ALL, argv=flags, config={"learning_rate": "1e-4"})[-1].learning_rate == 1e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"learning_rte": 1}, "The config has the unknown key 'learning_rte'. Did you mean learning_rate"),
        ({"weight_decay": None}, "The config: weight_decay needs a value"),
        ({"image_size": "large"}, "--image_size.*: invalid int value: 'large'"),
        ({"image_size": 1.5}, "--image_size.*: invalid int value: '1.5'"),
    ],
)
def test_mapping_is_checked_as_strictly_as_a_yaml(config, message):
    with pytest.raises(ValueError, match=message):
        parse(*ALL, argv=["--use_cpu"], config=config)


def test_no_flags_at_all_give_the_defaults(monkeypatch):
    monkeypatch.setattr("sys.argv", ["app.py"])
    assert parse(PeftArguments) == (PeftArguments(),)


def test_program_with_a_config_reads_no_other():
    with pytest.raises(ValueError, match="One --config is read, found a.yaml"):
        parse(*ALL, argv=["--config", "a.yaml"], config={"seed": 1})


@pytest.mark.parametrize("flags", [["--debug"], ["--debug", "--use_cpu"]])
def test_debug_without_a_value_names_traceback(flags):
    for classes in (ALL, (ModelArguments,)):
        with pytest.raises(ValueError, match="--debug needs a value.*use --traceback"):
            parse(*classes, argv=flags)


def test_mistake_names_the_last_line_of_ours(caplog, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe.py"])
    for fail, where in (
        (lambda: json.loads("{"), r"\(raised at tests/test_cli.py:\d+; --traceback shows the full"),
        (lambda: read_text("answer_list", "/no/file"), r"\(raised at blip_ft/cli.py:\d+; --traceback shows the full"),
    ):

        def main(fail=fail):
            fail()

        with pytest.raises(SystemExit) as stopped:
            start_recipe(main)
        assert stopped.value.code == 1 and re.search(where, caplog.messages[-1])
    monkeypatch.setattr("sys.argv", ["recipe.py", "--traceback"])
    with pytest.raises(ValueError, match="answer_list needs a text file"):
        start_recipe(main)


def test_one_config_is_read_and_a_yaml_names_no_other(tmp_path):
    with pytest.raises(ValueError, match="One --config is read, found a.yaml, b.yaml"):
        parse(*ALL, argv=["--config", "a.yaml", "--config=b.yaml"])
    for key in ("config", "help", "no_clean_captions"):
        with pytest.raises(ValueError, match=f"has the unknown key '{key}'"):
            parsed(tmp_path, f"{key}: x\n")


def test_model_that_a_program_cannot_do_without_may_stand_in_its_yaml(tmp_path):
    program = runpy.run_path(str(RECIPES / "predict.py"))
    path = written(tmp_path, "model_name_or_path: outputs/vqa\nimages: [a.jpg]\n")
    args, _ = parse(program["Prediction"], program["Data"], argv=["--config", str(path)])
    assert args.model_name_or_path == "outputs/vqa"


def test_demo_model_on_own_data_takes_the_learning_rate_of_the_demo(tmp_path, caplog):
    caplog.set_level("INFO", "blip_ft")
    demo = {"demo_config": RECIPES / "configs" / "vqa_demo.yaml"}
    flags = ["--dataset_name", str(tmp_path), "--use_cpu"]
    training = parse(*ALL, argv=["--model_name_or_path", "demo", *flags], **demo)[-1]
    assert (training.learning_rate, training.warmup_steps, training.num_train_epochs) == (8e-4, 0.1, None)
    assert "taking learning_rate 8e-4 and warmup_steps 0.1 from" in caplog.text
    training = parse(*ALL, argv=["--model_name_or_path", "demo", *flags, "--learning_rate", "1e-5"], **demo)[-1]
    assert (training.learning_rate, training.warmup_steps) == (1e-5, 0.1)
    assert parse(*ALL, argv=["--model_name_or_path", "x", *flags], **demo)[-1].learning_rate is None


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        *[(key, "Did you mean learning_rate?") for key in ("lr", "learningrate", "learning_rates", "lerning_rate")],
        *[(key, "Did you mean num_train_epochs?") for key in ("epochs", "num_epochs", "train_epochs")],
        ("batch_size", "Did you mean per_device_train_batch_size?"),
        ("eval_batch_size", "Did you mean per_device_eval_batch_size?"),
        *[(key, "Did you mean model_name_or_path?") for key in ("model", "checkpoint", "model_name_or_pth")],
        ("dataset", "Did you mean dataset_name?"),
        *[(key, "Did you mean lora_r?") for key in ("lora_rank", "rank")],
        ("warmup_ratio", "Did you mean warmup_steps?"),
        ("num_workers", "Did you mean dataloader_num_workers?"),
        *[(key, "Did you mean early_stopping_patience?") for key in ("early_stopping", "patience")],
        *[(key, "--help-all lists all keys") for key in ("temperature", "foo", "hub_tokn", "top_k")],
    ],
)
def test_unknown_key_gets_the_name_here_or_no_hint_at_all(tmp_path, key, hint):
    with pytest.raises(ValueError) as refused:
        parsed(tmp_path, f"{key}: 1\n")
    assert hint in str(refused.value)


def shown_by(flag, classes, capsys, **kwargs):
    with pytest.raises(SystemExit) as stopped:
        parse(*classes, argv=["--lr", "3", flag], **kwargs)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def flags_of(text):
    """The flags that begin a line."""
    return {line.split()[0].removeprefix("--") for line in text.splitlines() if line.startswith("  --")}


OFTEN_SET = {
    *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "seed"),
    *("max_grad_norm", "bf16", "gradient_checkpointing", "dataloader_num_workers", "use_cpu", "eval_strategy"),
    *("eval_steps", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end", "logging_steps"),
    *("metric_for_best_model", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id"),
}


@pytest.mark.parametrize("name", ["vqa", "captioning", "retrieval", "predict", "bootstrap", "app", "check_data"])
def test_help_is_short_and_has_every_flag_of_ours_and_help_all_has_all(name, capsys, caplog, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    caplog.set_level("INFO")
    classes = recipe_classes(name)
    short = shown_by("--help", classes, capsys, demo_config=RECIPES / "configs" / "vqa_demo.yaml")
    assert len(short.splitlines()) < 170 and max(map(len, short.splitlines())) < 80
    of_trainer = {entry.name for entry in dataclasses.fields(transformers.Seq2SeqTrainingArguments)}
    names = {part: {entry.name for entry in dataclasses.fields(part) if entry.init} for part in classes}
    everything = set().union(*names.values())
    # check_data takes the YAML of every recipe; its help has what it reads
    parts = classes if name != "check_data" else [DataArguments]
    own = {name for part in parts for name in names[part] - of_trainer if name not in part.without_effect}
    general = {"config", "traceback", "help", "help-all"}
    assert own | general <= flags_of(short)
    if name in ("vqa", "captioning", "retrieval"):
        assert flags_of(short) >= OFTEN_SET
    assert flags_of(shown_by("--help-all", classes, capsys)) == everything | general
    assert not caplog.messages


def test_flag_is_shown_with_its_default(capsys):
    shown = shown_by("--help", recipe_classes("captioning"), capsys).splitlines()
    for line in ("--lora_r 16 ", "--weight_decay 0.05 ", "--streaming ", "--clean_captions true ", "--image_size N "):
        assert any(text.startswith(f"  {line}") for text in shown), line
    # as in a recipe that its user has edited
    edited = dataclasses.make_dataclass("Edited", [("prompt", str, "a picture of ")], bases=(CaptioningArguments,))
    assert '\n  --prompt "a picture of "' in shown_by("--help", [edited], capsys)


@pytest.mark.parametrize("name", ["vqa", "captioning", "retrieval", "predict", "bootstrap", "app", "check_data"])
def test_each_help_text_can_be_read_alone(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    shown = shown_by("--help", recipe_classes(name), capsys)
    # two spaces or more, or a new line, are between a flag and its text
    texts = re.findall(r"^  --(.*?)\s{2,}(.*)$", shown, re.MULTILINE)
    assert {flag.split()[0] for flag, _ in texts} == flags_of(shown)
    for flag, text in texts:
        assert re.match(r"[A-Z0-9`]", text) and text.endswith("."), (flag, text)
        assert text.split()[0] not in ("Of", "Its", "Default:", "Same"), (flag, text)


def test_help_says_what_is_true_here(capsys):
    for name in ("vqa", "retrieval"):
        with pytest.raises(SystemExit):
            parse(*recipe_classes(name), argv=["--help-all"])
        shown = " ".join(capsys.readouterr().out.split())
        assert "Weight decay of all parameters. Biases and norms are included" in shown
        assert "excluded from bias" not in shown
        assert shown.index("--hub_token") > shown.index("Refused, because they have no effect here")
        assert "intended for your training/evaluation scripts" not in shown
        assert "The latter is the newest complete checkpoint of output_dir" in shown
        assert "Whether or not to pin memory" in shown  # the Trainer's own help
