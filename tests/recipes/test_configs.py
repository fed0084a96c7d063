"""The YAML files with the settings of the original."""

import math

import pytest
from conftest import RECIPES, history_of, results_of
from test_cli import recipe_classes

from blip_ft.cli import parse

CONFIGS = RECIPES / "configs"

# of all of them: data/__init__.py, configs/med_config.json, utils.py, train_*.py
COMMON = {
    **{"augment": True, "flip": True, "dropout": 0.1, "cosine_per_epoch": True},
    **{"weight_decay": 0.05, "max_grad_norm": 0, "seed": 42},
}
VQA = {"image_size": 480, "clean_questions": True, "question_start_token": "enc", "max_question_tokens": 35} | {
    "label_smoothing": 0.1
}
CAPTIONING = {
    **{"image_size": 384, "prompt": "a picture of ", "max_caption_tokens": 40, "clean_captions": True},
    **{"generation_min_length": 5, "generation_max_length": 20, "generation_num_beams": 3, "num_train_epochs": 5},
}
RETRIEVAL = {
    **{"image_size": 384, "itm_start_token": "enc", "max_caption_tokens": 35, "clean_captions": True},
    **{"queue_size": 57600, "alpha": 0.4, "momentum": 0.995, "k_test": 256, "num_train_epochs": 6},
}
# name -> settings of configs/vqa.yaml, caption_coco.yaml and retrieval_coco.yaml, and rows of a step: GPUs x batch
ORIGINAL = {
    "vqa_base": (VQA | {"learning_rate": 2e-5, "num_train_epochs": 10, "drop_path": 0.1}, 16 * 16),
    "captioning_base": (CAPTIONING | {"learning_rate": 1e-5, "drop_path": 0}, 8 * 32),
    "captioning_large": (
        CAPTIONING | {"learning_rate": 2e-6, "drop_path": 0.1, "gradient_checkpointing": True},
        8 * 16,
    ),
    "retrieval_base": (RETRIEVAL | {"learning_rate": 1e-5, "drop_path": 0}, 8 * 32),
    "retrieval_large": (RETRIEVAL | {"learning_rate": 5e-6, "drop_path": 0.1, "gradient_checkpointing": True}, 8 * 16),
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_yaml_has_the_settings_of_the_original(name, tmp_path):
    argv = ["--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", str(tmp_path), "--use_cpu"]
    found = {
        key: value
        for part in parse(*recipe_classes(name.split("_")[0]), argv=argv)
        for key, value in vars(part).items()
    }
    settings, rows = ORIGINAL[name]
    expected = COMMON | settings
    assert {key: found[key] for key in expected} == expected
    processes = 8 if name.startswith("retrieval") else 1  # its batches are not accumulated, for they are negatives
    assert processes * found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == rows


@pytest.mark.parametrize("name", ORIGINAL)
def test_yaml_of_the_original_trains(name, recipe, checkpoints, image_folder):
    task = name.split("_")[0]
    folder = recipe(
        *("--config", str(CONFIGS / f"{name}.yaml"), "--model_name_or_path", str(checkpoints[task])),
        *(
            "--dataset_name",
            str(image_folder),
            "--eval_split",
            "test",
            "--test_split",
            "train",
            "--allow_image_overlap",
        ),
        *("--image_size", "32", "--bf16", "false", "--per_device_train_batch_size", "4", "--num_train_epochs", "2"),
        *("--gradient_accumulation_steps", "1", "--logging_steps", "1", "--skip_dry_run"),
        *(("--queue_size", "24", "--k_test", "3") if task == "retrieval" else ()),
        task=task,
    )
    history = history_of(folder)
    peak = ORIGINAL[name][0]["learning_rate"]
    # two steps in each of two epochs
    assert [entry["learning_rate"] for entry in history] == pytest.approx([peak, peak, peak / 2, peak / 2])
    assert all(math.isfinite(entry["loss"]) for entry in history)
    assert results_of(folder)["eval_loss" if task == "vqa" else "train_loss"] > 0
