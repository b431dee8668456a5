"""Recordings on disk: safetensors shards with a check sum, written atomically and looked through when opened."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...bas_core.files import CheckpointError, parse_object, read_head, write_safetensors

TRAJECTORIES_FORMAT = "ba-solver-trajectories"


NEEDED = {"times", "states", "velocities", "labels"}

# What every shard says of itself, and training relies on.
SAID = {"backbone", "shape", "cfg_mode", "guidance", "guidance_interval", "points", "shift", "start", "num_classes"}

OPTIONAL = {"scales", "velocities_null"}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A check sum over tensors, to tell damage from data."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_shard(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write one shard, atomically; `about` says which backbone and guidance made it.

    Args:
        path: the file.
        tensors: times [m, N + 1], states and velocities [m, N + 1, C, *spatial], labels [m]; and, where they
            differ, scales [m]; in branch mode `velocities_null` like velocities.
        about: what the recording was asked for.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": TRAJECTORIES_FORMAT, "about": json.dumps(about), "digest": digest(whole)}
    write_safetensors(path, whole, metadata)


def open_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a shard, memory-mapped, and what it says of itself, after a look at every number.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged, holds no trajectories, or holds NaN; the message names it.
    """
    read_head(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # what a damaged header raises depends on where it is damaged
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}). It may be truncated: delete it and record again, which "
            "goes on with the shards that are missing."
        ) from error
    if metadata.get("format") != TRAJECTORIES_FORMAT or not NEEDED <= set(tensors) <= NEEDED | OPTIONAL:
        raise CheckpointError(f"{path} holds no trajectories. Name a folder or file that `ba-solver record` wrote.")
    if metadata.get("digest") != digest(tensors):
        raise CheckpointError(f"{path} is damaged: its check sum is wrong. Delete it and record again.")
    for name, tensor in tensors.items():
        # Row by row, so that a shard larger than memory can be checked.
        if not all(row.isfinite().all() for row in tensor):
            raise CheckpointError(
                f"{path} holds NaN or infinity in {name!r}. Delete it and record again, in float32 or bfloat16."
            )
    about = parse_object(metadata, "about", path)
    if not about.keys() >= SAID:
        raise CheckpointError(f"{path} does not say its {min(SAID - about.keys())}. Delete it and record again.")
    return tensors, about


def shard_bytes(shape: Sequence[int], points: int, velocities: int, item: int = 4) -> int:
    """Bytes that so many points take on disk: a state and velocities each."""
    return points * (1 + velocities) * item * math.prod(shape)
