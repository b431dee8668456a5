"""A solver as a competitor: what it makes of a noise with so many calls, on which grid, and how far off it ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...bas_core.grids import grid_for_nfe, time_grid
from ...bas_core.guidance import Field
from ...bas_core.prediction import SideNetProtocol
from ...bas_core.schedule import Schedule, match_schedule
from ...bas_core.solver import solve
from ..baselines import BASELINES, run_baseline

Over = Tensor | Schedule
Run = Callable[[Field, Tensor, Any], Tensor]
GridShape = tuple[float, float]
UNIFORM: GridShape = (1.0, 0.0)


@dataclass(frozen=True)
class Solver:
    """A competitor.

    Attributes:
        name, label: for files and for people.
        run: (field, noise [B, ...], times or fitted run) to the end state.
        calls_per_step: backbone calls a step. Where it is 2, one or two Euler steps at the end spend the budget
            exactly and keep off t = 0, where a network's velocity means little (as EDM's Heun solver does).
        start: the time that the model's noise is at; grids are scaled by it.
        given: what it runs over, by number of calls, instead of the family's grid: times, or a fitted run.
        has_data_mean: whether a short first step is analytic; the solver then takes one step more.
    """

    name: str
    label: str
    run: Run
    calls_per_step: int = 1
    start: float = 1.0
    given: Mapping[int, Over] | None = None
    has_data_mean: bool = False

    def times(self, calls: int, shape: GridShape = UNIFORM) -> Tensor:
        """The grid of the family (shift, cosine) that spends exactly `calls` backbone calls."""
        intervals = calls if self.calls_per_step == 1 else calls // 2 + 1
        return grid_for_nfe(lambda n: time_grid(n, *shape), intervals, self.has_data_mean)

    def over(self, calls: int, shape: GridShape = UNIFORM) -> Over:
        """What it runs over on `calls` backbone calls, from the time that the model's noise is at."""
        over = self.times(calls, shape) if self.given is None else self.given[calls]
        return over.scaled(self.start) if isinstance(over, Schedule) else over * self.start

    def sample(self, field: Field, noise: Tensor, calls: int, shape: GridShape = UNIFORM) -> Tensor:
        """Run on `calls` backbone calls."""
        over = self.over(calls, shape)
        if self.calls_per_step == 1 or isinstance(over, Schedule):
            return self.run(field, noise, over)
        steps = (calls - 1) // 2
        x = self.run(field, noise, over[: steps + 1]) if steps else noise
        return run_baseline("euler", field, x, over[steps:])


def baseline_solver(name: str, start: float = 1.0) -> Solver:
    """A training-free solver of `training.baselines` as a competitor."""
    solver = BASELINES[name]
    return Solver(
        name, solver.label, lambda field, x, t: run_baseline(solver, field, x, t), solver.calls_per_step, start
    )


def sidenet_solver(
    sidenet: SideNetProtocol, name: str = "ba_solver", label: str = "BA-solver", start: float = 1.0, **options: Any
) -> Solver:
    """The bi-anchor solver with a SideNet as a competitor; `options` go to `solve`."""
    skips = start == 1 and sidenet.has_data_mean

    def run(field: Field, x: Tensor, over: Over) -> Tensor:
        return solve(
            field,
            sidenet,
            x,
            over if isinstance(over, Schedule) else match_schedule(over, has_data_mean=skips),
            **options,
        )

    return Solver(name, label, run, start=start, has_data_mean=skips)


def endpoint_errors(x: Tensor, reference: Tensor) -> Tensor:
    """[B] root-mean-square differences."""
    return (x - reference).square().flatten(1).mean(1).sqrt()


SEARCH_SHIFTS = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
SEARCH_COSINES = (-0.2, 0.15, 0.5)
SEARCH_REFINEMENTS = 3


def search_grid(
    solver: Solver, field: Field, noise: Tensor, reference: Tensor, calls: int, start: GridShape | None = None
) -> GridShape:
    """The (shift, cosine) of least end-point error: a pattern search of halving step from `start`, or else from the
    best of a coarse lattice."""
    known: dict[GridShape, float] = {}

    def error(shape: GridShape) -> float:
        if shape not in known:
            known[shape] = endpoint_errors(solver.sample(field, noise, calls, shape), reference).mean().item()
        return known[shape]

    best = start or min(itertools.product(SEARCH_SHIFTS, SEARCH_COSINES), key=error)
    ratio, step = 1.17, 0.17
    for _ in range(SEARCH_REFINEMENTS):
        shift, cosine = best
        near: Sequence[GridShape] = [
            best,
            (round(shift * ratio, 4), cosine),
            (round(shift / ratio, 4), cosine),
            (shift, round(min(1.0, cosine + step), 4)),
            (shift, round(max(-1.0, cosine - step), 4)),
        ]
        best = min(near, key=error)
        if best == (shift, cosine):
            ratio, step = ratio**0.5, step / 2
    return best
