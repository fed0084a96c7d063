"""What the package imports, and what it prints, before it does anything."""

import subprocess
import sys
from pathlib import Path

import pytest

import blip_ft

ROOT = Path(__file__).parent.parent
HEAVY = "torch transformers datasets peft bitsandbytes evaluate accelerate matplotlib pandas"


def test_package_imports_no_library_until_a_name_is_used():
    program = f"import sys, blip_ft; print(*set('{HEAVY}'.split()) & set(sys.modules), *dir(blip_ft))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(HEAVY.split()) & set(done.stdout.split())
    assert set(blip_ft.__all__) <= set(done.stdout.split())


def test_every_public_name_is_found_and_no_other():
    for name in blip_ft.__all__:
        assert getattr(blip_ft, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        _ = blip_ft.load_modle


def test_help_prints_no_notice_of_a_library_and_draws_nothing():
    # -X importtime writes the name of each imported module to stderr
    command = [sys.executable, "-X", "importtime", str(ROOT / "recipes" / "vqa.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    assert "torch" in imported and not imported & {"matplotlib", "gradio", "tensorboard", "deepspeed"}
    printed = [line for line in lines if not line.startswith("import time:")]
    assert not any(word in line for line in printed for word in ("torchvision", "bitsandbytes", "kernels", "Warning"))
