"""Recorded trajectories: the states and velocities that a fine-grained solver visits from noise to data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bas_core.files import CheckpointError
from ...bas_core.flow import per_sample
from ..progress import progress
from ..settings import differences
from .shards import open_shard

# What shards may differ in and still be trained on together.
MAY_DIFFER = (
    "seed", "shard", "trajectories", "patch_size", "record_batch", "prompts", "conditions", "storage",
    "reference_error", "reference_relative_error", "reference_calls", "pilot_calls",
)  # fmt: skip


class ShardedPoints:
    """Points of trajectories that lie in several shards, read from disk as they are asked for.

    Looks like a tensor [M, N, C, *spatial] that is indexed with two index tensors or with one number.

    Args:
        parts: the shards' tensors, memory-mapped.
        where: [M, 2] part and row of each trajectory.
    """

    def __init__(self, parts: Sequence[Tensor], where: Tensor) -> None:
        self.parts, self.where = parts, where

    def __len__(self) -> int:
        return len(self.where)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.where), *self.parts[0].shape[1:])

    def select(self, rows: slice) -> ShardedPoints:
        """Some of the trajectories; nothing is read."""
        return ShardedPoints(self.parts, self.where[rows])

    def __getitem__(self, index: Any) -> Tensor:
        """`[rows [B], points [B]]` -> [B, C, *spatial], `[row]` -> [N, C, *spatial]; float32."""
        if isinstance(index, int):
            part, row = self.where[index].tolist()
            return self.parts[part][row].float()
        rows, points = index
        pairs = zip(self.where[rows].tolist(), points.tolist(), strict=True)
        return torch.stack([self.parts[part][row, point] for (part, row), point in pairs]).float()


Points = Tensor | ShardedPoints


@dataclass(frozen=True)
class Trajectories:
    """M recorded trajectories of N points each, from noise (point 0) to data (point N - 1).

    Attributes:
        times: [M, N], descending from the start to `LAST_TIME` or, for prefixes and parts of the path, an earlier end.
        states, velocities: [M, N, C, *spatial]. The velocity is that of combined CFG, or of one branch.
        labels: [M] indices of the conditions (classes, prompts); the null class for an unconditional branch.
        scales: [M] CFG scales; None = all alike.
        branches: how many rows in turn belong to one trajectory: 2 where both branches of CFG were recorded.
    """

    times: Tensor
    states: Points
    velocities: Points
    labels: Tensor
    scales: Tensor | None = None
    branches: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, validation: int) -> tuple[Trajectories, Trajectories]:
        """All but the last `validation` trajectories, and those."""
        rows = len(self) - validation * self.branches
        return self.rows(slice(None, rows)), self.rows(slice(rows, None))

    def split_into(self, counts: Sequence[int]) -> list[Trajectories]:
        """The first of them in groups of some sizes, one after another."""
        ends = list(itertools.accumulate(counts))
        return [self.rows(slice(end - count, end)) for end, count in zip(ends, counts, strict=True)]

    def rows(self, rows: slice) -> Trajectories:
        """Some of the trajectories."""
        states, velocities = (
            part.select(rows) if isinstance(part, ShardedPoints) else part[rows]
            for part in (self.states, self.velocities)
        )
        scales = None if self.scales is None else self.scales[rows]
        return Trajectories(self.times[rows], states, velocities, self.labels[rows], scales, self.branches)

    def at(self, rows: Tensor, t: float | Tensor) -> Tensor:
        """[B, C, *spatial] states of `rows` at time t, by the cubic through the states and velocities around it."""
        times = self.times[rows]
        after = (times >= t).sum(1).clamp(1, times.shape[1] - 1)
        before = after - 1
        t0, t1 = (times.gather(1, i[:, None])[:, 0] for i in (before, after))
        x0, x1 = self.states[rows, before], self.states[rows, after]
        v0, v1 = self.velocities[rows, before], self.velocities[rows, after]
        step, s = per_sample(t1 - t0, x0), per_sample((t - t0) / (t1 - t0), x0)
        near, far = (1 + 2 * s) * (1 - s) ** 2, s**2 * (3 - 2 * s)
        return near * x0 + far * x1 + step * (s * (1 - s) ** 2 * v0 - s**2 * (1 - s) * v1)

    def ends(self, rows: Tensor, t: float = 0.0) -> Tensor:
        """[B, C, *spatial] states at t, not before the last point: a straight line from there."""
        last = torch.full_like(rows, self.times.shape[1] - 1)
        x, v = self.states[rows, last], self.velocities[rows, last]
        return x - per_sample(self.times[rows, last] - t, x) * v

    def truth(self, rows: Tensor, t: Tensor) -> Tensor:
        """[B, C, *spatial] states of `rows` at time t, the end of the path included."""
        time = float(t)
        return self.ends(rows, time) if time <= float(self.times[rows, -1].min()) else self.at(rows, t)


def find_shards(folders: Sequence[Path]) -> list[Path]:
    """All shards of some folders, in order.

    Raises:
        FileNotFoundError: a folder is missing or holds none.
        CheckpointError: two shards have the same name, hence the same noises.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        shards = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        if not shards:
            raise FileNotFoundError(
                f"There is no folder {folder} with trajectories. Record some: ba-solver record --out {folder}"
            )
        for shard in shards:
            if shard.name in found:
                raise CheckpointError(
                    f"{found[shard.name]} and {shard} have the same name, hence the same seed and the same noises. "
                    "Record one of them with another --seed."
                )
            found[shard.name] = shard
    return list(found.values())


def check_same_recording(first: dict[str, Any], other: dict[str, Any], path: Path) -> None:
    """Refuse trajectories of another backbone, resolution or guidance.

    Raises:
        CheckpointError: naming every setting that differs.
    """
    differing = differences(first, other, MAY_DIFFER, ("elsewhere", "here"))
    if differing:
        raise CheckpointError(
            f"{path} does not belong to the others: {differing}. Use trajectories recorded with the same settings."
        )


def open_trajectories(folders: Sequence[Path]) -> tuple[Trajectories, dict[str, Any]]:
    """All trajectories of some folders, streamed from disk, and their metadata (see `record.describe`).

    Per-branch trajectories become two rows each, the conditional branch before the unconditional one.

    Raises:
        FileNotFoundError: there are none.
        CheckpointError: a shard is damaged, named like another, or of another backbone, resolution or guidance.
    """
    states: list[Tensor] = []
    velocities: list[Tensor] = []
    columns: dict[str, list[Tensor]] = {"times": [], "labels": [], "scales": [], "where": []}
    metadata: dict[str, Any] = {}
    branches: list[str] = []
    for path in progress(find_shards(folders), "check shards", leave=False):
        tensors, own = open_shard(path)
        metadata = metadata or own
        check_same_recording(metadata, own, path)
        branches = ["velocities", "velocities_null"] if "velocities_null" in tensors else ["velocities"]
        rows = torch.arange(len(tensors["labels"]))
        null = torch.full_like(tensors["labels"], own["null"] or 0)
        interleaved = [torch.stack([len(states) + b + 0 * rows, rows], 1) for b in range(len(branches))]
        columns["where"].append(torch.stack(interleaved, 1).flatten(0, 1))
        columns["labels"].append(torch.stack([tensors["labels"], null][: len(branches)], 1).flatten())
        columns["times"].append(tensors["times"].repeat_interleave(len(branches), 0))
        columns["scales"].append(tensors["scales"].repeat_interleave(len(branches)))
        states += [tensors["states"]] * len(branches)
        velocities += [tensors[name] for name in branches]
    times, labels, scales, where = (torch.cat(columns[name]) for name in ("times", "labels", "scales", "where"))
    points = ShardedPoints(states, where), ShardedPoints(velocities, where)
    return Trajectories(times, *points, labels, scales, len(branches)), metadata
