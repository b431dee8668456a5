"""ComfyUI for the tests that need it: found, started on the CPU inside this process, and helped along."""

from __future__ import annotations

import asyncio
import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOW = "set COMFYUI_PATH to a ComfyUI folder, or `comfy install` one, in a Python that has ComfyUI's requirements"


def find() -> Path | None:
    """The folder of ComfyUI: COMFYUI_PATH, or comfy-cli's default or most recent workspace."""
    candidates = [os.environ.get("COMFYUI_PATH", "")]
    config = configparser.ConfigParser()
    home = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config"))
    if config.read(home / "comfy-cli" / "config.ini"):
        candidates += [config["DEFAULT"].get(key, "") for key in ("default_workspace", "recent_workspace")]
    folders = [Path(c) for c in candidates if c]
    return next((f for f in folders if (f / "comfy" / "samplers.py").is_file()), None)


def require() -> Path:
    """Skip the calling test module, aloud, where there is no ComfyUI; else make it importable, on the CPU."""
    folder = find()
    if folder is None:
        pytest.skip(f"ComfyUI was not found: {HOW}.", allow_module_level=True)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        from comfy.cli_args import args

        args.cpu = True
        import comfy.samplers  # noqa: F401

        import nodes  # noqa: F401
    except ImportError as error:
        pytest.skip(f"ComfyUI in {folder} cannot be imported ({error}): {HOW}.", allow_module_level=True)
    _load_pack()
    return folder


def _load_pack() -> None:
    """What ComfyUI does with the pack at start."""
    import ba_solver

    extension = asyncio.run(ba_solver.comfy_entrypoint())
    asyncio.run(extension.on_load())


def packed_files(root: Path) -> set[str]:
    """What the registry's zip holds: tracked files without those of .comfyignore, as comfy-cli chooses them."""

    def listed(*arguments: str) -> set[str]:
        found = subprocess.run(["git", "ls-files", "-z", *arguments], cwd=root, capture_output=True, check=True)
        return set(found.stdout.decode().split("\0")) - {""}

    return listed() - listed("--cached", "--ignored", "--exclude-from=.comfyignore")
