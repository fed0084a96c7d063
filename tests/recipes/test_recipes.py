"""Recipes as users start them: what they write, what they refuse, and that equal runs give equal numbers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RECIPES, TASKS, history_of, predictions_of, results_of
from peft import PeftModel
from programs import run_ranks
from safetensors.torch import load_file
from transformers import BlipProcessor, PreTrainedModel
from transformers.models.blip import modeling_blip

from blip_ft.arguments import BlipTrainingArguments
from blip_ft.data import text_formats
from blip_ft.models import load_model
from blip_ft.training import feature_cache
from blip_ft.training.trainer import BlipTrainer


@pytest.fixture
def data(data_of):
    return data_of("vqa")


# task -> epochs, and a part of the results after them
MEMORIZED = {
    "vqa": (40, {"eval_exact_match": 100, "eval_vqa_accuracy": 100, "scoring_rule": "match with any of the answers"}),
    "captioning": (120, {"eval_exact_match": 100, "prompt": "a picture of "}),
    "retrieval": (150, {"eval_text_recall@1": 100, "eval_image_recall@1": 100}),
}


@pytest.mark.draws_curves
@pytest.mark.parametrize("task", MEMORIZED)
def test_eight_rows_are_memorized_and_every_file_is_written(recipe, data_of, task):
    epochs, wanted = MEMORIZED[task]
    flags = ["--num_train_epochs", str(epochs), "--logging_steps", "1", "--sample_steps", "20"]
    flags += ["--load_best_model_at_end", "false"]  # the last epoch is also the best, and needs no evaluation before it
    flags += ["--save_strategy", "steps", "--save_steps", str(epochs)]  # each epoch is one step
    folder = recipe(*data_of(task), *flags, task=task)
    assert results_of(folder).items() >= wanted.items()
    losses = [entry["loss"] for entry in history_of(folder)]
    assert losses[-1] < losses[0] / 2
    written = {path.name for path in folder.iterdir()}
    assert written >= {
        *("model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "README.md"),
        *("all_results.json", "trainer_state.json", "predictions.jsonl", f"checkpoint-{epochs}"),
        *("report.html", "training_curves.png"),
    }
    for row in predictions_of(folder):
        assert row["prediction"] in row["answers" if task == "vqa" else "captions"]
    stock = getattr(modeling_blip, TASKS[task].__name__)
    assert f"{stock.__name__}.from_pretrained" in (folder / "README.md").read_text()
    _, info = stock.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_no_reference_caption_reaches_the_model_in_evaluation(recipe, data_of, image_folder, tmp_path):
    """With other references the model writes the same captions."""
    written = []
    rows = [json.loads(line) for line in (image_folder / "metadata.jsonl").read_text().splitlines()]
    for name in ("plain", "other"):
        folder = shutil.copytree(image_folder, tmp_path / name)
        if name == "other":
            rows = [{**row, "caption": "two giraffe"} if row["split"] == "test" else row for row in rows]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--dataset_name", str(folder), "--max_steps", "4"]
        run = recipe(*data_of("captioning"), *flags, output_dir=tmp_path / f"run_{name}", task="captioning")
        written.append([row["prediction"] for row in predictions_of(run)])
        assert results_of(run)["eval_exact_match"] == 0
    assert written[0] == written[1] and any(written[0])


def test_retrieval_warns_about_accumulation_and_trains_without_a_queue(recipe, data_of, caplog):
    flags = ["--queue_size", "0", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    folder = recipe(*data_of("retrieval"), *flags, "--max_steps", "2", task="retrieval")
    assert "averages the contrastive loss over small batches" in caplog.text
    state = load_file(folder / "checkpoint-2" / "contrastive.safetensors")
    assert state["image_queue"].shape[0] == 0 and state["num_queued"] == 16
    assert not any(name.startswith("momentum") or "queue" in name for name in load_file(folder / "model.safetensors"))


def test_temperature_is_trained_and_saved_with_the_checkpoint(recipe, data_of):
    folder = recipe(*data_of("retrieval"), "--max_steps", "3", task="retrieval")
    state = load_file(folder / "checkpoint-3" / "contrastive.safetensors")
    assert state["temperature"] != pytest.approx(0.07, abs=1e-4) and state["num_queued"] == 24


# in retrieval accumulation changes the loss, because the negatives are in the batch
@pytest.mark.parametrize("task", ["vqa", "captioning", "vqa --augment"])
def test_accumulation_gives_the_losses_and_gradient_norms_of_the_one_big_batch(recipe, data_of, tmp_path, task):
    task, *augment = task.split()
    common = [*data_of(task), *augment, "--max_steps", "4", "--logging_steps", "1", "--lr_scheduler_type", "constant"]
    one = history_of(recipe(*common, output_dir=tmp_path / "one", task=task))
    flags = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    four = history_of(recipe(*common, *flags, output_dir=tmp_path / "four", task=task))
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in four] == pytest.approx([entry[name] for entry in one], rel=1e-4)


@pytest.mark.parametrize("task", [*TASKS, "captioning --augment"])
def test_two_processes_give_the_losses_and_predictions_of_one(recipe, data_of, tmp_path, task):
    task, *augment = task.split()
    # retrieval draws negatives in each process, so only the evaluation is the same
    rate = ["--learning_rate", "0"] if task == "retrieval" else []
    # the last batch is dropped, and two processes evaluate different numbers of rows
    odd = ["--max_train_samples", "7", "--max_eval_samples", "3" if task == "retrieval" else "7"]
    common = [*data_of(task), *augment, *rate, *odd, "--num_train_epochs", "3", "--logging_steps", "1"]
    one = recipe(*common, "--per_device_train_batch_size", "4", output_dir=tmp_path / "one", task=task)
    # with accumulation for the tasks in which it is exact
    share = ["2"] if task == "retrieval" else ["1", "--gradient_accumulation_steps", "2"]
    flags = ["--per_device_train_batch_size", *share, "--use_cpu", "--dataloader_num_workers", "0"]
    words = [RECIPES / f"{task}.py", *common, *flags, "--output_dir", tmp_path / "two"]
    for code, errors in run_ranks(*words, folder=tmp_path):
        assert code == 0, errors[-3000:]
    if task != "retrieval":
        for name in ("loss", "grad_norm"):
            values = [[entry[name] for entry in history_of(tmp_path / run)] for run in ("one", "two")]
            assert values[0] == pytest.approx(values[1], rel=1e-4)
    rows, others = predictions_of(one), predictions_of(tmp_path / "two")
    for name in ("loss", "probability", "score"):
        values = [[row.pop(name, 0.0) for row in part] for part in (rows, others)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert rows == others
    scores = [
        {name: value for name, value in results_of(tmp_path / run).items() if "recall" in name or "cider" in name}
        for run in ("one", "two")
    ]
    assert scores[0] == pytest.approx(scores[1])


def test_launched_without_arguments_it_trains_the_demo_and_says_so(tmp_path):
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--quiet", str(RECIPES / "vqa.py")]
    done = subprocess.run(
        [*command, "--max_steps", "2", "--max_eval_samples", "60"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "training the built-in small model on built-in images" in done.stderr
    assert "--dataset_name FOLDER" in done.stderr
    results = results_of(tmp_path / "outputs" / "vqa")
    assert results["before_training_exact_match"] < 50
    assert (tmp_path / "outputs" / "vqa" / "model.safetensors").is_file()


def test_demo_learns_to_answer_nine_of_ten_questions_about_new_images(demo_run):
    results = results_of(demo_run("vqa"))
    assert results["before_training_exact_match"] < 50
    assert results["eval_exact_match"] >= 90
    assert results["answer_types"] == "of the data"


@pytest.mark.slow
def test_demo_learns_to_write_captions_of_new_images_exactly(demo_run):
    results = results_of(demo_run("captioning"))
    assert results["before_training_exact_match"] < 50
    assert results["eval_exact_match"] >= 95


@pytest.mark.slow
def test_demo_learns_to_find_new_images_and_their_texts(demo_run):
    results = results_of(demo_run("retrieval"))
    for name in ("text_recall", "image_recall"):
        assert results[f"before_training_{name}@10"] < 20
        assert results[f"eval_{name}@10"] >= 95 and results[f"eval_{name}@1"] >= 50
        for k in (1, 5, 10):
            assert results[f"eval_{name}@{k}"] >= results[f"eval_itc_{name}@{k}"] - 2
    assert len(predictions_of(demo_run("retrieval"))) == 200


@pytest.mark.parametrize(
    ("task", "bits"),
    [
        ("vqa", None),
        ("vqa", 8),
        ("vqa", 4),
        ("captioning", None),
        ("captioning", 4),
        ("retrieval", None),
        ("retrieval", 8),
    ],
)
def test_adapter_trains_with_checkpointing_and_loads_in_stock(recipe, data_of, checkpoints, task, bits):
    quantized = [f"--load_in_{bits}bit"] if bits else []
    folder = recipe(
        *data_of(task),
        *("--use_peft", *quantized, "--max_steps", "3", "--gradient_checkpointing", "--logging_steps", "1"),
        *("--gradient_checkpointing_kwargs", '{"use_reentrant": false}'),
        task=task,
    )
    assert not (folder / "model.safetensors").exists()
    adapter = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert not any(".cls." in name for name in adapter)
    losses = [entry["loss"] for entry in history_of(folder)]
    assert losses[-1] < losses[0]

    adapted = PeftModel.from_pretrained(
        getattr(modeling_blip, TASKS[task].__name__).from_pretrained(checkpoints[task]), folder
    ).eval()
    ids = torch.tensor([[101, 6, 7, 102], [101, 8, 5, 102]])
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "vqa":
        inputs["labels"] = inputs["decoder_input_ids"] = torch.tensor([[126, 28], [126, 9]])
    elif task == "captioning":
        inputs["labels"] = ids
    output = "itm_score" if task == "retrieval" else "loss"
    before = adapted(**inputs)[output]
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**inputs)[output], before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flags", [["--use_peft"], ["--model_name_or_path", "demo"]], ids=["adapter", "demo"])
def test_same_seed_gives_the_same_weights_and_another_does_not(recipe, data, tmp_path, flags):
    losses = []
    for number, seed in enumerate(("1", "1", "2")):
        torch.manual_seed(number)
        few = [*data, *flags, "--max_steps", "2", "--logging_steps", "1", "--seed", seed]
        losses.append([entry["loss"] for entry in history_of(recipe(*few, output_dir=tmp_path / str(number)))])
    assert losses[0] == losses[1] != losses[2]


def test_adapter_remembers_image_size_and_start_token(recipe, data, tmp_path):
    flags = ["--use_peft", "--image_size", "48", "--question_start_token", "enc", "--max_steps", "2"]
    folder = recipe(*data, *flags)
    loaded = load_model(folder)
    config = loaded["model"].get_base_model().config
    assert config.vision_config.image_size == loaded["image_processor"].size["width"] == 48
    assert config.question_start_token == "enc"


def test_saved_tokenizer_does_not_cut(recipe, data):
    folder = recipe(*data, "--max_steps", "1")
    assert len(BlipProcessor.from_pretrained(folder)(text="dog " * 60)["input_ids"]) == 62


def test_adapter_on_an_adapter_and_on_new_weights_is_refused(recipe, data, tmp_path, caplog):
    first = recipe(*data, "--use_peft", "--max_steps", "1", output_dir=tmp_path / "first")
    for name, message in (
        (str(first), "is an adapter itself. Merge it first"),
        ("demo", "new in each run"),
    ):
        with pytest.raises(SystemExit):
            recipe(*data, "--use_peft", "--model_name_or_path", name, output_dir=tmp_path / "second")
        assert message in caplog.text
    # without --use_peft the adapter becomes part of the weights, and all weights are trained
    folder = recipe(*data, "--model_name_or_path", str(first), "--max_steps", "1", output_dir=tmp_path / "third")
    assert (folder / "model.safetensors").is_file()


def test_frozen_parts_do_not_change(recipe, data, checkpoint):
    folder = recipe(*data, "--max_steps", "2", "--freeze", "vision_model,text_encoder.embeddings")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith(("vision_model.", "text_encoder.embeddings.")) for name in changed)


@pytest.mark.parametrize(("dtype", "rel"), [("fp32", 1e-5), ("bf16", 2**-8)])
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_cached_features_give_the_losses_of_the_vision_model_without_running_it(
    recipe, data_of, tmp_path, monkeypatch, task, dtype, rel
):
    monkeypatch.setattr(feature_cache, "HF_CACHE_HOME", str(tmp_path / "cache"))
    in_training = []
    monkeypatch.setattr(
        *(modeling_blip.BlipVisionModel, "forward"),
        lambda self, *args, run=modeling_blip.BlipVisionModel.forward, **kwargs: (
            in_training.append(self.training) or run(self, *args, **kwargs)
        ),
    )
    common = [*data_of(task), "--freeze", "vision_model", "--num_train_epochs", "3", "--logging_steps", "1"]
    plain = recipe(*common, output_dir=tmp_path / "plain", task=task)
    assert in_training.count(True) == 3
    in_training.clear()
    flags = ["--cache_image_features", "--cache_dtype", dtype]
    cached = recipe(*common, *flags, output_dir=tmp_path / "cached", task=task)
    assert in_training and not any(in_training)
    losses = [[entry["loss"] for entry in history_of(folder)] for folder in (plain, cached)]
    assert losses[1] == pytest.approx(losses[0], rel=rel)


def test_cached_features_are_those_of_the_checkpoint_that_a_run_resumes_from(recipe, data, tmp_path, monkeypatch):
    """Before the checkpoint is loaded, the weights of the demo model are new in each run."""
    monkeypatch.setattr(feature_cache, "HF_CACHE_HOME", str(tmp_path / "cache"))
    common = [*data, "--model_name_or_path", "demo", "--freeze", "vision_model", "--max_steps", "3"]
    common += ["--save_steps", "1", "--save_strategy", "steps", "--save_total_limit", "9", "--logging_steps", "1"]
    whole = recipe(*common, output_dir=tmp_path / "whole")
    cut = shutil.copytree(whole, tmp_path / "cut")
    for step in (2, 3):
        shutil.rmtree(cut / f"checkpoint-{step}")
    flags = ["--cache_image_features", "--cache_dtype", "fp32", "--resume_from_checkpoint", "last"]
    recipe(*common, *flags, output_dir=cut)
    losses = [[entry["loss"] for entry in history_of(folder)] for folder in (whole, cut)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_evaluation_without_a_readable_image_scores_nothing_and_ends(recipe, data_of, image_folder, tmp_path):
    folder = shutil.copytree(image_folder, tmp_path / "broken")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines = [{**row, "file_name": "gone.png"} if row["split"] == "test" else row for row in lines]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    flags = ["--dataset_name", str(folder), "--max_bad_fraction", "0.6", "--max_steps", "1"]
    results = results_of(recipe(*data_of("vqa"), *flags))
    assert results["eval_exact_match"] == 0 and results["eval_unreadable_images"] == 8


def test_model_flags_are_stored_in_the_checkpoint(recipe, data):
    flags = ["--image_size", "48", "--dropout", "0.2", "--label_smoothing", "0.3", "--question_start_token", "enc"]
    flags += ["--drop_path", "0.1"]
    config = json.loads((recipe(*data, *flags, "--max_steps", "1") / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 48 and config["vision_config"]["drop_path"] == 0.1
    assert config["text_config"]["hidden_dropout_prob"] == config["text_config"]["attention_probs_dropout_prob"] == 0.2
    assert config["text_config"]["label_smoothing"] == 0.3
    assert config["question_start_token"] == "enc"


def test_ranking_answers_only_from_the_list(recipe, data, tmp_path):
    (tmp_path / "answers.txt").write_text("red\ngreen\ntwo\n")
    flags = ["--answer_mode", "rank", "--answer_list", str(tmp_path / "answers.txt"), "--max_steps", "1"]
    lines = (recipe(*data, *flags) / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["prediction"] for line in lines} <= {"red", "green", "two"}


@pytest.mark.parametrize("task", [*TASKS, "vqa --augment"])
def test_resumed_run_equals_unbroken_run(recipe, data_of, tmp_path, task):
    task, *augment = task.split()
    common = [*data_of(task), *augment, "--num_train_epochs", "4", "--per_device_train_batch_size", "4"]
    common += ["--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "9"]
    whole = recipe(*common, output_dir=tmp_path / "whole", task=task)
    cut = shutil.copytree(whole, tmp_path / "cut")
    for step in (6, 8):
        shutil.rmtree(cut / f"checkpoint-{step}")
    recipe(*common, "--resume_from_checkpoint", "last", output_dir=cut, task=task)
    a, b = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_compiled_run_gives_the_same_losses_and_stops_compiling(recipe, data, tmp_path):
    flags = ["--per_device_train_batch_size", "3", "--logging_steps", "1", "--sample_steps", "0"]
    stats = torch._dynamo.utils.counters["stats"]
    graphs = []
    for steps in ("6", "12"):
        torch._dynamo.reset()
        stats.clear()
        flags_now = [*flags, "--torch_compile", "--max_steps", steps, "--lr_scheduler_type", "constant"]
        compiled = history_of(recipe(*data, *flags_now, output_dir=tmp_path / steps))
        graphs.append(stats["unique_graphs"])
    constant = [*flags, "--max_steps", "12", "--lr_scheduler_type", "constant"]
    plain = history_of(recipe(*data, *constant, output_dir=tmp_path / "constant"))
    assert [entry["loss"] for entry in compiled] == pytest.approx([entry["loss"] for entry in plain], rel=1e-4)
    assert graphs[0] == graphs[1]


MISTAKES = {
    "unknown flag": (["--learning_rat", "1"], "Did you mean learning_rate"),
    "no such model": (["--model_name_or_path", "/no/such/model"], "The folder /no/such/model does not exist"),
    "no such model for an adapter": (["--use_peft", "--model_name_or_path", "owner/none"], "or check the name"),
    "no such data": (["--dataset_name", "/no/such/data"], "Check the path"),
    "no such column": (["--question_column", "q"], "Set question_column, e.g. --question_column question"),
    "no such split": (["--eval_split", "dev"], "the data has train, test"),
    "two widths": (["--use_peft", "--load_in_8bit", "--load_in_4bit"], "mutually exclusive"),
    "bits without adapter": (["--load_in_4bit"], "requires --use_peft"),
    "unshifted smoothing": (["--label_smoothing_factor", "0.1"], "Use --label_smoothing"),
    "freeze nothing": (["--freeze", "classifier"], "There are vision_model, text_encoder, text_decoder"),
    "freeze all": (["--freeze", "vision_model,text_encoder,text_decoder"], "Everything is frozen"),
    "batch too large": (["--per_device_train_batch_size", "64"], "Choose at most 8"),
    "rank without list": (["--answer_mode", "rank"], "--answer_mode rank --answer_list FILE"),
    "cache of views": (["--augment", "--cache_image_features"], "Leave out one of the two"),
    "cache without freeze": (["--cache_image_features"], "Add --freeze vision_model"),
    "odd size": (["--image_size", "50"], "multiple of the patch size 8"),
    "empty batch": (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1"),
    "no answer": (["--generation_max_length", "0"], "generation_max_length must be between 3 and 512"),
    "no epoch": (["--num_train_epochs", "-1"], "num_train_epochs must be"),
    "endless": (["--num_train_epochs", "inf"], "num_train_epochs must be at least 1e-06, found inf"),
    "seed below 0": (["--seed", "-1"], "seed must be between 0 and"),
    "no momentum": (["--adam_beta1", "2"], "Invalid beta parameter at index 0"),
    "scheduler lacks a setting": (["--lr_scheduler_type", "warmup_stable_decay"], "and --lr_scheduler_kwargs: "),
    "best of none": (["--save_strategy", "best"], "Add --eval_strategy epoch or steps"),
    "workers persist": (["--dataloader_persistent_workers"], "set --dataloader_num_workers above 0"),
    "unread settings": (["--generation_config", "file.json"], "Use --generation_max_length"),
    "no YAML": (
        ["--config", str(RECIPES.parent / "tests" / "golden" / "vqa" / "model.safetensors")],
        "is not valid YAML",
    ),
    "no such metric": (["--metric_for_best_model", "f1"], "must be one of vqa_accuracy, exact_match, loss"),
    "no such target": (["--use_peft", "--lora_target_modules", "q_proj"], "must name linear layers"),
    "no such checkpoint": (["--resume_from_checkpoint", "/no/checkpoint-1"], "there is no such folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_message_that_helps_before_the_model_loads(recipe, data, caplog, monkeypatch, mistake):
    flags, message = MISTAKES[mistake]
    monkeypatch.delattr(PreTrainedModel, "from_pretrained")
    with pytest.raises(SystemExit) as stopped:
        recipe(*data, *flags)
    assert stopped.value.code not in (0, None)
    assert message in caplog.text
    assert "Traceback" not in caplog.text


def test_other_adapter_than_the_checkpoints_is_refused(recipe, data, tmp_path, caplog):
    folder = recipe(*data, "--use_peft", "--lora_r", "4", "--max_steps", "1")
    for flags, message in (
        (["--use_peft", "--lora_r", "8"], "lora_r: 4 -> 8"),
        (["--use_peft", "--lora_r", "4", "--lora_alpha", "8"], "lora_alpha: 32 -> 8"),
        (["--use_peft", "--lora_r", "4", "--lora_target_modules", "query"], 'lora_target_modules: null -> ["query"]'),
        ([], "contains an adapter. Add --use_peft"),
    ):
        with pytest.raises(SystemExit):
            recipe(*data, *flags, "--max_steps", "1", "--resume_from_checkpoint", "last", output_dir=folder)
        assert message in caplog.messages[-1]


def test_checkpoint_that_does_not_fit_is_refused_also_with_changed_settings_allowed(recipe, data, caplog):
    folder = recipe(*data, "--max_steps", "1")
    for flags in (["--freeze", "vision_model"], ["--optim", "sgd"], ["--image_size", "16"]):
        resume = ["--max_steps", "1", "--resume_from_checkpoint", "last", "--allow_changed_settings"]
        with pytest.raises(SystemExit):
            recipe(*data, *flags, *resume, output_dir=folder)
        assert "Resume with the settings of that run" in caplog.messages[-1]


def test_checkpoint_without_optimizer_is_not_resumed(recipe, data, caplog):
    folder = recipe(*data, "--max_steps", "1", "--save_only_model")
    with pytest.raises(SystemExit):
        recipe(*data, "--resume_from_checkpoint", "last", output_dir=folder)
    assert f"--model_name_or_path {folder / 'checkpoint-1'}, with another output_dir" in caplog.text


def test_best_metric_that_is_not_measured_ends_in_a_message(recipe, data, caplog):
    best = ["--save_strategy", "best", "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "1"]
    folder = recipe(*data, *best)
    assert (folder / "checkpoint-1").is_dir()
    with pytest.raises(SystemExit):
        recipe(*data, *best, "--metric_for_best_model", "vqa_accuracy_nine", output_dir=folder.with_name("other"))
    assert "is not measured here. Choose one of vqa_accuracy, exact_match" in caplog.messages[-1]


def test_weights_of_other_shapes_than_the_config_are_refused(recipe, data, checkpoint, tmp_path, caplog):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 48
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        recipe(*data, "--model_name_or_path", str(broken))
    assert "do not have the shapes described in its config.json" in caplog.text


def test_several_gpus_and_one_process_say_how_to_launch(recipe, data, monkeypatch, caplog):
    monkeypatch.setattr(BlipTrainingArguments, "n_gpu", 2)
    with pytest.raises(SystemExit):
        recipe(*data)
    assert "accelerate launch --multi_gpu" in caplog.text


def run_out_of_memory(where: str) -> None:
    if where == "2.00 GiB":  # on a GPU
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    np.empty(10**16) if where == "PiB" else torch.empty(10**16)


@pytest.mark.parametrize("where", ["2.00 GiB", "PiB", "40000000000000000 bytes"])
def test_too_little_memory_says_what_to_lower(recipe, data, monkeypatch, caplog, where):
    monkeypatch.setattr(BlipTrainer, "training_step", lambda *args, **kwargs: run_out_of_memory(where))
    with pytest.raises(SystemExit):
        recipe(*data)
    assert "Lower --per_device_train_batch_size" in caplog.messages[-1] and where in caplog.messages[-1]


def test_other_errors_of_the_libraries_keep_their_traceback(recipe, data, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(BlipTrainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        recipe(*data)


def test_output_dir_that_cannot_be_made_is_refused_before_the_model_loads(recipe, data, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.delattr(PreTrainedModel, "from_pretrained")
    with pytest.raises(SystemExit):
        recipe(*data, output_dir=tmp_path / "file" / "run")
    assert f"{tmp_path / 'file'} is not a folder with write permission" in caplog.messages[-1]


def test_mistake_shows_its_traceback_if_asked(recipe, data):
    with pytest.raises(ValueError, match="Choose at most 8"):
        recipe(*data, "--per_device_train_batch_size", "64", "--traceback")


def test_output_dir_in_use_is_refused(recipe, data, tmp_path, caplog):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(SystemExit):
        recipe(*data, output_dir=tmp_path / "used")
    assert "is not empty" in caplog.text and "--resume_from_checkpoint last" in caplog.text


def test_retrieval_refuses_the_settings_of_tasks_that_write(recipe, data_of, caplog):
    for flag, value in (("label_smoothing", "0.2"), ("generation_num_beams", "2"), ("cache_dtype", "fp32")):
        with pytest.raises(SystemExit):
            recipe(*data_of("retrieval"), f"--{flag}", value, task="retrieval")
        assert f"{flag} " in caplog.messages[-1] and "has no effect" in caplog.messages[-1]


def test_retrieval_lowers_its_rate_when_recall_no_longer_rises(recipe, data_of):
    flags = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps", "--eval_steps", "1"]
    folder = recipe(*data_of("retrieval"), *flags, "--max_steps", "2", task="retrieval")
    assert "eval_recall_mean" in results_of(folder)


def test_demo_model_on_own_data_learns_at_its_own_rate(recipe, image_folder, caplog):
    flags = ["--dataset_name", str(image_folder), "--eval_split", "test", "--per_device_train_batch_size", "8"]
    caplog.set_level("INFO", "blip_ft")
    folder = recipe("--model_name_or_path", "demo", *flags, "--max_steps", "1", "--logging_steps", "1")
    assert "taking learning_rate 8e-4 and warmup_steps 0.1" in caplog.text
    assert "learning_rate: 0.0008" in (folder / "README.md").read_text()


# flags, and a part of the message. The default prompt takes four tokens
CAPTION_MISTAKES = {
    "prompt fills the captions": (
        ["--max_caption_tokens", "5"],
        "max_caption_tokens is 5, but the prompt 'a picture of ', one word and [SEP] need 6 tokens",
    ),
    "prompt fills what is written": (["--prompt", "a dog on the grass " * 4], "Set --generation_max_length to 23"),
    "nothing can be written": (["--generation_max_length", "3"], "Set --generation_max_length to 6 or more"),
    "least above most": (
        ["--generation_min_length", "12", "--generation_max_length", "10"],
        "generation_min_length 12 is larger than generation_max_length 10",
    ),
}


@pytest.mark.parametrize("mistake", CAPTION_MISTAKES)
def test_lengths_that_leave_nothing_of_a_caption_are_refused_before_the_model_loads(
    recipe, data_of, caplog, monkeypatch, mistake
):
    flags, message = CAPTION_MISTAKES[mistake]
    monkeypatch.delattr(PreTrainedModel, "from_pretrained")
    with pytest.raises(SystemExit) as stopped:
        recipe(*data_of("captioning"), *flags, task="captioning")
    assert stopped.value.code == 1 and message in caplog.text


def test_run_whose_batches_contain_no_token_to_learn_is_stopped(recipe, data_of, caplog, monkeypatch):
    monkeypatch.setattr(text_formats, "require_room", lambda *args: None)
    with pytest.raises(SystemExit):
        recipe(*data_of("captioning"), "--max_caption_tokens", "4", task="captioning")
    assert "The batches of a step contain no token to learn" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("yes\n".encode("utf-16"), "is not text in UTF-8 (invalid start byte at byte 0). Save it as UTF-8"),
        (b'["yes", {"a": 1}]', "contains something other than answers"),
        (b'{"yes": 1}', "contains something other than answers"),
        (b'["yes"', "is not valid JSON"),
        (b"\n", "contains no answers"),
    ],
)
def test_invalid_answer_list_is_refused_before_the_model_loads(
    recipe, data, tmp_path, caplog, monkeypatch, content, message
):
    (tmp_path / "answers.txt").write_bytes(content)
    monkeypatch.delattr(PreTrainedModel, "from_pretrained")
    for path, part in ((tmp_path / "answers.txt", message), (tmp_path, "needs a text file")):
        with pytest.raises(SystemExit):
            recipe(*data, "--answer_mode", "rank", "--answer_list", str(path))
        assert part in caplog.messages[-1]


@pytest.fixture
def three_splits(image_folder, tmp_path):
    """The rows of image_folder: those of the third image to evaluate on, those of the fourth to test on."""
    folder = shutil.copytree(image_folder, tmp_path / "three")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    splits = {"2.png": "val", "3.png": "test"}
    rows = [{**row, "split": splits.get(row["file_name"], "train")} for row in rows if row["split"] == "train"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset_name", str(folder), "--eval_split", "val", "--per_device_train_batch_size", "4"]


def evaluations_of(folder: Path, name: str) -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[f"eval_{name}"] for entry in history if f"eval_{name}" in entry}


@pytest.mark.parametrize(
    ("task", "metric"), [("captioning", "cider"), ("captioning lora", "cider"), ("retrieval", "recall_mean")]
)
def test_captions_and_retrieval_end_with_the_best_epoch(recipe, data_of, tmp_path, monkeypatch, task, metric):
    """The second of three epochs scores best, independent of the weights."""
    task, *lora = task.split()
    scored = iter([1.0, 3.0, 2.0, 3.0])
    monkeypatch.setattr(
        *(BlipTrainer, "evaluation_loop"),
        lambda self, *args, run=BlipTrainer.evaluation_loop, **kwargs: (
            lambda output: output._replace(metrics={**output.metrics, f"eval_{metric}": next(scored)})
        )(run(self, *args, **kwargs)),
    )
    flags = [*data_of(task), *(["--use_peft"] if lora else [])]
    folder = recipe(*flags, "--num_train_epochs", "3", "--save_total_limit", "1", "--skip_dry_run", task=task)
    assert evaluations_of(folder, metric) == {1: 1.0, 2: 3.0, 3: 2.0}
    results = results_of(folder)
    assert results[f"eval_{metric}"] == 3.0
    assert results["checkpoint"] == f"step 2 of 3, the best by {metric} on split test"
    for page in ("report.html", "README.md"):
        assert f"step 2 of 3, the best by {metric} on split test" in (folder / page).read_text().replace("\\", "")
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    kept, result = (load_file(path / weights) for path in (folder / "checkpoint-2", folder))
    assert all(torch.equal(kept[name], result[name]) for name in kept)
    monkeypatch.undo()
    # these weights also wrote the predictions
    alone = ["--model_name_or_path", str(folder), "--do_train", "false"]
    again = recipe(*data_of(task), *alone, output_dir=tmp_path / "again", task=task)
    assert [row["prediction"] for row in predictions_of(again)] == [row["prediction"] for row in predictions_of(folder)]


def test_last_epoch_is_the_result_of_questions_and_if_asked_for(recipe, data_of, tmp_path):
    flags = ["--num_train_epochs", "2", "--load_best_model_at_end", "false"]
    for task, more in (("captioning", flags), ("vqa", flags[:2])):
        folder = recipe(*data_of(task), *more, output_dir=tmp_path / task, task=task)
        assert evaluations_of(folder, "exact_match") == {}
        assert results_of(folder)["checkpoint"] == "the last, step 2; not chosen by a score"
        last, result = (load_file(path / "model.safetensors") for path in (folder / "checkpoint-2", folder))
        assert all(torch.equal(last[name], result[name]) for name in last)


def test_stream_of_captions_keeps_the_best_of_ten_evaluations(recipe, data_of):
    flags = [*data_of("captioning"), "--streaming", "--max_steps", "20", "--generation_num_beams", "1"]
    folder = recipe(*flags, task="captioning")
    scores = evaluations_of(folder, "cider")
    assert list(scores) == list(range(2, 21, 2))
    assert results_of(folder)["eval_cider"] == pytest.approx(max(scores.values()))
    assert results_of(folder)["eval_images_trained_on"] is None
    assert "because those were streamed" in (folder / "README.md").read_text()


def test_resumed_run_ends_with_the_best_checkpoint_of_its_own_folder(recipe, data_of, tmp_path, monkeypatch, caplog):
    """The first epoch scores best. The folder is moved before the run is resumed, or has lost that checkpoint."""
    flags = [*data_of("captioning"), "--num_train_epochs", "3", "--save_total_limit", "9"]
    loop = BlipTrainer.evaluation_loop

    def scores(self, *args, **kwargs):
        output = loop(self, *args, **kwargs)
        output.metrics["eval_cider"] = 10.0 - self.state.global_step
        return output

    monkeypatch.setattr(BlipTrainer, "evaluation_loop", scores)
    whole = recipe(*flags, output_dir=tmp_path / "whole", task="captioning")
    shutil.rmtree(whole / "checkpoint-3")
    for lost, best in ((), 1), ((1,), 3):
        cut = shutil.copytree(whole, tmp_path / f"lost {len(lost)}")
        for step in lost:
            shutil.rmtree(cut / f"checkpoint-{step}")
        again = recipe(*flags, "--resume_from_checkpoint", "last", output_dir=cut, task="captioning")
        kept, result = (load_file(path / "model.safetensors") for path in (again / f"checkpoint-{best}", again))
        assert all(torch.equal(kept[name], result[name]) for name in kept)
        assert results_of(again)["checkpoint"].startswith(f"step {best} of 3")
    assert f"The best checkpoint so far, {cut / 'checkpoint-1'}, is gone" in caplog.text


@pytest.mark.parametrize("task", TASKS)
def test_final_model_is_evaluated_once_on_the_test_rows(recipe, data_of, three_splits, task):
    folder = recipe(*data_of(task), *three_splits, "--test_split", "test", "--num_train_epochs", "2", task=task)
    results = results_of(folder)
    metrics = {name.removeprefix("eval_") for name in results if name.startswith("eval_")}
    tested = {name.removeprefix("test_") for name in results if name.startswith("test_")}
    assert metrics == tested - {"scoring_rule", "images_evaluated_on"}
    assert results["test_images_evaluated_on"] == 0
    assert results["test_images"] == 1 and results["test_images_trained_on"] == 0
    assert {name for name in results if name.startswith("baseline_test_")}
    lines = (folder / "test_predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["image_id"] for line in lines} == {"3.png"}
    assert {row["image_id"] for row in predictions_of(folder)} == {"2.png"}
    assert "test_predictions.jsonl" in (folder / ".gitignore").read_text()
    card, report = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    assert "On split val. None of its 1 images was trained on in this run." in card
    assert "On split test, once, with the final model. None of its 1 images was trained on in this run." in card
    assert "split test (the final model, once)" in report
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert not any(name.startswith("test_") for entry in history for name in entry)


def test_images_that_are_also_trained_on_are_counted_in_results_card_and_report(recipe, data, image_folder):
    flags = ["--test_dataset_name", str(image_folder), "--test_split", "train", "--allow_image_overlap"]
    folder = recipe(*data, *flags, "--max_steps", "1", "--max_eval_samples", "3")
    results = results_of(folder)
    assert results["eval_images_trained_on"] == results["eval_images"] == 2
    assert results["test_images_trained_on"] == 2
    for page in ("README.md", "report.html"):
        text = (folder / page).read_text()
        assert text.count("2 of its 2 images were also trained on: they say little about new images.") == 2
        assert "not trained on" not in text


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("start", ["checkpoint", "adapter"])
def test_without_do_train_a_run_evaluates_only(recipe, data_of, checkpoints, tmp_path, monkeypatch, task, start):
    flags, model = data_of(task), checkpoints[task]
    if start == "adapter":
        model = recipe(*flags, "--use_peft", "--max_steps", "2", output_dir=tmp_path / "adapter", task=task)
    monkeypatch.setattr(BlipTrainer, "train", None)
    # more rows per step than there are, because evaluation has no steps
    alone = ["--model_name_or_path", str(model), "--do_train", "false", "--per_device_train_batch_size", "64"]
    folder = recipe(*flags, *alone, "--eval_on_start", output_dir=tmp_path / "alone", task=task)
    written = {path.name for path in folder.iterdir()}
    assert written == {".gitignore", "all_results.json", "predictions.jsonl", "report.html"}
    results = results_of(folder)
    assert not any(name.startswith(("train", "before_training")) or "trained_on" in name for name in results)
    if start == "adapter":
        trained = results_of(model)
        names = [name for name in trained if "recall" in name or "cider" in name or "accuracy" in name]
        assert {name: results[name] for name in names} == pytest.approx({name: trained[name] for name in names})


def test_evaluation_only_accepts_training_rows_and_refuses_a_push(recipe, data, caplog):
    folder = recipe(*data, "--do_train", "false", "--eval_split", "train")
    assert len(predictions_of(folder)) == 8
    for flags in (["--push_to_hub"], ["--resume_from_checkpoint", "last"]):
        with pytest.raises(SystemExit):
            recipe(*data, "--do_train", "false", *flags, output_dir=folder.with_name("other"))
        assert f"{flags[0][2:]} has no effect with --do_train false" in caplog.messages[-1]
