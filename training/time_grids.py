"""What is learned for a number of calls: the times that end nearest to the recorded ends, and the weights of steps and
half calls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..bas_core.grids import calls_of
from ..bas_core.guidance import Field
from ..bas_core.half_calls import HalfCallField, difference_terms
from ..bas_core.quadrature import Rule
from ..bas_core.sidenet import SideNet
from ..bas_core.solver import Proposal, StraightLine, solve
from ..bas_core.step_weights import add_terms, terms
from .closed_loop import Rollout
from .evaluate import GridShape, Sampler, endpoint_errors, sidenet_sampler
from .evaluate import search_grid as search_family
from .multistep import least_squares
from .progress import progress

ROUNDS = 2
FIRST_MOVE = 0.25
# There are about as many weights in a row as steps, and thousands of numbers in a state: few runs say all.
WEIGHT_RUNS = 32
# Half calls, counted from a run's end. Two in a row, or any before the difference of the branches is known well, cost
# more than they save, and a second pair gained nothing on the demo.
HALVES = (-1, -3)


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


Truth = Callable[[Tensor], Tensor]
Rows = dict[int, list[list[float]]]


@dataclass(frozen=True)
class Learned:
    """What is learned for some numbers of calls, under the names that a SideNet's card has for it.

    Attributes:
        time_grids: descending from 1 to 0, by number of calls.
        step_weights, half_calls: rows by number of calls.
    """

    time_grids: dict[int, list[float]] = field(default_factory=dict)
    step_weights: Rows = field(default_factory=dict)
    half_calls: Rows = field(default_factory=dict)

    def only(self, calls: int) -> Learned:
        """What was learned for one number of calls."""
        return Learned(*({calls: rows[calls]} if calls in rows else {} for rows in vars(self).values()))


def joined(parts: Iterable[Learned]) -> Learned:
    """What was learned for one number of calls and another."""
    whole = Learned()
    for part in parts:
        for name, rows in vars(part).items():
            getattr(whole, name).update(rows)
    return whole


@dataclass(frozen=True)
class Fitting:
    """What weights are fitted on, and for which solver.

    Attributes:
        sidenet, rule: of the bi-anchor solver.
        field: of the runs.
        noise: [B, C, *spatial] where they begin.
        truth: their states at a time.
        start: the time that they begin at.
    """

    sidenet: SideNet | None
    field: Field
    noise: Tensor
    truth: Truth
    start: float = 1.0
    rule: Rule | None = None

    @property
    def plain(self) -> Sampler:
        """The solver without weights."""
        return sidenet_sampler(self.sidenet or StraightLine(), start=self.start, rule=self.rule)

    def halves(self, calls: int) -> bool:
        """Whether a number of calls is spent on one anchor more, of which two are half calls."""
        return self.field.pair is not None and calls > len(HALVES) + 1


class Fitted(NamedTuple):
    """A run on weights that were fitted as it went: its ends [B, C, *spatial], and the rows of both kinds."""

    ends: Tensor
    step_weights: list[list[float]]
    half_calls: list[list[float]]


class FitWeights:
    """A `Correct` that finds each step's weights by least squares, on the states that the steps before lead to.

    Args:
        truth: recorded states at a time.

    Attributes:
        rows: what was found, as `StepWeights` takes it.
    """

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.rows: list[list[float]] = []

    def __call__(self, proposal: Proposal) -> Tensor:
        found = terms(proposal)
        self.rows.append(least_squares(found, self.truth(proposal.t1) - proposal.x).tolist())
        return add_terms(proposal.x, found, self.rows[-1])


class FitHalfCalls(HalfCallField):
    """Half calls that find their weights by least squares; to find them, each is a whole call.

    Args:
        field, times: see `HalfCallField`.
        made: how many calls the run makes.

    Attributes:
        found: their rows, as `HalfCalls` takes them.
    """

    def __init__(self, field: Field, times: Tensor, made: int) -> None:
        self.found: list[list[float]] = [[] for _ in range(made)]
        super().__init__(field, times, [[math.nan] if place - made in HALVES else [] for place in range(made)])

    def half_call(self, x: Tensor, t: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """The conditional velocity and the predicted difference, [B, C, *spatial] each."""
        conditional, unconditional = self.two.evaluate(x, t, 2)
        known = difference_terms(conditional, self.seen)
        self.found[place] = least_squares(known, conditional - unconditional).tolist()
        return conditional, add_terms(torch.zeros_like(conditional), known, self.found[place])


def fit_run(fitting: Fitting, times: Tensor, halved: bool = False) -> Fitted:
    """Run over a grid with step weights, and where it is asked for half calls, fitted on the way."""
    steps = FitWeights(fitting.truth)
    skips = fitting.plain.skip_first
    halves = FitHalfCalls(fitting.field, times, calls_of(times, skips)) if halved else None
    ends = solve(
        halves or fitting.field,
        fitting.sidenet,
        fitting.noise,
        times,
        rule=fitting.rule,
        skip_first=skips,
        correct=steps,
    )
    return Fitted(ends, steps.rows, halves.found if halves else [])


def search_times(fitting: Fitting, calls: Sequence[int], rounds: int = ROUNDS) -> dict[int, list[float]]:
    """For each number of calls the best grid found: first of the family (shift, cosine), then time by time, in rounds.

    Every grid is tried with weights fitted on it, and the last, forward-only interval counts for what it is. Shapes of
    neighbouring numbers are alike, so that each search begins where the one before ended.

    Returns:
        Descending grids from 1 to 0, by number of calls, half ones counted as half.
    """
    plain, ends = fitting.plain, fitting.truth(torch.tensor(0.0))
    found: dict[int, list[float]] = {}
    shape: GridShape | None = None
    for n in progress(sorted(calls), "time grids"):
        halved = fitting.halves(n)
        made = n + halved

        def run(field: Field, noise: Tensor, times: Tensor, halved: bool = halved) -> Tensor:
            return fit_run(fitting, times, halved).ends

        sampler = dataclasses.replace(plain, run=run)
        shape = search_family(sampler, fitting.field, fitting.noise, ends, made, shape)

        def error(grid: Tensor, made: int = made, halved: bool = halved) -> float:
            if calls_of(grid, plain.skip_first) != made:
                return math.inf  # a first time has moved to where its call is, or is no longer, to be made
            return endpoint_errors(fit_run(fitting, grid * fitting.start, halved).ends, ends).mean().item()

        found[n] = coordinate_search(error, sampler.times(made, shape), rounds).tolist()
    return found


def weights_on(grids: Mapping[int, list[float]], fitting: Fitting) -> Learned:
    """The grids, with step weights and half calls that are fitted on one run over each."""
    runs = {
        calls: fit_run(fitting, torch.tensor(grid) * fitting.start, fitting.halves(calls))
        for calls, grid in progress(list(grids.items()), "step weights")
    }
    return Learned(
        dict(grids),
        {calls: run.step_weights for calls, run in runs.items()},
        {calls: run.half_calls for calls, run in runs.items() if run.half_calls},
    )


def on_runs(sidenet: SideNet, rollout: Rollout, count: int) -> Fitting:
    """What is fitted on so many recorded runs."""
    rows = rollout.alike(count)
    return Fitting(
        sidenet,
        rollout.field_of(rows),
        rollout.noise(rows),
        partial(rollout.truth, rows),
        rollout.backbone.start,
        rollout.rule,
    )


def learn_grids(
    sidenet: SideNet, rollout: Rollout, calls: Sequence[int], count: int, rounds: int = ROUNDS
) -> dict[int, list[float]]:
    """The best grid found for each number of calls on `count` recorded runs; what it cost is added to `spent`."""
    fitting = on_runs(sidenet, rollout, count)
    with torch.inference_mode():
        found = search_times(fitting, calls, rounds)
    rollout.spent["time grids"] += fitting.field.calls * len(fitting.noise)
    return found


def fit_weights(sidenet: SideNet, rollout: Rollout, grids: Mapping[int, list[float]]) -> Learned:
    """`weights_on` the grids, on `WEIGHT_RUNS` recorded runs; what it cost is added to `spent`."""
    fitting = on_runs(sidenet, rollout, WEIGHT_RUNS)
    with torch.inference_mode():
        found = weights_on(grids, fitting)
    rollout.spent["step weights"] += fitting.field.calls * len(fitting.noise)
    return found
