"""The recipes with BLIP-2 and InstructBLIP as users start them; what they share with BLIP stands in test_recipes."""

import json
import math
import runpy
import shutil
import sys

import pytest
import torch
import transformers
from conftest import GOLDEN, RECIPES, history_of, predictions_of, results_of
from peft import PeftModel
from programs import run_ranks
from safetensors.torch import load_file
from transformers import PreTrainedModel

from blip_ft.arguments import BlipTrainingArguments, DataArguments, ModelArguments, PeftArguments, VqaArguments
from blip_ft.arguments.families import family_of
from blip_ft.cli import parse
from blip_ft.data.collators import VqaCollator
from blip_ft.data.loading import load_vqa
from blip_ft.data.text_formats import texts_of
from blip_ft.models import load_model
from blip_ft.training.setup import prepare_run

FAMILIES = ("blip2_opt", "blip2_t5", "instructblip_vicuna", "instructblip_t5")
CHECKPOINTING = ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": false}']
KINDS = {
    "whole": ["--freeze", "none"],
    "as LAVIS": [],
    "LoRA": ["--use_peft"],
    "8 bits": ["--use_peft", "--load_in_8bit", *CHECKPOINTING],
    "4 bits": ["--use_peft", "--load_in_4bit", *CHECKPOINTING],
}
# each family and each kind; the others are slow
QUICK = {
    ("vqa", "blip2_opt", "whole"),
    ("vqa", "blip2_opt", "4 bits"),
    ("vqa", "blip2_t5", "8 bits"),
    ("vqa", "instructblip_vicuna", "LoRA"),
    ("captioning", "blip2_opt", "as LAVIS"),
    ("captioning", "instructblip_t5", "whole"),
    ("captioning", "instructblip_vicuna", "4 bits"),
}


@pytest.fixture
def data_of(image_folder):
    """Flags that name a golden checkpoint and the eight rows."""

    def flags(name: str) -> list[str]:
        data = ["--dataset_name", str(image_folder), "--eval_split", "test", "--per_device_train_batch_size", "8"]
        return ["--model_name_or_path", str(GOLDEN / name), *data, "--warmup_steps", "0", "--learning_rate", "3e-3"]

    return flags


def stock_of(name: str) -> type[PreTrainedModel]:
    return getattr(transformers, json.loads((GOLDEN / name / "config.json").read_text())["architectures"][0])


@pytest.mark.parametrize(
    ("task", "name", "kind"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in [(task, name, kind) for task in ("vqa", "captioning") for name in FAMILIES for kind in KINDS]
    ],
)
def test_each_kind_of_training_lowers_the_loss_and_writes_what_stock_loads(recipe, data_of, task, name, kind):
    few = ["--max_steps", "4", "--logging_steps", "1", "--lr_scheduler_type", "constant"]
    folder = recipe(*data_of(name), *KINDS[kind], *few, task=task)
    losses = [entry["loss"] for entry in history_of(folder)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    files = {"all_results.json", "predictions.jsonl", "report.html", "README.md", "config.json", "checkpoint-4"}
    assert files <= {path.name for path in folder.iterdir()}
    assert all(0 <= line["probability"] <= 1 for line in predictions_of(folder))
    config = json.loads((folder / "config.json").read_text())
    assert config["task"] == {"vqa": "vqa", "captioning": "conditional_generation"}[task] and config["prompt"]

    before = load_file(GOLDEN / name / "model.safetensors")
    if "--use_peft" in KINDS[kind]:
        adapter = load_file(folder / "adapter_model.safetensors")
        assert all(tensor.abs().sum() > 0 for key, tensor in adapter.items() if "lora_B" in key)
        assert adapter and all("language_model." in key and "lm_head" not in key for key in adapter)
        PeftModel.from_pretrained(stock_of(name).from_pretrained(GOLDEN / name), folder)
    else:
        _, info = stock_of(name).from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        after = load_file(folder / "model.safetensors")
        changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
        trained = {"vision_model", "qformer", "query_tokens", "language_projection"}
        assert changed == trained | ({"language_model"} if kind == "whole" else set())


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_stops_at_the_end_of_an_answer_after_training(recipe, data_of, name):
    """The Trainer writes the tokenizer's end token into the config, and OPT's answers end with another one."""
    folder = recipe(*data_of(name), "--max_steps", "1", "--skip_dry_run")
    loaded = load_model(folder, device="cpu")
    end = texts_of(loaded["processor"], family_of(loaded["model"].config), "vqa").end_token_id
    stops = stock_of(name).from_pretrained(folder).language_model.generation_config.eos_token_id
    assert end in (stops if isinstance(stops, list) else [stops])


def test_resumed_run_equals_unbroken_run(recipe, data_of, tmp_path):
    common = [*data_of("blip2_opt"), "--num_train_epochs", "4", "--per_device_train_batch_size", "4"]
    common += ["--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "9", "--use_peft"]
    whole = recipe(*common, output_dir=tmp_path / "whole")
    cut = shutil.copytree(whole, tmp_path / "cut")
    for step in (6, 8):
        shutil.rmtree(cut / f"checkpoint-{step}")
    recipe(*common, "--resume_from_checkpoint", "last", output_dir=cut)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def uneven(image_folder, tmp_path):
    """The rows of image_folder, with one to three answers of different lengths."""
    folder = shutil.copytree(image_folder, tmp_path / "uneven")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        own = [row.pop("answer"), "a large dog on the grass", "two"]
        row["answers"] = own[: 1 + number // 2 % 3] + own[:1]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset_name", str(folder)]


@pytest.mark.parametrize("name", ["blip2_opt", "blip2_t5"])
def test_loss_of_the_evaluation_is_that_of_one_training_step_over_all_rows(recipe, data_of, uneven, tmp_path, name):
    flags = [*data_of(name), *uneven, "--per_device_eval_batch_size", "3", "--lr_scheduler_type", "constant"]
    folder = recipe(*flags, "--max_steps", "1", "--logging_steps", "1", "--learning_rate", "0")
    results, lines = results_of(folder), predictions_of(folder)
    # both splits have the same rows, in other batches
    (entry,) = history_of(folder)
    assert results["eval_loss"] == pytest.approx(entry["loss"], abs=1e-3)  # of the log, four digits
    loaded = load_model(folder, device="cpu")
    model, processor = loaded["model"], loaded["processor"]
    collate = VqaCollator(processor, 32, 32, texts=texts_of(processor, family_of(model.config), "vqa"))
    _, rows = load_vqa(DataArguments(dataset_name=uneven[1], eval_split="test"), tmp_path / "bad_rows.jsonl")
    batch = collate([rows[position] for position in range(len(rows))])
    with torch.no_grad():
        assert results["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert all("loss_items" not in line and line["loss"] > 0 for line in lines)
    rows_means = [line["loss"] / items for line, items in zip(lines, model.loss_items(batch).tolist(), strict=True)]
    assert abs(results["eval_loss"] - sum(rows_means) / len(rows_means)) > 0.01


def test_accumulation_gives_the_losses_and_gradient_norms_of_the_one_big_batch(recipe, data_of, uneven, tmp_path):
    common = [*data_of("blip2_t5"), *uneven, "--max_steps", "3", "--logging_steps", "1", "--skip_dry_run"]
    one = history_of(recipe(*common, output_dir=tmp_path / "one"))
    flags = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    four = history_of(recipe(*common, *flags, output_dir=tmp_path / "four"))
    for key in ("loss", "grad_norm"):
        assert [entry[key] for entry in four] == pytest.approx([entry[key] for entry in one], rel=1e-4)


def test_prompt_of_training_comes_back_with_the_checkpoint(recipe, data_of, tmp_path):
    flags = data_of("blip2_opt")
    few = ["--max_steps", "1", "--skip_dry_run", "--question_prompt", "Q: {} A:"]
    first = recipe(*flags, *few, output_dir=tmp_path / "first")
    again = ["--model_name_or_path", str(first), "--do_train", "false"]
    second = recipe(*flags, *again, output_dir=tmp_path / "second")
    assert predictions_of(first) == predictions_of(second)
    other = recipe(*flags, *again, "--question_prompt", "{}", output_dir=tmp_path / "third")
    assert [line["loss"] for line in predictions_of(other)] != [line["loss"] for line in predictions_of(second)]
    # that of another task does not
    captions = recipe(*flags, "--model_name_or_path", str(first), "--max_steps", "1", "--skip_dry_run",
                      output_dir=tmp_path / "captions", task="captioning")  # fmt: skip
    assert results_of(captions)["prompt"] == "a photo of"


def test_value_that_a_user_writes_into_the_recipe_wins(monkeypatch, image_folder, tmp_path):
    page = (RECIPES / "vqa.py").read_text()
    line = "    load_best_model_at_end: bool = False\n"
    assert page.count(line) == 1
    shutil.copytree(RECIPES / "configs", tmp_path / "configs")
    edited = line + "    learning_rate: float = 7e-4\n    generation_num_beams: int = 2\n"
    (tmp_path / "vqa.py").write_text(page.replace(line, edited))
    flags = ["--model_name_or_path", str(GOLDEN / "blip2_opt"), "--dataset_name", str(image_folder)]
    flags += ["--eval_split", "test", "--max_steps", "1", "--per_device_train_batch_size", "8", "--skip_dry_run"]
    flags += ["--use_cpu", "--dataloader_num_workers", "0", "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["vqa.py", *flags])
    runpy.run_path(str(tmp_path / "vqa.py"), run_name="__main__")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "learning_rate: 0.0007\n" in card and "generation_num_beams: 2\n" in card
    for line in ("num_train_epochs: 5", "max_answer_tokens: 32", 'question_prompt: "Question: {} Short answer:"'):
        assert f"\n{line}\n" in card  # the family's


def mistakes(name: str) -> dict[str, tuple[str, list[str], str]]:
    """What BLIP alone can do, and what a prompt cannot be: task, flags, and a part of the message."""
    family = "BLIP-2" if name.startswith("blip2") else "InstructBLIP"
    return {
        "retrieval": ("retrieval", [], f"a checkpoint of {family}, which is not supported for image_text_retrieval"),
        "ranking": ("vqa", ["--answer_mode", "rank", "--answer_list", "{answers}"], "answer_mode rank is for BLIP"),
        "start token": ("vqa", ["--question_start_token", "enc"], "question_start_token is for BLIP"),
        "smoothing": ("vqa", ["--label_smoothing", "0.1"], "dropout and drop_path are for BLIP"),
        "smoothed captions": ("captioning", ["--label_smoothing", "0.1"], "dropout and drop_path are for BLIP"),
        "dropout": ("vqa", ["--dropout", "0.1"], "dropout and drop_path are for BLIP"),
        "odd size": ("vqa", ["--image_size", "50"], "multiple of the patch size 8"),
        "no place": ("vqa", ["--question_prompt", "Answer:"], "question_prompt needs {} where the question goes"),
        "no room": ("vqa", ["--max_question_tokens", "3"], "leaves no room for a question: the prompt"),
        "no room for an answer": (
            *("vqa", ["--max_question_tokens", "100", "--max_answer_tokens", "100"] if "t5" not in name else
              ["--max_question_tokens", "400", "--max_answer_tokens", "400"]),
            "Shorten one of them",
        ),
        "prompt fills all": ("captioning", ["--prompt", "a dog on the grass " * 120], "Shorten one of them"),
        "least above most": (
            *("captioning", ["--generation_min_length", "12", "--generation_max_length", "10"]),
            "generation_min_length 12 is larger than generation_max_length 10",
        ),
        "unknown part": ("vqa", ["--freeze", "text_decoder"], "There is no part text_decoder. There are"),
        "none and more": ("vqa", ["--freeze", "none,qformer"], "There is no part none"),
        "all": (
            *("vqa", ["--freeze", "vision_model,qformer,query_tokens,language_projection,language_model"]),
            "Everything is frozen",
        ),
        "head": ("vqa", ["--use_peft", "--lora_target_modules", "q_projection"], "must name linear layers"),
    }  # fmt: skip


@pytest.mark.parametrize("mistake", mistakes("blip2_opt"))
@pytest.mark.parametrize("name", ["blip2_opt", "instructblip_t5"])
def test_mistake_ends_in_one_message_that_helps_before_the_model_loads(
    recipe, data_of, tmp_path, caplog, monkeypatch, name, mistake
):
    task, flags, message = mistakes(name)[mistake]
    (tmp_path / "answers.txt").write_text("red\ngreen\n")
    monkeypatch.delattr(PreTrainedModel, "from_pretrained")
    with pytest.raises(SystemExit) as stopped:
        recipe(*data_of(name), *(flag.replace("{answers}", str(tmp_path / "answers.txt")) for flag in flags), task=task)
    assert stopped.value.code == 1 and message in caplog.text, caplog.text


def test_float16_with_t5_is_refused_before_the_model_loads(data_of, tmp_path, monkeypatch):
    monkeypatch.delattr(PreTrainedModel, "from_pretrained")
    types = (ModelArguments, DataArguments, VqaArguments, PeftArguments, BlipTrainingArguments)
    for name in ("blip2_t5", "blip2_opt"):
        flags = [*data_of(name), "--use_cpu", "--output_dir", str(tmp_path / name)]
        arguments = parse(*types, argv=flags)
        arguments[-1].fp16 = True  # on the CPU it is refused for every model
        if name == "blip2_opt":
            assert prepare_run("vqa", *arguments).family.name == "BLIP-2"
        else:
            with pytest.raises(ValueError, match="T5 overflows in float16. Use --bf16"):
                prepare_run("vqa", *arguments)


@pytest.mark.slow
def test_two_processes_give_the_losses_and_predictions_of_one(recipe, data_of, uneven, tmp_path):
    common = [*data_of("blip2_t5"), *uneven, "--num_train_epochs", "2", "--logging_steps", "1"]
    common += ["--max_train_samples", "7", "--max_eval_samples", "7"]  # unevenly many for each process
    one = recipe(*common, "--per_device_train_batch_size", "4", output_dir=tmp_path / "one")
    share = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--use_cpu"]
    words = [RECIPES / "vqa.py", *common, *share, "--dataloader_num_workers", "0", "--output_dir", tmp_path / "two"]
    for code, errors in run_ranks(*words, folder=tmp_path):
        assert code == 0, errors[-3000:]
    for name in ("loss", "grad_norm"):
        values = [[entry[name] for entry in history_of(tmp_path / run)] for run in ("one", "two")]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    for line, other in zip(predictions_of(one), predictions_of(tmp_path / "two"), strict=True):
        for name in ("loss", "probability"):
            assert line.pop(name) == pytest.approx(other.pop(name), rel=1e-3)
        assert line == other
