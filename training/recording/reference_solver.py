"""The teacher that makes recordings: its times, and its runs with every point kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ...bas_core.grids import time_shift
from ...bas_core.guidance import Field, Guidance, just_inside
from ...bas_core.solver import Step
from ..baselines import run_baseline

REFERENCE_SOLVER = "adams_pec"

# Trajectories end here: at t = 0 itself a network's velocity means little, and the integral does not depend on it.
LAST_TIME = 0.01

# Of a recording's times: the first gap, in usual gaps, and how far a time may be off, in gaps.
FIRST_GAP = 0.1

JITTER = 0.8


def random_times(
    points: int, generator: torch.Generator, shift: float = 1.0, start: float = 1.0, until: float = LAST_TIME
) -> Tensor:
    """[points] descending times from `start` to `until`, jittered, so that batches cover all.

    Evenly spread, but for the first third, whose gaps grow from a tenth: a multistep teacher begins as Euler's method,
    and its first steps would otherwise make most of its error (five sixths of that of Adams-Bashforth 3 on the demo).

    Args:
        points: how many.
        generator: of the jitter.
        shift: see `time_shift`; above 1 there are more points near the noise.
        start: the first time.
        until: the last one.
    """
    last = time_shift(torch.tensor(until / start), 1 / shift)
    gaps = torch.ones(points - 1)
    ramp = max(1, (points - 1) // 3)
    gaps[:ramp] = torch.linspace(FIRST_GAP, 1, ramp + 1)[:-1]
    gaps *= (1 - last) / gaps.sum()
    t = 1 - torch.cat([torch.zeros(1), gaps.cumsum(0)])
    t[1:-1] += (torch.rand(points - 2, generator=generator) - 0.5) * JITTER * torch.minimum(gaps[1:], gaps[:-1])
    t = time_shift(t, shift) * start
    t[0], t[-1] = start, until  # rounding must not move the ends
    return t


def refined_times(times: Tensor) -> Tensor:
    """The same times with the middle of every interval added: a grid twice as fine."""
    middles = (times[1:] + times[:-1]) / 2
    return torch.cat([torch.stack([times[:-1], middles], 1).flatten(), times[-1:]])


def both_branches(field: Field, guidance: Guidance, seen: list[Tensor]) -> Field:
    """A guided field over a field of two branches, which keeps what both were at every call."""

    def evaluate(x: Tensor, t: Tensor, branches: int) -> Tensor:
        seen.append(field.evaluate(x, t, 2))
        return guidance.combine(seen[-1], just_inside(t[0]))[None]

    return Field(evaluate, field.conditions[:1])


def record_trajectory(field: Field, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Integrate from `noise` by the teacher and keep every point.

    Returns:
        States and velocities, both [B, N + 1, C, *spatial]; one backbone call a point.
    """
    steps: list[Step] = []
    end = run_baseline(REFERENCE_SOLVER, field, noise, times, steps.append)
    states = [step.x for step in steps] + [end]
    velocities = [step.velocity for step in steps] + [field.velocity(end, times[-1])]
    return torch.stack(states, 1), torch.stack(velocities, 1)


def record_branches(field: Field, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same on the guided path, with both branches' velocities instead of the guided one.

    Returns:
        States, conditional and unconditional velocities, each [B, N + 1, C, *spatial].
    """
    seen: list[Tensor] = []
    states, _ = record_trajectory(both_branches(field, field.guidance, seen), noise, times)
    conditional, unconditional = torch.stack(seen, 2)
    return states, conditional, unconditional


def batch_generator(seed: int, index: int) -> torch.Generator:
    """The source of one batch's times and noise, so that a resumed recording draws what a whole one would."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)
