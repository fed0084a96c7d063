"""The house itself: which file may import which, and that every YAML fits its program."""

import ast
import re
import runpy
import shlex
import shutil
import sys
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
)
from blip_ft.cli import parse

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "blip_ft"
# wing, a folder or module of blip_ft -> the wings that it may import beside itself
WINGS = {
    "arguments": set(),
    "metrics": set(),
    "data": {"arguments"},
    "modeling": {"arguments", "data"},
    "results": {"data", "metrics"},
    "cli": {"arguments", "data", "results"},
    "models": {"arguments", "data", "modeling"},
    "data_pipeline": {"arguments", "cli", "data", "modeling", "models"},
    "training": {"arguments", "data", "metrics", "modeling", "models", "results"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def wing_of(module: str) -> str:
    return module.split(".")[1]


def wings_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path of a module"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        assert not any(name.split(".")[0] == "recipes" for name in names)
        found |= {wing_of(name) for name in names if name.split(".")[0] == "blip_ft"}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_what_the_arrows_of_its_wing_allow(path):
    wing = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert wings_imported(path) <= {wing} | WINGS[wing]


def test_recipes_are_not_imported_by_each_other():
    for path in (ROOT / "recipes").glob("*.py"):
        wings_imported(path)


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
    from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering

    wrapped = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp.yaml").read_text())["fsdp_config"]
    names = wrapped["fsdp_transformer_layer_cls_to_wrap"].split(",")
    model = BlipForQuestionAnswering.from_pretrained(golden / "vqa")
    assert {type(module).__name__ for module in model.modules()} >= set(names)


def test_python_of_the_readme_runs(checkpoint, image_folder, tmp_path, monkeypatch):
    section = (ROOT / "README.md").read_text().split("## Use it from Python")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 2
    shutil.copytree(checkpoint, tmp_path / "outputs" / "vqa")
    shutil.copytree(image_folder, tmp_path / "my_images")
    shutil.copy(image_folder / "0.png", tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "checkpoints" / "mine" / "model.safetensors").is_file()


README = (ROOT / "README.md").read_text()
PAGES = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
# every line of a bash block
LINES = [
    line.split(" #")[0] for block in re.findall(r"```bash\n(.*?)```", PAGES, re.DOTALL) for line in block.split("\n")
]
COMMANDS = [line for line in LINES if line]


class Parsed(Exception):
    """Raised in the place of a run: all flags are known and go together."""


@pytest.mark.parametrize("command", [line for line in COMMANDS if "recipes/" in line])
def test_recipe_commands_of_readme_and_docs_parse(command, monkeypatch):
    words = shlex.split(command)
    script = next(number for number, word in enumerate(words) if word.startswith("recipes/"))

    def parse_only(*types, **kwargs):
        parse(*types, **kwargs)
        raise Parsed

    monkeypatch.setattr("blip_ft.cli.parse", parse_only)
    # bf16 of a YAML needs a device that has it, and a push a name that could be one
    on_cpu = [] if words[script] in ("recipes/app.py", "recipes/check_data.py") else ["--use_cpu"]
    monkeypatch.setattr(sys, "argv", [word.replace("OWNER/", "owner/") for word in words[script:]] + on_cpu)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        runpy.run_path(words[script], run_name="__main__")
    if "--config_file" in words:
        assert load_config_from_file(words[words.index("--config_file") + 1]).num_processes


def test_other_commands_of_readme_and_docs_are_there():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "make":
            assert set(words[1:]) <= set(targets)
        elif "recipes/" not in command:
            assert words[:2] in (["hf", "upload"], ["pip", "install"])  # test_hub runs the first


def test_promises_of_the_readme_are_held_by_tests_that_exist():
    promises = README.split("## What is promised")[1].split("\n## ")[0]
    held_by = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", promises)
    assert len(held_by) >= 10
    for file, name in held_by:
        assert not name or f"def {name}(" in (ROOT / file).read_text()


def test_images_of_the_readme_are_small():
    for path in re.findall(r"!\[[^\]]*\]\((.*?)\)", README):
        assert 1000 < (ROOT / path).stat().st_size < 200_000
