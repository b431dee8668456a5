"""The times of a run: a search for the grid that ends nearest to the recorded ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...bas_core.guidance import Field
from ...bas_core.prediction import StraightLine
from ...bas_core.schedule import Schedule, match_schedule
from ..progress import progress
from .fitting import Fitting, Schedules, fit_schedule, has_conditional_only
from .solvers import GridShape, endpoint_errors, search_grid, sidenet_solver

ROUNDS = 2

FIRST_MOVE = 0.25


def moved(grid: Tensor, index: int, share: float) -> Tensor:
    """The grid with one inner time moved toward its earlier (share > 0) or later neighbour, by a share of the gap."""
    times = grid.tolist()
    toward = times[index - 1] if share > 0 else times[index + 1]
    times[index] += abs(share) * (toward - times[index])
    return torch.tensor(times, dtype=grid.dtype)


def coordinate_search(error: Callable[[Tensor], float], start: Tensor, rounds: int = ROUNDS) -> Tensor:
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
    fitting: Fitting, calls: Sequence[int], rounds: int = ROUNDS, allowed: Callable[[Tensor], bool] = lambda times: True
) -> Schedules:
    """For each number of calls the best times found: first of the family (shift, cosine), then one by one, in rounds,
    among those that are allowed.

    Every grid is tried with weights fitted on it, and the last, forward-only interval counts for what it is. Shapes of
    neighbouring numbers are alike, so that each search begins where the one before ended.

    Returns:
        Schedules from 1 to 0 without weights, by number of calls, half ones counted as half.
    """
    plain = sidenet_solver(fitting.sidenet or StraightLine(), start=fitting.start)
    ends = fitting.truth(torch.zeros(()))
    found: Schedules = {}
    shape: GridShape | None = None
    for n in progress(sorted(calls), "time grids"):
        halved = has_conditional_only(fitting.field, n)
        made = n + halved

        def run(field: Field, noise: Tensor, times: Tensor, halved: bool = halved) -> Tensor:
            return fit_schedule(fitting, match_schedule(times, has_data_mean=fitting.analytic), halved)[0]

        solver = dataclasses.replace(plain, run=run)
        shape = search_grid(solver, fitting.field, fitting.noise, ends, made, shape)
        found[n] = moved_times(fitting, n, solver.times(made, shape), rounds, allowed)
    return found


def moved_times(
    fitting: Fitting, calls: int, times: Tensor, rounds: int, allowed: Callable[[Tensor], bool] = lambda times: True
) -> Schedule:
    """The run that a coordinate search comes to from some times, which are from 1 to 0; without weights."""
    halved, ends = has_conditional_only(fitting.field, calls), fitting.truth(torch.zeros(()))

    def error(grid: Tensor) -> float:
        candidate = match_schedule(grid, has_data_mean=fitting.analytic)
        if candidate.calls != calls + halved or not allowed(grid):
            return math.inf  # a first time may have moved to where its call is, or is no longer, to be made
        return endpoint_errors(fit_schedule(fitting, candidate.scaled(fitting.start), halved)[0], ends).mean().item()

    return match_schedule(coordinate_search(error, times, rounds).tolist(), has_data_mean=fitting.analytic)
