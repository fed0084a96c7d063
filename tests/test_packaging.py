"""What `pip install .` puts on a machine that has no copy of the repository."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # a copy: setuptools writes build/ and egg-info beside the source
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("blip_ft", "recipes", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(built), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(built.glob("*.whl"))) as file:
        yield file


def test_wheel_contains_every_file_of_the_package_and_nothing_else(wheel):
    files = (path for path in (ROOT / "blip_ft").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packaged == {path.relative_to(ROOT).as_posix() for path in files}


def test_wheel_names_its_license_and_the_requirements(wheel):
    folder = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")).removesuffix("METADATA")
    assert wheel.read(folder + "licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = Parser().parsestr(wheel.read(folder + "METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    lines = [re.sub(r"\s*#.*", "", line) for line in (ROOT / "requirements.txt").read_text().splitlines()]
    wanted = {Requirement(line) for line in lines if line}
    assert {Requirement(line) for line in metadata.get_all("Requires-Dist")} == wanted
    assert {"torch", "transformers", "jinja2"} <= {requirement.name for requirement in wanted}
