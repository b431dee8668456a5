"""The reference solver that makes recordings: its times, and its trajectories with every point kept."""

from __future__ import annotations

import numpy as np
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


# Times that follow the model lie as densely as this power of the velocity's third derivative, with a floor of a share
# of the mean density. Their first fifth of gaps grows from .3 of the usual one.
DENSITY_POWER, DENSITY_FLOOR, SMOOTHED = 1 / 3, 0.1, 5
ADAPTED_FIRST_GAP, ADAPTED_RAMP = 0.3, 0.2


def default_times(points: int, shift: float = 1.0, start: float = 1.0, until: float = LAST_TIME) -> Tensor:
    """[points] descending times from `start` to `until`.

    The gaps are even, but for the first third, where they grow from a tenth: a multistep solver begins as Euler's
    method, and its first steps would otherwise make most of its error.

    Args:
        points: how many.
        shift: see `time_shift`; above 1 there are more points near the noise.
        start, until: first and last time.
    """
    last = time_shift(torch.tensor(until / start), 1 / shift)
    gaps = torch.ones(points - 1)
    ramp = max(1, (points - 1) // 3)
    gaps[:ramp] = torch.linspace(FIRST_GAP, 1, ramp + 1)[:-1]
    gaps *= (1 - last) / gaps.sum()
    t = time_shift(1 - torch.cat([torch.zeros(1), gaps.cumsum(0)]), shift) * start
    t[0], t[-1] = start, until  # rounding must not move the ends
    return t


def jittered(times: Tensor, generator: torch.Generator) -> Tensor:
    """Times whose inner ones are moved at random, so that batches together cover all times."""
    gaps = -times.diff()
    moved = times.clone()
    moved[1:-1] += (torch.rand(len(times) - 2, generator=generator) - 0.5) * JITTER * torch.minimum(gaps[1:], gaps[:-1])
    return moved


def adapted_times(points: int, times: Tensor, velocities: Tensor) -> Tensor:
    """[points] descending times that lie densely where the velocity along the path bends.

    Args:
        points: how many.
        times: [N] of a few trajectories' points, N at least 8; the result has the same ends.
        velocities: [B, N, C, *spatial] there.
    """
    t = times.double().numpy()
    divided = velocities.double().flatten(2).transpose(0, 1).numpy()
    for order in (1, 2, 3):
        divided = (divided[1:] - divided[:-1]) / (t[order:] - t[:-order])[:, None, None]
    density = np.sqrt(np.square(divided).mean((1, 2))) ** DENSITY_POWER
    edge = SMOOTHED // 2
    density = np.convolve(np.pad(density, edge, mode="edge"), np.ones(SMOOTHED) / SMOOTHED, "valid")
    fine = np.linspace(t[0], t[-1], 2001)
    density = np.interp(-fine, -(t[3:] + t[:-3]) / 2, density)
    density = np.maximum(density, DENSITY_FLOOR * density.mean() + 1e-12)
    places = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    gaps = np.ones(points - 1)
    ramp = max(1, int((points - 1) * ADAPTED_RAMP))
    gaps[:ramp] = np.linspace(ADAPTED_FIRST_GAP, 1, ramp + 1)[:-1]
    wanted = np.concatenate([[0], np.cumsum(gaps)]) / gaps.sum()
    found = torch.from_numpy(np.interp(wanted, places / places[-1], fine)).float()
    found[0], found[-1] = times[0], times[-1]  # rounding must not move the ends
    return found


def record_trajectory(field: Field, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Integrate from `noise` over N times and keep every point, where the noise is; costs one model call a point.

    Returns:
        States and velocities, both [B, N, C, *spatial].
    """
    states = noise.new_empty(len(noise), len(times), *noise.shape[1:])
    velocities = torch.empty_like(states)

    def keep(step: Step) -> None:
        states[:, step.index], velocities[:, step.index] = step.x, step.velocity

    states[:, -1] = run_baseline(REFERENCE_SOLVER, field, noise, times, keep)
    velocities[:, -1] = field.velocity(states[:, -1], times[-1])
    return states, velocities


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
