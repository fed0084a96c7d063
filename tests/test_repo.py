"""The house itself: which file may import which, and that every YAML fits its program."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

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

ROOT = Path(__file__).parent.parent
ARROWS = {
    "arguments": set(),
    "attention": set(),
    "contrastive": set(),
    "collators": set(),
    "metrics": set(),
    "demo": set(),
    "hub": set(),
    "report": set(),
    "modeling": {"attention", "contrastive"},
    "inference": {"collators"},
    "models": {"arguments", "collators", "demo", "inference", "modeling"},
    "data_pipeline": {"arguments", "demo", "collators"},
    "feature_store": {"arguments", "collators", "data_pipeline", "modeling"},
    "checkpoints": set(),
    "callbacks": {"arguments", "collators", "report"},
    "trainer": {
        "arguments",
        "callbacks",
        "checkpoints",
        "collators",
        "data_pipeline",
        "feature_store",
        "hub",
        "report",
    },
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("blip_ft", "recipes"):
            names = [alias.name for alias in node.names] if node.module in ("blip_ft", "recipes") else [node.module]
            found |= {name.split(".")[-1] for name in names}
    return found


@pytest.mark.parametrize("module", [path.stem for path in (ROOT / "blip_ft").glob("*.py") if path.stem != "__init__"])
def test_module_imports_only_what_its_arrows_allow(module):
    assert imports_of(ROOT / "blip_ft" / f"{module}.py") <= ARROWS[module]


TASK_ARGUMENTS = {"vqa": VqaArguments, "captioning": CaptioningArguments, "retrieval": RetrievalArguments}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_yaml_parses_for_its_recipe(path, tmp_path):
    # bf16 needs a device that has it; everything else is checked as it stands
    task_arguments = TASK_ARGUMENTS[path.stem.split("_")[0]]
    types = (ModelArguments, DataArguments, task_arguments, PeftArguments, BlipTrainingArguments)
    model, *_ = parse(*types, argv=["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu"])
    assert model.model_name_or_path


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_config_loads(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= config.num_machines
    assert config.compute_environment.value == "LOCAL_MACHINE"


def test_fsdp_wraps_layers_that_the_model_has(golden):
    from blip_ft.modeling import BlipForQuestionAnswering

    wrapped = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp.yaml").read_text())["fsdp_config"]
    names = wrapped["fsdp_transformer_layer_cls_to_wrap"].split(",")
    model = BlipForQuestionAnswering.from_pretrained(golden / "vqa")
    assert {type(module).__name__ for module in model.modules()} >= set(names)


def test_python_of_the_readme_runs(checkpoint, picture_folder, tmp_path, monkeypatch):
    section = (ROOT / "README.md").read_text().split("## Use it from Python")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 2
    shutil.copytree(checkpoint, tmp_path / "outputs" / "vqa")
    shutil.copytree(picture_folder, tmp_path / "my_pictures")
    shutil.copy(picture_folder / "0.png", tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "checkpoints" / "mine" / "model.safetensors").is_file()
