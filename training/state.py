"""The resumable state of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..bas_core.checkpoint import write_atomically


def save_run(path: Path, run: dict[str, Any]) -> None:
    """Save tensors, numbers and state dicts of an unfinished run, atomically."""
    write_atomically(path, lambda temporary: torch.save(run, temporary))


def load_run(path: Path) -> dict[str, Any]:
    """What `save_run` wrote; nothing in the file is executed."""
    return torch.load(path, map_location="cpu", weights_only=True)
