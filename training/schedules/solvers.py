"""Solvers with one interface: each samples from a noise in so many NFE, on a grid of a family or on a schedule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...bas_core.grids import grid_for_nfe, time_grid
from ...bas_core.guidance import Field
from ...bas_core.prediction import SideNetProtocol
from ...bas_core.schedule import Schedule, plain_schedule
from ...bas_core.solver import solve
from ..baselines import BASELINES, run_baseline

GridOrSchedule = Tensor | Schedule
Integrate = Callable[[Field, Tensor, Any], Tensor]
GridShape = tuple[float, float]
UNIFORM: GridShape = (1.0, 0.0)


@dataclass(frozen=True)
class Solver:
    """A solver.

    Attributes:
        name, label: for files and for people.
        integrate: (field, noise [B, ...], times or schedule) to the end state.
        calls_per_step: model calls a step. Where it is 2, one or two Euler steps at the end spend the NFE exactly and
            keep off t = 0, where a network's velocity means little (as EDM's Heun sampler does).
        start: the time that the model's noise is at; grids are scaled by it.
        schedules: times or schedules by NFE, instead of the family's grids.
        analytic_first_step: whether the first call is saved where the first interval is short; there is then one
            interval more.
    """

    name: str
    label: str
    integrate: Integrate
    calls_per_step: int = 1
    start: float = 1.0
    schedules: Mapping[int, GridOrSchedule] | None = None
    analytic_first_step: bool = False

    def times(self, nfe: int, shape: GridShape = UNIFORM) -> Tensor:
        """The grid of the family (shift, cosine) that spends exactly this NFE."""
        intervals = nfe if self.calls_per_step == 1 else nfe // 2 + 1
        return grid_for_nfe(lambda n: time_grid(n, *shape), intervals, self.analytic_first_step)

    def sample(self, field: Field, noise: Tensor, nfe: int, shape: GridShape = UNIFORM) -> Tensor:
        """The end state [B, ...] from a noise [B, ...], on the solver's schedule or else on a grid of the family."""
        times = self.times(nfe, shape) if self.schedules is None else self.schedules[nfe]
        if isinstance(times, Schedule):
            return self.integrate(field, noise, times.scaled(self.start))
        times = times * self.start
        if self.calls_per_step == 1:
            return self.integrate(field, noise, times)
        steps = (nfe - 1) // 2
        x = self.integrate(field, noise, times[: steps + 1]) if steps else noise
        return run_baseline("euler", field, x, times[steps:])


def baseline_solver(name: str, start: float = 1.0) -> Solver:
    """A training-free solver of `training.baselines`."""
    baseline = BASELINES[name]

    def integrate(field: Field, x: Tensor, times: Tensor) -> Tensor:
        return run_baseline(baseline, field, x, times)

    return Solver(name, baseline.label, integrate, baseline.calls_per_step, start)


def sidenet_solver(
    sidenet: SideNetProtocol, name: str = "ba_solver", label: str = "BA-solver", start: float = 1.0, **options: Any
) -> Solver:
    """The bi-anchor solver with a SideNet; `options` go to `solve`."""
    analytic = start == 1 and sidenet.has_data_mean

    def integrate(field: Field, x: Tensor, over: GridOrSchedule) -> Tensor:
        schedule = over if isinstance(over, Schedule) else plain_schedule(over, has_data_mean=analytic)
        return solve(field, sidenet, x, schedule, **options)

    return Solver(name, label, integrate, start=start, analytic_first_step=analytic)


def endpoint_errors(x: Tensor, reference: Tensor) -> Tensor:
    """[B] root-mean-square differences."""
    return (x - reference).square().flatten(1).mean(1).sqrt()


SEARCH_SHIFTS = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
SEARCH_COSINES = (-0.2, 0.15, 0.5)
SEARCH_HALVINGS = 3


def search_grid(
    solver: Solver, field: Field, noise: Tensor, reference: Tensor, nfe: int, start: GridShape | None = None
) -> GridShape:
    """The (shift, cosine) of least end-point error: a pattern search with halving steps from `start`, or else from the
    best of a coarse lattice."""
    errors: dict[GridShape, float] = {}

    def error(shape: GridShape) -> float:
        if shape not in errors:
            errors[shape] = endpoint_errors(solver.sample(field, noise, nfe, shape), reference).mean().item()
        return errors[shape]

    best = start or min(itertools.product(SEARCH_SHIFTS, SEARCH_COSINES), key=error)
    ratio, step = 1.17, 0.17
    for _ in range(SEARCH_HALVINGS):
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
