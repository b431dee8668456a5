"""Recordings on disk: safetensors shards with a check sum, written atomically and checked when opened."""

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
TENSORS = {"times", "states", "velocities", "labels", "scales"}
OPTIONAL_TENSORS = {"velocities_null"}
# The metadata that training relies on.
METADATA = {
    "backbone", "shape", "cfg_mode", "guidance", "guidance_interval", "points", "patch_size", "record_batch", "shift",
    "start", "end", "part", "null", "num_classes",
}  # fmt: skip


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A check sum over tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write one shard, atomically.

    Args:
        path: the file.
        tensors: times [m, N], states and velocities [m, N, C, *spatial], labels [m], scales [m]; and per branch,
            `velocities_null` like velocities.
        metadata: see `record.describe`.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {"format": TRAJECTORIES_FORMAT, "metadata": json.dumps(metadata), "digest": digest(whole)}
    write_safetensors(path, whole, texts)


def open_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a shard, memory-mapped, and its metadata; every number is checked.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged, no shard, or holds NaN; the message names it.
    """
    read_head(path)
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # what a damaged header raises depends on where it is damaged
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}). It may be truncated: delete it and record again; only "
            "missing shards are recorded."
        ) from error
    if texts.get("format") != TRAJECTORIES_FORMAT or not TENSORS <= set(tensors) <= TENSORS | OPTIONAL_TENSORS:
        raise CheckpointError(f"{path} holds no trajectories. Name a folder that `ba-solver record` wrote.")
    if texts.get("digest") != digest(tensors):
        raise CheckpointError(f"{path} is damaged: its check sum is wrong. Delete it and record again.")
    for name, tensor in tensors.items():
        # Row by row, so that a shard larger than memory can be checked.
        if not all(row.isfinite().all() for row in tensor):
            raise CheckpointError(
                f"{path} holds NaN or infinity in {name!r}. Delete it and record again, in float32 or bfloat16."
            )
    metadata = parse_object(texts, "metadata", path)
    if not metadata.keys() >= METADATA:
        raise CheckpointError(f"{path} lacks its {min(METADATA - metadata.keys())}. Delete it and record again.")
    return tensors, metadata


def shard_bytes(shape: Sequence[int], points: int, velocities: int, item: int = 4) -> int:
    """Bytes that `points` points take on disk, with a state and so many velocities each."""
    return points * (1 + velocities) * item * math.prod(shape)
