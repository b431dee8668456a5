"""Record sampling runs as chains: the states and velocities that a fine-grained solver visits. No data set needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..bas_core.baselines import run_baseline
from ..bas_core.checkpoint import CheckpointError, parse_json, read_safetensors, write_safetensors
from ..bas_core.flow import velocity_to_x0
from ..bas_core.guidance import Field
from ..bas_core.solver import Step
from .progress import progress

CHAINS_FORMAT = "ba-solver-chains"
TEACHER = "adams_bashforth3"
# Chains end here: at t = 0 itself a network's velocity means little, and the integral does not depend on it.
LAST_TIME = 0.01
FieldOf = Callable[[Tensor], Field]


@dataclass(frozen=True)
class Chains:
    """M recorded runs of N + 1 points each, from noise (point 0) to data (point N).

    Attributes:
        times: [M, N + 1], descending from 1 to `LAST_TIME`, or to an earlier end; each batch of chains has times of
            its own.
        states, velocities: [M, N + 1, C, *spatial]; the guided velocity.
        labels: [M] class indices.
    """

    times: Tensor
    states: Tensor
    velocities: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def ends(self) -> Tensor:
        """[M, C, *spatial] ends of the paths at t = 0, the last stretch taken on a straight line."""
        return velocity_to_x0(self.states[:, -1], self.velocities[:, -1], self.times[:, -1])

    def split(self, held_out: int) -> tuple[Chains, Chains]:
        """All but the last `held_out` chains, and those."""
        return self.rows(slice(None, -held_out)), self.rows(slice(-held_out, None))

    def rows(self, rows: slice | Tensor) -> Chains:
        """Some of the chains."""
        return Chains(self.times[rows], self.states[rows], self.velocities[rows], self.labels[rows])


def random_times(points: int, generator: torch.Generator, until: float = LAST_TIME) -> Tensor:
    """[points] descending times from 1 to `until`: evenly spread, then jittered, so that batches cover all times."""
    t = torch.linspace(1, until, points)
    t[1:-1] += (torch.rand(points - 2, generator=generator) - 0.5) * 0.8 * (1 - until) / (points - 1)
    return t


def record_chain(field: Field, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Integrate from `noise` and keep every point.

    Returns:
        States and velocities, both [B, N + 1, C, *spatial]; one backbone call a point.
    """
    steps: list[Step] = []
    end = run_baseline(TEACHER, field, noise, times, steps.append)
    states = [step.x for step in steps] + [end]
    velocities = [step.velocity for step in steps] + [field.velocity(end, times[-1])]
    return torch.stack(states, 1), torch.stack(velocities, 1)


def record_chains(
    field_of: FieldOf,
    labels: Tensor,
    shape: tuple[int, ...],
    points: int,
    seed: int,
    until: float = LAST_TIME,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> Chains:
    """Record one chain for every label, from fresh noise.

    Args:
        field_of: labels [B] to the (guided) field for them.
        labels: [M] class indices.
        shape: [C, *spatial] of a state.
        points: N + 1 points a chain, and as many backbone calls.
        seed: of noise and times; every batch draws from its own generator.
        until: time of the last point.
        batch: chains recorded together.
        device: where the backbone is.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for index, rows in enumerate(progress(labels.split(batch), "record")):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        times = random_times(points, generator, until)
        noise = torch.randn((len(rows), *shape), generator=generator)
        with torch.inference_mode():
            states, velocities = record_chain(field_of(rows.to(device)), noise.to(device), times)
        parts.append((times.expand(len(rows), -1), states.cpu(), velocities.cpu()))
    times, states, velocities = (torch.cat(column).clone() for column in zip(*parts, strict=True))
    return Chains(times, states, velocities, labels)


def save_chains(path: Path, chains: Chains, about: dict[str, object]) -> None:
    """Write chains as one safetensors file, atomically; `about` says which backbone and guidance made them."""
    write_safetensors(path, vars(chains), {"format": CHAINS_FORMAT, "about": json.dumps(about)})


def load_chains(path: Path) -> tuple[Chains, dict[str, object]]:
    """What `save_chains` wrote.

    Raises:
        CheckpointError: the file is damaged, holds no chains, or holds NaN.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != CHAINS_FORMAT or set(tensors) != {"times", "states", "velocities", "labels"}:
        raise CheckpointError(f"{path} holds no chains. Record it again with ba-solver.")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise CheckpointError(f"{path} holds NaN or infinity. Delete it and record it again.")
    return Chains(**tensors), parse_json(metadata, "about", path)
