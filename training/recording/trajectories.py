"""Trajectories: recorded sampling runs, the states and velocities that a fine-grained solver visits. No data set
needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bas_core.files import CheckpointError
from ..progress import progress
from .shards import open_shard


class ShardedPoints:
    """Points of trajectories that lie in several shards, read from disk as they are asked for.

    Looks like a tensor [M, N + 1, C, *spatial] to those who index it with two index tensors, or with one number.

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
        """`[rows [B], points [B]]` -> [B, C, *spatial], `[:, point]` -> [M, …], `[row]` -> [N + 1, …]; float32."""
        if isinstance(index, int):
            part, row = self.where[index].tolist()
            return self.parts[part][row].float()
        rows, points = index
        chosen = self.where[rows].tolist()
        at = [points] * len(chosen) if isinstance(points, int) else points.tolist()
        return torch.stack([self.parts[p][r, i] for (p, r), i in zip(chosen, at, strict=True)]).float()


Points = Tensor | ShardedPoints


@dataclass(frozen=True)
class Trajectories:
    """M recorded runs of N + 1 points each, from noise (point 0) to data (point N).

    Attributes:
        times: [M, N + 1], descending from 1 to `LAST_TIME`, or to an earlier end; each batch of trajectories has times
            of
            its own. Those of inversions ascend.
        states, velocities: [M, N + 1, C, *spatial]. The velocity is the guided one, or that of one branch.
        labels: [M] indices of the conditions (classes, prompts); the null class for an unconditional branch.
        scales: [M] CFG scales; None = all alike.
        branches: how many rows in turn belong to one run: 2 where the branches of CFG are rows of their own.
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
        """All but the last `validation` runs, and those."""
        rows = len(self) - validation * self.branches
        return self.rows(slice(None, rows)), self.rows(slice(rows, None))

    def rows(self, rows: slice) -> Trajectories:
        """Some of the trajectories."""
        states, velocities = (
            part.select(rows) if isinstance(part, ShardedPoints) else part[rows]
            for part in (self.states, self.velocities)
        )
        scales = None if self.scales is None else self.scales[rows]
        return Trajectories(self.times[rows], states, velocities, self.labels[rows], scales, self.branches)

    def at(self, rows: Tensor, t: float | Tensor) -> Tensor:
        """[B, C, *spatial] states of trajectories `rows` at time t, by the cubic through states and velocities around
        it."""
        times = self.times[rows]
        rising = bool(times[0, -1] > times[0, 0])
        after = (times <= t if rising else times >= t).sum(1).clamp(1, times.shape[1] - 1)
        before = after - 1
        t0, t1 = (times.gather(1, i[:, None])[:, 0] for i in (before, after))
        x0, x1 = self.states[rows, before], self.states[rows, after]
        v0, v1 = self.velocities[rows, before], self.velocities[rows, after]
        step = (t1 - t0).view(-1, *[1] * (x0.ndim - 1))
        s = ((t - t0) / (t1 - t0)).view_as(step)
        near, far = (1 + 2 * s) * (1 - s) ** 2, s**2 * (3 - 2 * s)
        return near * x0 + far * x1 + step * (s * (1 - s) ** 2 * v0 - s**2 * (1 - s) * v1)

    def ends(self, rows: Tensor) -> Tensor:
        """[B, C, *spatial] states at t = 0: the last point, and a straight line over what is left."""
        last = self.times.shape[1] - 1
        points = torch.full_like(rows, last)
        x, v = self.states[rows, points], self.velocities[rows, points]
        return x - self.times[rows, points].view(-1, *[1] * (x.ndim - 1)) * v

    def truth(self, rows: Tensor, t: Tensor) -> Tensor:
        """[B, C, *spatial] states of trajectories `rows` at time t, also at the end of their paths."""
        return self.ends(rows) if float(t) == 0 else self.at(rows, t)


# What shards may differ in and still be trained on together.
MAY_DIFFER = (
    "seed",
    "shard",
    "trajectories",
    "patch_size",
    "record_batch",
    "prompts",
    "conditions",
    "storage",
    "reference_error",
    "reference_relative_error",
)


def find_shards(folders: Sequence[Path]) -> list[Path]:
    """All shards of some folders, in order.

    Raises:
        FileNotFoundError: a folder is missing or holds none.
        CheckpointError: two shards have the same name: they would hold the same noises.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder {folder}. Record trajectories first: ba-solver record --out {folder}"
            )
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            raise FileNotFoundError(f"{folder} holds no trajectories. Record some: ba-solver record --out {folder}")
        for shard in shards:
            if shard.name in found:
                raise CheckpointError(
                    f"{found[shard.name]} and {shard} have the same name, hence the same seed and the same noises. "
                    "Record one of them with another --seed."
                )
            found[shard.name] = shard
    return list(found.values())


def check_alike(first: Mapping[str, Any], other: Mapping[str, Any], where: str, asked: str) -> None:
    """Refuse trajectories of another backbone, resolution or guidance.

    Raises:
        CheckpointError: naming every setting that differs, what it is and what was asked for.
    """
    differing = [key for key in sorted({*first, *other} - set(MAY_DIFFER)) if first.get(key) != other.get(key)]
    if differing:
        said = "; ".join(f"{key} is {other.get(key)!r}, {asked} {first.get(key)!r}" for key in differing)
        raise CheckpointError(f"{where} does not belong here: {said}. Use trajectories that were recorded alike.")


def open_trajectories(folders: Sequence[Path]) -> tuple[Trajectories, dict[str, Any]]:
    """All trajectories of some folders, streamed from disk, and what they say of themselves.

    Branch-mode trajectories become two rows each, the conditional branch before the unconditional one.

    Raises:
        FileNotFoundError: there are none.
        CheckpointError: a shard is damaged, named like another, or of another backbone, resolution or guidance.
    """
    states: list[Tensor] = []
    velocities: list[Tensor] = []
    columns: dict[str, list[Tensor]] = {"times": [], "labels": [], "scales": [], "where": []}
    about: dict[str, Any] = {}
    branches: list[str] = []
    for path in progress(find_shards(folders), "check shards", leave=False):
        tensors, said = open_shard(path)
        about = about or said
        check_alike(about, said, str(path), f"in {folders[0]} it is")
        branches = ["velocities", "velocities_null"] if "velocities_null" in tensors else ["velocities"]
        rows = torch.arange(len(tensors["labels"]))
        null = torch.full_like(tensors["labels"], said.get("null") or 0)
        scales = tensors.get("scales", torch.full((len(rows),), float(said.get("guidance", [1.0])[0])))
        interleave = [torch.stack([len(states) + b + 0 * rows, rows], 1) for b in range(len(branches))]
        columns["where"].append(torch.stack(interleave, 1).flatten(0, 1))
        columns["labels"].append(torch.stack([tensors["labels"], null][: len(branches)], 1).flatten())
        columns["times"].append(tensors["times"].repeat_interleave(len(branches), 0))
        columns["scales"].append(scales.repeat_interleave(len(branches)))
        states += [tensors["states"]] * len(branches)
        velocities += [tensors[name] for name in branches]
    times, labels, scales, where = (torch.cat(columns[name]) for name in ("times", "labels", "scales", "where"))
    trajectories = Trajectories(
        times, ShardedPoints(states, where), ShardedPoints(velocities, where), labels, scales, len(branches)
    )
    return trajectories, about
