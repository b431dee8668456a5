"""The reference solver that makes recordings: its times, and its trajectories with every point kept."""

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
# The first gap between times, over the usual gap; and how far a time may be moved at random, in gaps.
FIRST_GAP = 0.1
JITTER = 0.8


def random_times(
    points: int, generator: torch.Generator, shift: float = 1.0, start: float = 1.0, until: float = LAST_TIME
) -> Tensor:
    """[points] descending times from `start` to `until`, jittered, so that batches together cover all times.

    The gaps are even, but for the first third, where they grow from a tenth: a multistep solver begins as Euler's
    method, and its first steps would otherwise make most of its error.

    Args:
        points: how many.
        generator: of the jitter.
        shift: see `time_shift`; above 1 there are more points near the noise.
        start, until: first and last time.
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
    """The same times with the middle of every interval added."""
    middles = (times[1:] + times[:-1]) / 2
    return torch.cat([torch.stack([times[:-1], middles], 1).flatten(), times[-1:]])


def record_trajectory(field: Field, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Integrate from `noise` over N times and keep every point; costs one model call a point.

    Returns:
        States and velocities, both [B, N, C, *spatial].
    """
    steps: list[Step] = []
    end = run_baseline(REFERENCE_SOLVER, field, noise, times, steps.append)
    states = [step.x for step in steps] + [end]
    velocities = [step.velocity for step in steps] + [field.velocity(end, times[-1])]
    return torch.stack(states, 1), torch.stack(velocities, 1)


def record_branches(field: Field, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same trajectory with both branches' velocities instead of the combined one.

    Returns:
        States, conditional and unconditional velocities, each [B, N, C, *spatial].
    """
    both: list[Tensor] = []
    guidance: Guidance = field.guidance

    def evaluate(x: Tensor, t: Tensor, branches: int) -> Tensor:
        both.append(field.evaluate(x, t, 2))
        return guidance.combine(both[-1], just_inside(t[0]))[None]

    states, _ = record_trajectory(Field(evaluate, field.conditions[:1]), noise, times)
    conditional, unconditional = torch.stack(both, 2)
    return states, conditional, unconditional


def batch_generator(seed: int, index: int) -> torch.Generator:
    """The source of one batch's times and noise; a resumed recording draws what an uninterrupted one would."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)
