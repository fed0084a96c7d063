"""The house itself: which file may import which, and that every YAML fits its program."""

import ast
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image

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
from blip_ft.data.loading import load_captions, load_vqa

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


# file -> engine, machines, precision, and settings that make it what its name says
ACCELERATE_CONFIGS = {
    "cpu": ("NO", 1, "no", {"use_cpu": True, "num_processes": 1}),
    "single_gpu": ("NO", 1, "bf16", {"use_cpu": False, "num_processes": 1}),
    "multi_gpu": ("MULTI_GPU", 1, "bf16", {"num_processes": 8}),
    "multi_node": ("MULTI_GPU", 2, "bf16", {"num_processes": 16}),
    "deepspeed_zero2": ("DEEPSPEED", 1, "bf16", {"deepspeed_config": {"zero_stage": 2}}),
    "deepspeed_zero3": ("DEEPSPEED", 1, "bf16", {"deepspeed_config": {"zero_stage": 3}}),
    "fsdp": ("FSDP", 1, "bf16", {"fsdp_config": {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}}),
}


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_config_loads_as_the_engine_of_its_name(path):
    config = load_config_from_file(str(path))
    engine, machines, precision, settings = ACCELERATE_CONFIGS[path.stem]
    assert (config.distributed_type, config.num_machines, config.mixed_precision) == (engine, machines, precision)
    assert config.compute_environment == "LOCAL_MACHINE"
    for name, value in settings.items():
        found = getattr(config, name)
        assert found.items() >= value.items() if isinstance(value, dict) else found == value


def test_fsdp_leaves_the_layers_to_wrap_to_the_recipes():
    """They have other names in each family, and accelerate refuses a name that the model does not have."""
    settings = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp.yaml").read_text())["fsdp_config"]
    assert settings["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert "fsdp_transformer_layer_cls_to_wrap" not in settings


README, README_ZH = ROOT / "README.md", ROOT / "README_zh.md"
PAGES = [README, README_ZH, *sorted((ROOT / "docs").glob("*.md"))]
WITH_LINKS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path, language: str = r"\w+") -> list[str]:
    """The code blocks of a page that name a language, without comments."""
    blocks = re.findall(rf"```(?:{language})\n(.*?)```", page.read_text(), re.DOTALL)
    return [re.sub(r" +#.*", "", block) for block in blocks]


COMMANDS = {line: None for page in PAGES for block in blocks_of(page, "bash") for line in block.split("\n") if line}


def anchors_of(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "python")], ids=name_of)
def test_python_of_readme_and_docs_runs(page, checkpoint, image_folder, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "outputs" / "mine")
    shutil.copytree(image_folder, tmp_path / "my_images")
    shutil.copy(image_folder / "0.png", tmp_path / "my_images" / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(page, "python"):
        exec(compile(block, page.name, "exec"), {})
        for folder in re.findall(r"""save_model\(model, "(.*?)\"""", block):
            assert (tmp_path / folder / "model.safetensors").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "json")], ids=name_of)
def test_rows_of_readme_and_docs_are_read(page, tmp_path):
    questions, captions = blocks_of(page, "json")
    for load, block in ((load_vqa, questions), (load_captions, captions)):
        for row in map(json.loads, block.splitlines()):
            color = "red" if row["file_name"] == "cat.jpg" else "blue"
            Image.new("RGB", (8, 8), color).save(tmp_path / row["file_name"])
        (tmp_path / "metadata.jsonl").write_text(block)
        train, evaluation = load(DataArguments(dataset_name=str(tmp_path)), tmp_path / "bad_rows.jsonl")
        assert len(train) and len(evaluation) and not (tmp_path / "bad_rows.jsonl").exists()
        assert load is load_captions or len(train) >= 2, "the commands below the rows take batches of 2"


class Parsed(Exception):
    """Raised in the place of a run: all flags are known and go together."""


@pytest.mark.parametrize("command", [command for command in COMMANDS if "recipes/" in command])
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
            # test_hub runs the first
            assert words[:2] in (["hf", "upload"], ["pip", "install"], ["source", ".venv/bin/activate"])


def test_both_readmes_have_the_same_sections_commands_and_numbers():
    english, chinese = README.read_text(), README_ZH.read_text()
    assert blocks_of(README) == blocks_of(README_ZH) and len(blocks_of(README, "bash")) > 5
    for pattern in (r"^#+ ", r"\]\(((?!README).*?)\)"):
        assert re.findall(pattern, english, re.MULTILINE) == re.findall(pattern, chinese, re.MULTILINE)
    # the order of words in a sentence is not the same
    assert sorted(re.findall(r"\d+\.\d+", english)) == sorted(re.findall(r"\d+\.\d+", chinese))
    assert "(README_zh.md)" in english.split("\n## ")[0] and "(README.md)" in chinese.split("\n## ")[0]


@pytest.mark.parametrize("page", [README, README_ZH], ids=name_of)
def test_readme_is_short(page):
    assert len(page.read_text().splitlines()) <= 220


@pytest.mark.parametrize("page", WITH_LINKS, ids=name_of)
def test_links_lead_to_files_and_sections_that_exist(page):
    for link in re.findall(r"\]\((.*?)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors_of(target), link


def test_promises_are_held_by_tests_that_exist():
    text = (ROOT / "docs" / "fidelity.md").read_text()
    held_by = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(held_by) == text.count("tests/") >= 40
    for file, name in held_by:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_files_and_folders_that_the_pages_name_exist():
    for page in WITH_LINKS:
        for path in re.findall(r"`((?:tests|recipes|accelerate_configs|docs|blip_ft)/[\w/.]*)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_images_of_readme_and_docs_are_small():
    images = {page.parent / path for page in PAGES for path in re.findall(r"!\[[^\]]*\]\((.*?)\)", page.read_text())}
    assert images == set((ROOT / "docs").glob("*.png"))
    assert all(1000 < image.stat().st_size < 200_000 for image in images)
