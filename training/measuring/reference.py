"""Reference solutions, fine enough to be measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...bas_core.grids import time_shift
from ...bas_core.guidance import Field
from ...bas_core.solver import Step
from ..backbones import Backbone
from ..baselines import run_baseline
from ..recording.reference_solver import LAST_TIME, REFERENCE_SOLVER
from ..recording.trajectories import Trajectories
from ..schedules.solvers import endpoint_errors

# Of a fine solution every so many-th point is kept, for the states between.
STORED_POINTS = 4


@dataclass(frozen=True)
class Paths:
    """Reference solutions from some noises.

    Attributes:
        field: of these samples.
        noise: [B, C, *spatial].
        ends: [B, C, *spatial] at t = 0.
        truth: their states at any time.
        error: root-mean-square distance of the ends to those of a grid half as fine: an upper bound of their error.
    """

    field: Field
    noise: Tensor
    ends: Tensor
    truth: Callable[[Tensor], Tensor]
    error: float


def reference_times(backbone: Backbone, points: int) -> Tensor:
    """Fine descending times, as a recording has them, without jitter."""
    t = time_shift(torch.linspace(1, LAST_TIME, points), backbone.shift**0.5) * backbone.start
    t[0], t[-1] = backbone.start, LAST_TIME  # rounding must not move the ends
    return t


def reference_paths(field: Field, noise: Tensor, backbone: Backbone, points: int, between: bool = True) -> Paths:
    """Integrate finely from noise, in main memory.

    Args:
        field: of the samples.
        noise: [B, C, *spatial].
        backbone: for its times.
        points: of the solution.
        between: whether states between the ends are asked for; without, two of the points are kept.
    """
    times = reference_times(backbone, points)
    coarse = run_baseline(REFERENCE_SOLVER, field, noise, torch.cat([times[:-1:2], times[-1:]]))
    stored = [i for i in range(0, points - 1, STORED_POINTS if between else points)]
    states: list[Tensor] = []
    velocities: list[Tensor] = []

    def keep(step: Step) -> None:
        if step.index in stored:
            states.append(step.x)
            velocities.append(step.velocity)

    states.append(run_baseline(REFERENCE_SOLVER, field, noise, times, keep))
    velocities.append(field.velocity(states[-1], times[-1]))
    error = endpoint_errors(states[-1], coarse).mean().item()
    rows = torch.arange(len(noise))
    kept = times[[*stored, points - 1]].expand(len(noise), -1)
    trajectories = Trajectories(kept, torch.stack(states, 1), torch.stack(velocities, 1), rows)
    return Paths(field, noise, trajectories.ends(rows), partial(trajectories.truth, rows), error)


def draw_paths(
    backbone: Backbone, field_of: Callable[[Tensor], Field], seed: int, count: int, points: int, between: bool = True
) -> Paths:
    """Reference solutions from fresh noise, the conditions in turn; `field_of` is given them in main memory."""
    generator = torch.Generator().manual_seed(seed)
    noise = backbone.noise(torch.randn((count, *backbone.shape), generator=generator))
    return reference_paths(field_of(torch.arange(count) % backbone.conditions), noise, backbone, points, between)
