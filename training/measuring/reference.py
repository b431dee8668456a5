"""Reference solutions, fine enough to be measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...bas_core.grids import time_shift
from ...bas_core.guidance import Field
from ..backbones import Backbone
from ..recording.reference_solver import LAST_TIME, record_trajectory
from ..recording.trajectories import Trajectories
from ..schedules.solvers import endpoint_errors

# Euler with so many calls is what people know; it is in every table.
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


def reference_paths(field: Field, noise: Tensor, backbone: Backbone, points: int) -> Paths:
    """Integrate finely from noise."""
    times = reference_times(backbone, points)
    half, _ = record_trajectory(field, noise, torch.cat([times[:-1:2], times[-1:]]))
    states, velocities = record_trajectory(field, noise, times)
    error = endpoint_errors(states[:, -1], half[:, -1]).mean().item()
    stored = torch.arange(0, points, STORED_POINTS)
    stored = torch.cat([stored[stored < points - 1], torch.tensor([points - 1])])
    trajectories = Trajectories(
        times[stored].expand(len(noise), -1), states[:, stored].cpu(), velocities[:, stored].cpu(), stored[:1]
    )
    rows = torch.arange(len(noise))
    ends = trajectories.ends(rows).to(noise.device)

    def truth(t: Tensor) -> Tensor:
        return ends if float(t) == 0 else trajectories.at(rows, t).to(noise.device)

    return Paths(field, noise, ends, truth, error)


def draw_paths(backbone: Backbone, field_of: Callable[[Tensor], Field], seed: int, count: int, points: int) -> Paths:
    """Reference solutions from fresh noise, the conditions in turn."""
    generator = torch.Generator().manual_seed(seed)
    noise = backbone.noise(torch.randn((count, *backbone.shape), generator=generator)).to(backbone.device)
    return reference_paths(field_of(torch.arange(count) % backbone.conditions), noise, backbone, points)
