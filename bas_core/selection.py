"""Which schedule samples in a number of steps: the fitted one for as many model calls, or plain steps on fitted times.

The numbers here were measured on the demo and on `lab.galaxies`; see docs/measurements.md, "Any number of steps".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from .grids import has_short_first_step, resample_grid, times_at
from .schedule import Schedule, plain_schedule

# From this many times a fitted schedule's model calls on, plain steps on its times end nearer than the schedule itself.
PLAIN_FROM = 1.5


def select_schedule(
    schedules: Mapping[int, Schedule], steps: int, *, analytic: bool = True, conditional_only: bool = True
) -> Schedule:
    """The schedule that samples from t = 1 to 0 in at most `steps` function evaluations.

    It is the largest fitted one that needs no more, so that more steps never end farther off than fewer. Where there is
    none, or only one for far fewer, it is plain steps on the times of the nearest.

    Args:
        schedules: fitted ones by NFE; at least one.
        steps: at least 1.
        analytic: whether a first step may be analytic: the SideNet has a data mean and the start is random noise.
        conditional_only: whether calls may leave out the unconditional branch.

    Raises:
        ValueError: no schedules, or fewer than one step.
    """
    if not schedules:
        raise ValueError("There is no schedule to select from.")
    if steps < 1:
        raise ValueError(f"There must be at least 1 step; got {steps}.")
    usable = {nfe: _restricted(schedule, analytic, conditional_only) for nfe, schedule in schedules.items()}
    usable = {nfe: schedule for nfe, schedule in usable.items() if schedule.nfe <= steps}
    if usable:
        largest = usable[max(usable)]
        if steps == largest.nfe or (largest.fitted and steps < PLAIN_FROM * largest.nfe):
            return largest
        return Schedule(spread(schedules, steps).tolist())
    longer = resample_grid(torch.tensor(schedules[min(schedules)].times, dtype=torch.float32), steps + 1)
    fewest = longer if analytic and has_short_first_step(longer) else spread(schedules, steps)
    return plain_schedule(fewest, analytic)


def select_part(schedules: Mapping[int, Schedule], start: float, end: float, steps: int) -> Schedule:
    """Plain steps over a part of the path, on its share of the fitted times.

    Multistep coefficients do not apply: they weight velocities from the path's beginning on.

    Args:
        schedules: fitted ones by NFE; at least one.
        start, end: flow times of the part, 1 >= start > end >= 0.
        steps: of the part.

    Raises:
        ValueError: no schedules, no steps, or no such part.
    """
    if not 1 >= start > end >= 0:
        raise ValueError(f"A part of the path needs 1 >= start > end >= 0; got {start:g} and {end:g}.")
    if steps < 1:
        raise ValueError(f"There must be at least 1 step; got {steps}.")
    # The path as a whole would take more steps: as many more as the part's share of the fitted times is smaller.
    grids = {nfe: spread(schedules, nfe) for nfe in schedules}
    shares = {nfe: _position(grid, end) - _position(grid, start) for nfe, grid in grids.items()}
    nfe = min(shares, key=lambda nfe: abs(nfe - steps / max(shares[nfe], 1e-6)))
    times = grids[nfe]
    first, last = (len(times) - 1) * _position(times, start), (len(times) - 1) * _position(times, end)
    inside = times_at(times, torch.linspace(first, last, steps + 1, dtype=torch.float64))
    return Schedule([start, *inside[1:-1].tolist(), end])


def spread(schedules: Mapping[int, Schedule], steps: int) -> Tensor:
    """The times [steps + 1] of the nearest schedule with another number of steps, each with a model call.

    The end of an analytic first step is left out: that step is short because it is inexact, which a call is not.
    """
    nearest = schedules[min(schedules, key=lambda nfe: (abs(nfe - steps), nfe))]
    times = torch.tensor(nearest.times, dtype=torch.float32)
    if nearest.analytic_first_step:
        times = torch.cat([times[:1], times[2:]])
    return resample_grid(times, steps)


def _restricted(schedule: Schedule, analytic: bool, conditional_only: bool) -> Schedule:
    return dataclasses.replace(
        schedule,
        analytic_first_step=schedule.analytic_first_step and analytic,
        cfg_coefficients=schedule.cfg_coefficients if conditional_only else (),
    )


def _position(times: Tensor, t: float) -> float:
    """Where t lies among descending times, from 0 (the first) to 1 (the last)."""
    values = times.tolist()
    for i, (before, after) in enumerate(pairwise(values)):
        if t >= after:
            return (i + min(1.0, max(0.0, (before - t) / (before - after)))) / (len(values) - 1)
    return 1.0
