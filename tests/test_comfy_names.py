"""Every name of ComfyUI's that the nodes use is there, also where no test passes: read by mypy, without running it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import comfyui
import pytest

COMFYUI = comfyui.require()
pytest.importorskip("mypy", reason="mypy, which reads ComfyUI's names, is not installed: pip install mypy")

pytestmark = pytest.mark.comfyui

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = """
[mypy]
follow_imports = skip
ignore_missing_imports = True
[mypy-comfy.*,comfy_api.*,comfy_execution.*,comfyui_version,folder_paths,latent_preview,server]
follow_imports = silent
"""
# What is missing, what takes no such arguments, and what is not imported any more.
CODES = "attr-defined|call-arg|import-not-found|import-untyped|name-defined"
FOUND = re.compile(rf"^(\S+?):\d+: error: (.*) +\[({CODES})\]$")
# ComfyUI sets the first two itself, on objects that do not declare them; the third is made by a decorator. The last
# came after 0.14, and nothing reads it there.
UNDECLARED = ('"latent_image"', '"noise"', '"type[Sampler]" has no attribute "Output"', '"cached_patcher_init"')


def missing_names(package, folder):
    """What mypy does not find, as "file: message" lines."""
    (folder / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "-p", package]
    environment = {"MYPYPATH": str(COMFYUI), "PATH": ""}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert "source files" in done.stdout, done.stdout + done.stderr
    found = [FOUND.match(line) for line in done.stdout.splitlines()]
    lines = [f"{match[1]}: {match[2]}" for match in found if match]
    return [line for line in lines if not any(known in line for known in UNDECLARED)]


def test_names_of_comfyui_are_there(tmp_path):
    (tmp_path / "ba_solver").symlink_to(ROOT)
    assert missing_names("ba_solver.nodes", tmp_path) == []


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("notify.py", "get_executing_context"),
        ("making/comfy_backbone.py", "soft_empty_cache"),
        ("sampling/guider.py", "CALC_COND_BATCH"),
        ("inputs.py", "io.Combo"),
    ],
)
def test_a_name_that_vanished_would_be_noticed(file, name, tmp_path):
    """The power of the test above."""
    for room in ("bas_core", "nodes"):
        shutil.copytree(ROOT / room, tmp_path / "ba_solver" / room)
    (tmp_path / "ba_solver" / "__init__.py").touch()
    path = tmp_path / "ba_solver" / "nodes" / file
    path.write_text(path.read_text().replace(name, f"{name}_gone"))
    assert any(f"{name.split('.')[-1]}_gone" in line for line in missing_names("ba_solver.nodes", tmp_path))
