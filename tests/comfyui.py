"""ComfyUI for the tests that need it: found, and started on the CPU inside this process.

As a command, prints the folder of ComfyUI and its Python, a line each; .ci/run asks for them.
"""

from __future__ import annotations

import asyncio
import configparser
import os
import shutil
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


def python_of(folder: Path) -> str | None:
    """The Python beside a ComfyUI, or else `python3`, if it has ComfyUI's requirements; None where neither is there."""
    for environment in (".venv", "venv"):
        beside = folder / environment / "bin" / "python"
        if beside.is_file():
            return str(beside)
    code = "from comfy.cli_args import args; args.cpu = True; import comfy.samplers, nodes"
    python = shutil.which("python3")
    able = python and subprocess.run([python, "-c", code], cwd=folder, capture_output=True, check=False).returncode == 0
    return python if able else None


def main() -> int:
    """Print folder and Python; the exit code is 1 where there is no ComfyUI."""
    folder = find()
    python = folder and python_of(folder)
    if not python:
        found = f"ComfyUI is in {folder}, without a Python" if folder else "ComfyUI was not found"
        print(f"\n{'=' * 80}\nComfyUI TESTS NOT RUN. {found}: {HOW}.\n{'=' * 80}", file=sys.stderr)
        return 1
    print(folder, python, sep="\n")
    return 0


def _load_pack() -> None:
    """Do with the pack what ComfyUI does at start."""
    import ba_solver

    extension = asyncio.run(ba_solver.comfy_entrypoint())
    asyncio.run(extension.on_load())


def packed_files(root: Path) -> set[str]:
    """What the registry's zip holds: tracked files without those of .comfyignore, as comfy-cli chooses them."""

    def listed(*arguments: str) -> set[str]:
        found = subprocess.run(["git", "ls-files", "-z", *arguments], cwd=root, capture_output=True, check=True)
        return set(found.stdout.decode().split("\0")) - {""}

    return listed() - listed("--cached", "--ignored", "--exclude-from=.comfyignore")


if __name__ == "__main__":
    sys.exit(main())
