"""Pushing to a Hub that works and to one that does not, the card, and what is never loaded."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from conftest import RECIPES
from hub_server import NEVER, LocalHub, front_matter_errors
from huggingface_hub import ModelCard, close_session, constants
from huggingface_hub.utils import _http
from peft import PeftModel
from safetensors.torch import load_file

from blip_ft.arguments import BlipTrainingArguments, DataArguments, ModelArguments, PeftArguments, VqaArguments
from blip_ft.cli import parse
from blip_ft.models import load_model
from blip_ft.results import model_card, push
from blip_ft.results.model_card import build_model_card, official_name
from blip_ft.results.push import NOT_PUSHED, describe_hub_error

TOKEN = "hf_" + "s3cret" * 6
ROOT = RECIPES.parent
PUSHED = "tester/dogs"
PUSH = ["--push_to_hub", "--hub_model_id", PUSHED, "--max_steps", "2"]


@pytest.fixture
def local_hub(monkeypatch, tmp_path, checkpoints):
    """The Hub of this process, with base checkpoints on it; huggingface_hub reads HF_ENDPOINT when it is imported."""
    with LocalHub(TOKEN) as server:
        for task, folder in checkpoints.items():
            server.add(f"maker/{task}", folder, **{"README.md": "---\nlicense: bsd-3-clause\n---\n"})
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))  # between one try and the next
        monkeypatch.setattr(push, "SECONDS_TO_WAIT", 0.3)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield server
        close_session()


@pytest.fixture
def flags(checkpoint, image_folder):
    data = ["--dataset_name", str(image_folder), "--eval_split", "test", "--per_device_train_batch_size", "8"]
    return ["--model_name_or_path", str(checkpoint), *data]


def assert_token_is_nowhere(folder: Path, *texts: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for content in (*(path.read_bytes() for path in files), *(text.encode() for text in texts)):
        assert TOKEN.encode() not in content


def assert_whole(folder: Path) -> None:
    """Every file of a run is there, and the weights can be read."""
    assert json.loads((folder / "all_results.json").read_text())["eval_exact_match"] >= 0
    assert (folder / "README.md").is_file() and (folder / "predictions.jsonl").is_file()
    assert load_file(next(folder.glob("*model.safetensors")))


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("vqa", ["--report_to", "tensorboard"]),
        ("vqa", ["--use_peft"]),
        ("captioning", []),
        ("retrieval", ["--use_peft", "--queue_size", "24", "--k_test", "3"]),
    ],
    ids=["vqa", "vqa-lora", "captioning", "retrieval-lora"],
)
def test_pushed_run_loads_by_its_id_in_stock_as_its_card_says(
    local_hub, recipe, flags, task, more, image_folder, monkeypatch, tmp_path, capfd, caplog
):
    caplog.set_level("DEBUG")
    base, peft = f"maker/{task}", "--use_peft" in more
    folder = recipe(*flags, *PUSH, *more, "--hub_private_repo", "true", "--model_name_or_path", base, task=task)
    pushed = local_hub.repositories[PUSHED]
    assert pushed.private
    assert pushed.files["README.md"] == (folder / "README.md").read_bytes()
    rows_and_pickles = {"predictions.jsonl", "report.html", "training_args.bin"}
    assert rows_and_pickles < {path.name for path in folder.iterdir()}
    assert not rows_and_pickles & set(pushed.files) and not any("checkpoint-" in path for path in pushed.files)
    # they hold questions and images
    assert any(folder.rglob("*tfevents*")) == ("tensorboard" in more)
    assert not any("tfevents" in path for path in pushed.files)
    assert_token_is_nowhere(folder, caplog.text, *capfd.readouterr())

    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == base and card.data.license == "bsd-3-clause"
    assert card.data.library_name == ("peft" if peft else "transformers")
    assert card.data.base_model_relation == ("adapter" if peft else "finetune")
    assert local_hub.repositories[base].commits[-1] in card.text
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("cat.jpg").write_bytes((image_folder / "0.png").read_bytes())
    stock_code, own_code = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    stock, own = {}, {}
    exec(compile(stock_code, "README.md", "exec"), stock)
    exec(compile(own_code, "README.md", "exec"), own)
    model, local = stock["model"], load_model(str(folder))["model"]
    for name, tensor in own["loaded"]["model"].state_dict().items():
        assert torch.equal(tensor, local.state_dict()[name])
    if peft:
        assert isinstance(model, PeftModel)
        model, local = model.get_base_model(), local.get_base_model()
    assert type(model).__module__ == "transformers.models.blip.modeling_blip"
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in local.state_dict().items())


FAILURES = {
    "refuses the token": ({"POST ": 401}, "HF_TOKEN"),
    "forbids writing": ({"POST .*/preupload": 403}, "HF_TOKEN"),
    "fails at a large file": ({"PUT /storage": 500}, "Error while uploading '"),
    "fails at the commit": ({"POST .*/commit": 500}, "500 Internal Server Error"),
    "refuses the card": ({"POST /api/validate-yaml": 400}, "Invalid metadata"),
    "never answers": ({"POST ": NEVER}, "timed out"),
    "never answers half way": ({"POST .*/commit": NEVER}, "timed out"),
    "is down": ({}, "Connection refused"),
    "is given a malformed token": ({}, "can't encode"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_hub_that_fails_leaves_the_result_whole_and_says_what_to_run(
    local_hub, recipe, flags, failure, tmp_path, monkeypatch, caplog, capfd
):
    local_hub.answers, said = FAILURES[failure]
    if failure == "is down":
        local_hub.__exit__()
    if failure == "is given a malformed token":
        monkeypatch.setenv("HF_TOKEN", TOKEN + "é")
    with pytest.raises(SystemExit) as stopped:
        recipe(*flags, *PUSH, "--hub_strategy", "end")
    assert stopped.value.code == NOT_PUSHED
    last = caplog.records[-1].getMessage()
    assert said in last and f"hf upload {PUSHED} {tmp_path / 'run'}" in last
    assert_whole(tmp_path / "run")
    assert "model.safetensors" not in getattr(local_hub.repositories.get(PUSHED), "files", {})
    assert_token_is_nowhere(tmp_path / "run", caplog.text, *capfd.readouterr())


def test_command_of_the_message_pushes_what_a_failed_push_left(local_hub, flags, tmp_path):
    """As a user meets it: processes of their own, an exit code, and a line to copy."""
    env = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    env |= {"HF_ENDPOINT": local_hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    env |= {"HF_HUB_DISABLE_XET": "1"}
    local_hub.answers = {"POST .*/commit": 403}
    command = [sys.executable, str(RECIPES / "vqa.py"), "--use_cpu", "--dataloader_num_workers", "0"]
    done = subprocess.run(
        [*command, *flags, *PUSH, "--hub_private_repo", "true"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == NOT_PUSHED, done.stderr
    assert "Traceback" not in done.stderr
    assert_token_is_nowhere(tmp_path / "outputs" / "vqa", done.stdout, done.stderr)
    local_hub.answers = {}
    (line,) = re.findall(r"^ *(hf upload .*)$", done.stderr, re.MULTILINE)
    hf, *words = shlex.split(line)
    later = [str(Path(sys.executable).with_name(hf)), *words]
    subprocess.run(later, cwd=tmp_path, env=env, check=True, capture_output=True)
    assert not {"predictions.jsonl", "training_args.bin"} & set(local_hub.repositories[PUSHED].files)
    model, info = transformers.BlipForQuestionAnswering.from_pretrained(PUSHED, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = load_file(tmp_path / "outputs" / "vqa" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("answer", [500, NEVER])
def test_push_that_fails_during_training_is_a_warning(local_hub, recipe, flags, answer, monkeypatch, caplog):
    local_hub.answers = {"POST .*/commit": answer}
    recover = model_card.build_model_card
    monkeypatch.setattr(  # the Hub is well again when training is over
        "blip_ft.training.run.build_model_card", lambda *a, **k: local_hub.answers.clear() or recover(*a, **k)
    )
    saves = ["--skip_dry_run", "--hub_strategy", "every_save", "--save_strategy", "steps", "--save_steps", "1"]
    folder = recipe(*flags, *PUSH, *saves)
    assert "A checkpoint was not pushed; training continues" in caplog.text
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
    assert local_hub.repositories[PUSHED].files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_hub_that_is_down_at_the_start_is_tried_again_at_the_end(local_hub, recipe, flags, monkeypatch, caplog):
    local_hub.answers = {"POST ": 503}
    recover = model_card.build_model_card
    monkeypatch.setattr(
        "blip_ft.training.run.build_model_card", lambda *a, **k: local_hub.answers.clear() or recover(*a, **k)
    )
    recipe(*flags, *PUSH, "--hub_strategy", "every_save")
    assert "Nothing is pushed during training" in caplog.text
    assert "model.safetensors" in local_hub.repositories[PUSHED].files


def test_last_checkpoint_is_pushed_to_go_on_from_without_pickled_arguments(local_hub, recipe, flags):
    recipe(*flags, *PUSH, "--hub_strategy", "checkpoint")
    files = local_hub.repositories[PUSHED].files
    assert {"last-checkpoint/model.safetensors", "last-checkpoint/optimizer.pt"} < set(files)
    assert not any("training_args" in path for path in files)


def card_of(**changes) -> ModelCard:
    settings = {
        "repository": "tester/dogs",
        "task": "vqa",
        "family": "BLIP",
        "model_type": "blip",
        "stock_class": "BlipForQuestionAnswering",
        "is_adapter": False,
        "base_model": None,
        "revision": "main",
        "dataset": "dogs",
        "dataset_ids": [],
        "held_out": "split test",
        "scores": {"eval_vqa_accuracy": 50.0},
        "notes": {"scoring_rule": "official, ten answers"},
        "facts": {"optimizer steps": 2},
        "arguments": {"learning_rate": 1e-5},
    }
    return build_model_card(**settings | changes)


def test_card_of_a_data_set_on_the_hub_names_it_and_no_base_for_a_local_checkpoint():
    card = card_of(dataset_ids=["owner/dogs"])
    assert card.data.datasets == ["owner/dogs"] and card.data.base_model is None and card.data.license is None
    assert card.data.metrics == ["accuracy"]
    assert card.data.eval_results[0].dataset_type == "owner/dogs"
    assert front_matter_errors(str(card)) == []
    assert "Unknown. Check the license" in card.text


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "a | b\n\n# c\n---\n```\n</details>", "[x](http://x) `y`"]
)
def test_card_shows_what_data_and_models_say_as_text(text):
    plain, odd = card_of(), card_of(
        dataset=text, held_out=text, notes={text: text}, scores={f"eval_vqa_accuracy_{text}": 1.0},
        facts={text: text}, arguments={"prompt": text}, repository=f"x/{text}".replace("/", "_"),
    )  # fmt: skip
    assert front_matter_errors(str(odd)) == []
    assert odd.data.eval_results[0].dataset_name == text
    before_settings, settings = odd.text.split("```yaml\n")
    prose = re.sub(r"```python.*?```", "", before_settings, flags=re.DOTALL)
    assert "<script" not in prose and "[x](" not in prose
    assert settings.startswith(f"prompt: {json.dumps(text)}\n```\n")
    marks = r"^(#|---|\||```|<)"
    headings = [[line[:2] for line in card.text.splitlines() if re.match(marks, line)] for card in (plain, odd)]
    assert headings[0] == headings[1]
    assert {line.count("|") - line.count(r"\|") for line in odd.text.splitlines() if line.startswith("|")} == {3}


def test_card_has_the_baseline_beside_each_score_that_has_one():
    scores = {"eval_vqa_accuracy": 50.0, "eval_vqa_accuracy_other": 20.0}
    text = card_of(scores=scores, baselines={"eval_vqa_accuracy": 41.239}).text
    assert "| metric | value | baseline |\n| --- | --- | --- |\n| VQA accuracy | 50.00 | 41.24 |" in text
    assert "| VQA accuracy other | 20.00 |  |\n" in text


def test_card_calls_task_and_units_by_their_names():
    retrieval = card_of(
        stock_class="BlipForImageTextRetrieval", task="image_text_retrieval", scores={"eval_text_recall@1": 9.0}
    )
    assert "BLIP for image-text retrieval, " in retrieval.text and "classification" not in str(retrieval)
    assert retrieval.data.pipeline_tag is None and "image-text-retrieval" in retrieval.data.tags
    assert front_matter_errors(str(retrieval)) == []
    captions = card_of(
        stock_class="BlipForConditionalGeneration", task="conditional_generation", scores={"eval_cider": 120.0}
    )
    assert "CIDEr-D can exceed 100" in captions.text and "All scores are in percent." not in captions.text
    assert "All scores are in percent." in card_of(scores={"eval_vqa_accuracy_cider": 1.0}).text


def test_arguments_on_the_card_are_a_yaml_that_config_takes_without_folders_and_hub(flags, recipe, tmp_path):
    (tmp_path / "all.yaml").write_text("save_total_limit: null\n")
    few = ["--max_steps", "1", "--learning_rate", "3e-4", "--config", str(tmp_path / "all.yaml")]
    folder = recipe(*flags, *few, "--hub_model_id", "owner/secret_name")
    card = (folder / "README.md").read_text()
    assert "/tmp" not in card and str(tmp_path) not in card and "owner/secret_name" in card.split("```yaml")[0]
    block = card.split("```yaml\n")[1].split("\n```")[0]
    assert "In `model_name_or_path`, `dataset_name`, only the last part of each path is shown" in card
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE))
    assert rows["rows trained on"] == rows["rows evaluated on"] == "8 of 4 images"
    assert rows["image size"] == "32 x 32 pixels" and rows["epochs"] == "1" and re.match(r"0:\d\d:\d\d$", rows["time"])
    number = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert rows["parameters"] == f"{number:,}, {number:,} of them trained"
    assert rows["hardware"].startswith("CPU (") and rows["precision"] == "fp32"
    assert "hub_" not in block and "output_dir" not in block
    (tmp_path / "again.yaml").write_text(block)
    types = (ModelArguments, DataArguments, VqaArguments, PeftArguments, BlipTrainingArguments)
    _, data, vqa, _, training = parse(*types, argv=["--config", str(tmp_path / "again.yaml"), "--output_dir", "x"])
    assert (data.eval_split, vqa.question_start_token, training.max_steps) == ("test", "cls", 1)
    assert training.learning_rate == 3e-4 and training.save_total_limit is None


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("eval_vqa_accuracy", ("accuracy", "VQA accuracy")),
        ("eval_vqa_accuracy_yes_no", ("accuracy", "VQA accuracy yes no")),
        ("eval_bleu4", ("bleu", "BLEU-4")),
        ("eval_cider", ("cider", "CIDEr-D")),
        ("eval_rouge_l", ("rouge", "ROUGE-L")),
        ("eval_itc_text_recall@5", ("recall", "itc text recall@5")),
    ],
)
def test_metrics_have_their_official_names(name, official):
    assert official_name(name) == official


def test_error_that_quotes_the_token_is_told_without_it():
    told = describe_hub_error(RuntimeError(f"Illegal header value b'Bearer {TOKEN}' for {TOKEN}"))
    assert TOKEN not in told and "Illegal header value" in told


@pytest.mark.parametrize("where", ["flag", "yaml"])
def test_token_is_taken_from_the_environment_alone(where, tmp_path):
    (tmp_path / "run.yaml").write_text(f"hub_token: {TOKEN}\n")
    argv = ["--hub_token", TOKEN] if where == "flag" else ["--config", str(tmp_path / "run.yaml")]
    with pytest.raises(ValueError, match="HF_TOKEN") as refused:
        parse(BlipTrainingArguments, argv=argv)
    assert TOKEN not in str(refused.value)


def test_repository_that_cannot_be_is_refused_at_the_start():
    with pytest.raises(ValueError, match="hub_model_id must be OWNER/NAME, found 'a/b/c'"):
        parse(BlipTrainingArguments, argv=["--hub_model_id", "a/b/c"])


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def pickled(checkpoint, tmp_path) -> Path:
    """A checkpoint whose weights are a .bin."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix == ".safetensors":
            torch.save(load_file(path), folder / "pytorch_model.bin")
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_pickled_weights_need_allow_pickle(pickled, checkpoint, local_hub, recipe, flags, caplog):
    local_hub.add("maker/old", pickled)
    for name in (str(pickled), "maker/old"):
        with pytest.raises(ValueError, match="add --allow_pickle"):
            load_model(name)
    state = load_model(str(pickled), allow_pickle=True)["model"].state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in load_file(checkpoint / "model.safetensors").items())
    with pytest.raises(SystemExit):
        recipe(*flags, "--model_name_or_path", str(pickled), "--max_steps", "1")
    assert "add --allow_pickle" in caplog.text
    recipe(*flags, "--model_name_or_path", str(pickled), "--max_steps", "1", "--allow_pickle")


def test_pickled_adapter_needs_allow_pickle(recipe, flags):
    folder = recipe(*flags, "--use_peft", "--max_steps", "1")
    expected = load_model(str(folder))["model"].state_dict()
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="add --allow_pickle"):
        load_model(str(folder))
    state = load_model(str(folder), allow_pickle=True)["model"].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())


def test_code_in_a_pickle_does_not_run(pickled, tmp_path):
    torch.save({"weight": RunsCode(tmp_path / "ran")}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights_only|Weights only"):
        load_model(str(pickled), allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_checkpoint_is_trusted_nowhere():
    assert inspect.signature(load_model).parameters["trust_remote_code"].default is False
    yamls = [path for path in ROOT.rglob("*.y*ml") if ".venv" not in path.parts]
    assert len(yamls) > 10
    assert not [path for path in yamls if "trust_remote_code" in path.read_text()]
    with pytest.raises(ValueError, match="unknown key 'trust_remote_code'"):
        parse(ModelArguments, argv=["--trust_remote_code"])


def test_card_has_the_scores_of_the_test_rows_apart_and_gives_them_to_the_hub():
    scores = {"eval_vqa_accuracy": 60.0, "test_vqa_accuracy": 55.0}
    card = card_of(
        scores=scores, baselines={"test_vqa_accuracy": 40.0}, tested_on="split final",
        overlap="None of its 9 images was trained on in this run.",
        test_overlap="2 of its 3 images were also trained on.",
    )  # fmt: skip
    evaluated, tested = card.text.split("On split final, once, with the final model.")
    assert "On split test. None of its 9 images was trained on in this run." in evaluated
    assert "| VQA accuracy | 60.00 |" in evaluated and "55.00" not in evaluated
    assert tested.startswith(" 2 of its 3 images were also trained on.")
    assert "| VQA accuracy | 55.00 | 40.00 |" in tested and "60.00" not in tested
    assert [result.metric_value for result in card.data.eval_results] == [55.0]
    assert front_matter_errors(str(card)) == []
