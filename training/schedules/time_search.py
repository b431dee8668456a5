"""The times of a schedule: a search for the grid that ends nearest to the true ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...bas_core.guidance import Field
from ...bas_core.prediction import StraightLine
from ...bas_core.schedule import plain_schedule
from ..progress import progress
from .fitting import Fitting, Schedules, fit_schedule, takes_conditional_only
from .solvers import GridShape, endpoint_errors, search_grid, sidenet_solver

FIRST_MOVE = 0.25


def moved(grid: Tensor, index: int, share: float) -> Tensor:
    """The grid with one inner time moved toward its earlier (share > 0) or later neighbour, by a share of the gap."""
    times = grid.tolist()
    toward = times[index - 1] if share > 0 else times[index + 1]
    times[index] += abs(share) * (toward - times[index])
    return torch.tensor(times, dtype=grid.dtype)


def coordinate_search(error: Callable[[Tensor], float], start: Tensor, rounds: int) -> Tensor:
    """Move one inner time after another, by less and less, as long as the error falls.

    Args:
        error: of a grid.
        start: descending grid.
        rounds: passes over the times; a pass that moves nothing halves the moves.

    Returns:
        A grid with an error no larger than the start's.
    """
    best, least, move = start, error(start), FIRST_MOVE
    for _ in range(rounds):
        before = least
        for index in range(1, len(start) - 1):
            for share in (move, -move):
                candidate = moved(best, index, share)
                found = error(candidate)
                if found < least:
                    best, least = candidate, found
        if least == before:
            move /= 2
    return best


def search_times(
    fitting: Fitting,
    numbers: Sequence[int],
    rounds: int,
    allowed: Callable[[Tensor], bool] = lambda times: True,
) -> Schedules:
    """The best times found for each NFE: first of the family (shift, cosine), then one by one, in rounds.

    Every grid is tried with coefficients fitted on it. Shapes of neighbouring NFE are alike, so each search begins
    where the one before ended.

    Args:
        fitting: the data.
        numbers: the NFE, in which a conditional-only call counts one half.
        rounds: of `coordinate_search`.
        allowed: whether a grid may be taken.

    Returns:
        Schedules from 1 to 0 without coefficients, by NFE.
    """
    first_step = fitting.analytic_first_step
    solver = sidenet_solver(fitting.sidenet or StraightLine(), start=fitting.start)
    ends = fitting.truth(torch.zeros(()))
    found: Schedules = {}
    shape: GridShape | None = None
    for nfe in progress(sorted(numbers), "search times"):
        conditional_only = takes_conditional_only(fitting.field, nfe)
        calls = nfe + conditional_only

        def sample(field: Field, noise: Tensor, times: Tensor, conditional_only: bool = conditional_only) -> Tensor:
            return fit_schedule(fitting, plain_schedule(times, has_data_mean=first_step), conditional_only)[0]

        def error(grid: Tensor, calls: int = calls, conditional_only: bool = conditional_only) -> float:
            candidate = plain_schedule(grid, has_data_mean=first_step)
            if candidate.calls != calls or not allowed(grid):
                return math.inf  # with another first time, the first step may be analytic, or no longer be
            x = fit_schedule(fitting, candidate.scaled(fitting.start), conditional_only)[0]
            return endpoint_errors(x, ends).mean().item()

        fitted = dataclasses.replace(solver, integrate=sample)
        shape = search_grid(fitted, fitting.field, fitting.noise, ends, calls, shape)
        grid = coordinate_search(error, fitted.times(calls, shape), rounds)
        found[nfe] = plain_schedule(grid.tolist(), has_data_mean=first_step)
    return found
