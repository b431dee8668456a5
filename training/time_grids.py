"""Learned time grids: for a number of calls, the times that end nearest to the recorded ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..bas_core.grids import calls_of
from ..bas_core.sidenet import SideNet
from .closed_loop import Rollout
from .evaluate import endpoint_errors, sidenet_sampler
from .evaluate import search_grid as search_family
from .progress import progress

ROUNDS = 5
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


def learn_grids(sidenet: SideNet, rollout: Rollout, calls: Sequence[int], count: int) -> dict[int, list[float]]:
    """For each number of calls the best grid found: first of the family (shift, cosine), then time by time.

    The measure is the end point from the noises of `count` recorded runs, so the last, forward-only interval counts
    for what it is.

    Returns:
        Descending grids from 1 to 0, by number of calls. What it cost is added to `rollout.spent`.
    """
    runs = torch.arange(0, len(rollout.chains), rollout.chains.branches)
    scales = torch.zeros(len(rollout.chains)) if rollout.chains.scales is None else rollout.chains.scales
    rows = runs[scales[runs] == scales[runs[0]]][:count]
    field, noise = rollout.field_of(rows), rollout.noise(rows)
    start = rollout.backbone.start
    truth = rollout.truth(rows, torch.tensor(0.0))
    sampler = sidenet_sampler(sidenet, start=start, rule=rollout.rule)
    found: dict[int, list[float]] = {}
    with torch.inference_mode():
        for n in progress(calls, "time grids"):
            shape = search_family(sampler, field, noise, truth, n)

            def error(grid: Tensor, calls: int = n) -> float:
                if calls_of(grid, sampler.skip_first) != calls:
                    return math.inf  # a first time has moved to where its call is, or is no longer, to be made
                return endpoint_errors(sampler.run(field, noise, grid * start), truth).mean().item()

            found[n] = coordinate_search(error, sampler.times(n, shape)).tolist()
    rollout.spent["time grids"] += field.calls * len(rows)
    return found
