"""What is learned for a number of calls: the times that end nearest to the recorded ends, and the steps' weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..bas_core.grids import calls_of
from ..bas_core.guidance import Field
from ..bas_core.quadrature import Rule
from ..bas_core.sidenet import SideNet
from ..bas_core.solver import Proposal, solve
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


def fit_step_weights(
    sidenet: SideNet, field: Field, noise: Tensor, times: Tensor, truth: Truth, skip_first: bool, rule: Rule | None
) -> tuple[Tensor, list[list[float]]]:
    """One run from noises whose paths are known: its ends [B, C, *spatial], and the weights found on the way."""
    fitted = FitWeights(truth)
    x = solve(field, sidenet, noise, times, rule=rule, skip_first=skip_first, correct=fitted)
    return x, fitted.rows


def weighted_sampler(sidenet: SideNet, truth: Truth, start: float = 1.0, rule: Rule | None = None) -> Sampler:
    """BA-solver on step weights that are fitted anew on every run; for searching grids, from the truth's noises."""
    plain = sidenet_sampler(sidenet, start=start)

    def run(field: Field, x: Tensor, times: Tensor) -> Tensor:
        return fit_step_weights(sidenet, field, x, times, truth, plain.skip_first, rule)[0]

    return dataclasses.replace(plain, run=run)


def search_times(
    sampler: Sampler, field: Field, noise: Tensor, ends: Tensor, calls: Sequence[int]
) -> dict[int, list[float]]:
    """For each number of calls the best grid found: first of the family (shift, cosine), then time by time. Shapes of
    neighbouring numbers are alike, so that each search begins where the one before ended.

    Args:
        sampler: BA-solver, best from `weighted_sampler`.
        field, noise: to sample from.
        ends: [B, C, *spatial] where the paths from there end.
        calls: numbers of calls.

    Returns:
        Descending grids from 1 to 0, by number of calls.
    """
    found: dict[int, list[float]] = {}
    shape: GridShape | None = None
    with torch.inference_mode():
        for n in progress(sorted(calls), "time grids"):
            shape = search_family(sampler, field, noise, ends, n, shape)

            def error(grid: Tensor, calls: int = n) -> float:
                if calls_of(grid, sampler.skip_first) != calls:
                    return math.inf  # a first time has moved to where its call is, or is no longer, to be made
                return endpoint_errors(sampler.run(field, noise, grid * sampler.start), ends).mean().item()

            found[n] = coordinate_search(error, sampler.times(n, shape)).tolist()
    return found


def learn_grids(sidenet: SideNet, rollout: Rollout, calls: Sequence[int], count: int) -> dict[int, list[float]]:
    """The best grid found for each number of calls, by the end points from the noises of `count` recorded runs.

    So the last, forward-only interval counts for what it is. Every grid is tried with step weights fitted on it. What
    it cost is added to `rollout.spent`.
    """
    rows = rollout.alike(count)
    field, noise = rollout.field_of(rows), rollout.noise(rows)
    truth = partial(rollout.truth, rows)
    sampler = weighted_sampler(sidenet, truth, rollout.backbone.start, rollout.rule)
    found = search_times(sampler, field, noise, truth(torch.tensor(0.0)), calls)
    rollout.spent["time grids"] += field.calls * len(rows)
    return found


def weights_on(
    grids: Mapping[int, Sequence[float]],
    sidenet: SideNet,
    field: Field,
    noise: Tensor,
    truth: Truth,
    start: float,
    rule: Rule,
) -> dict[int, list[list[float]]]:
    """Step weights for each grid, fitted on one run over it: rows of `StepWeights` by number of calls."""
    skips = sidenet_sampler(sidenet, start=start).skip_first
    with torch.inference_mode():
        return {
            calls: fit_step_weights(sidenet, field, noise, torch.tensor(grid) * start, truth, skips, rule)[1]
            for calls, grid in progress(list(grids.items()), "step weights")
        }


def fit_weights(
    sidenet: SideNet, rollout: Rollout, grids: Mapping[int, Sequence[float]]
) -> dict[int, list[list[float]]]:
    """Step weights for each grid, on `WEIGHT_RUNS` recorded runs; what it cost is added to `rollout.spent`."""
    rows = rollout.alike(WEIGHT_RUNS)
    field, noise = rollout.field_of(rows), rollout.noise(rows)
    truth = partial(rollout.truth, rows)
    found = weights_on(grids, sidenet, field, noise, truth, rollout.backbone.start, rollout.rule)
    rollout.spent["step weights"] += field.calls * len(rows)
    return found
