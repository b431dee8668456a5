"""The times of schedules, searched on a surrogate of the model.

A search on the model itself costs 30 to 60 samplings of every trajectory. Here grids are tried on a surrogate; a few
rollouts of the best on the model show how it behaves beside the trajectories, and the next search uses that. The grid
that ends nearest on the model is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ...bas_core.guidance import Field
from ...bas_core.prediction import SideNetProtocol, StraightLine
from ...bas_core.schedule import Schedule
from ...bas_core.sidenet import spread_mean
from ..progress import say
from ..recording.replay import Replay
from .fitting import FIT_TRAJECTORIES, Fitting, Schedules, fit_schedule, takes_conditional_only
from .solvers import endpoint_errors
from .surrogate import Deviations, MeanLine, SubsampledTrajectories, Surrogate, deviations_of, subsampled
from .time_search import search_times

# How often rollouts are made, and from how many noises for each NFE. The best of all searches is taken: once in a few
# recordings the surrogate is wrong about the last.
SEARCHES, ROLLOUTS = 3, 6
SURROGATE_ROUNDS = 6
# No step but the last is shorter than this share of the one before it: the surrogate overrates two calls at nearly one
# time.
SHORTEST = 0.6


def surrogate_search_nfe(trajectories: int, numbers: Sequence[int]) -> int:
    """How many model calls the search and the coefficients take. With conditional-only calls a schedule makes one call
    more than its NFE."""
    return (SEARCHES * ROLLOUTS + min(FIT_TRAJECTORIES, trajectories)) * sum(n + 1 for n in numbers)


def even_enough(times: Tensor) -> bool:
    """Whether steps shrink no faster than the surrogate can be trusted with."""
    steps = times.diff().abs()[:-1]
    return bool((steps[1:] >= SHORTEST * steps[:-1]).all())


def line_through(mean: Tensor | None) -> SideNetProtocol:
    """A straight line instead of a SideNet; with the data mean, its first step is analytic."""
    return StraightLine() if mean is None else MeanLine(mean)


def best_on_surrogate(
    trajectories: SubsampledTrajectories, deviations: Sequence[Deviations], start: float, calls: Mapping[int, int]
) -> Schedules:
    """The best schedules on a surrogate, by NFE, with an analytic first step where that is better.

    Args:
        trajectories, deviations: of the surrogate.
        start: the time that sampling starts from.
        calls: how many calls a schedule makes, by NFE.
    """
    best: dict[int, tuple[float, Schedule]] = {}
    for mean in (None,) if trajectories.means is None else (None, trajectories.means):
        field = Surrogate(trajectories, deviations).field()
        fitting = Fitting(line_through(mean), field, trajectories.noise, trajectories.truth, start)
        found = search_times(fitting, list(calls.values()), SURROGATE_ROUNDS, even_enough)
        for nfe, count in calls.items():
            ends = fit_schedule(fitting, found[count].scaled(start))[0]
            error = endpoint_errors(ends, trajectories.truth(torch.zeros(()))).mean().item()
            if nfe in best:
                say(f"{nfe} calls: about {error:.3g} with an analytic first step, {best[nfe][0]:.3g} without.")
            if nfe not in best or error < best[nfe][0]:
                best[nfe] = error, found[count]
    return {nfe: schedule for nfe, (_, schedule) in best.items()}


def watched(field: Field, subsample: SubsampledTrajectories, calls: list[tuple[float, Tensor, Tensor]]) -> Field:
    """The same field, which adds each call's time, state and velocity, subsampled, to `calls`."""

    def evaluate(x: Tensor, t: Tensor, branches: int) -> Tensor:
        v = field.evaluate(x, t, branches)
        calls.append((float(t[0]), subsample.subsample(x), subsample.subsample(v[0])))
        return v

    return Field(evaluate, field.conditions, field.cfg, combined=field.combined, scale=field.scale)


def rollouts(
    trajectories: SubsampledTrajectories, replay: Replay, rows: Tensor, schedules: Schedules, mean: Tensor | None
) -> tuple[list[Deviations], dict[int, float]]:
    """Sample on the model from the recorded noises; the model calls are added to `replay.nfe`.

    Returns:
        The deviations of each schedule, and its end-point error, by NFE.
    """
    deviations, errors = [], {}
    for nfe, schedule in schedules.items():
        calls: list[tuple[float, Tensor, Tensor]] = []
        field = watched(replay.field_of(rows), trajectories, calls)
        truth = partial(replay.truth, rows)
        fitting = Fitting(line_through(mean), field, replay.noise(rows), truth, replay.backbone.start)
        ends = fit_schedule(fitting, schedule.scaled(fitting.start))[0]
        replay.nfe["rollouts"] += field.calls * len(rows)
        deviations.append(deviations_of(trajectories, calls))
        errors[nfe] = endpoint_errors(ends, truth(torch.zeros(()))).mean().item()
    return deviations, errors


def search_on_surrogate(replay: Replay, numbers: Sequence[int], mean: Tensor | None) -> Schedules:
    """The best times found for each NFE, without coefficients.

    Args:
        replay: trajectories of combined CFG.
        numbers: the NFE.
        mean: [C, S, S] of the data, if the first step may be analytic.
    """
    rows = replay.median_cfg_rows(FIT_TRAJECTORIES)
    trajectories = subsampled(replay.trajectories, rows, 0 if mean is None else mean.shape[-1])
    field, start = replay.field_of(rows[:1]), replay.backbone.start
    calls = {n: n + takes_conditional_only(field, n) for n in numbers}
    spread = None if mean is None else spread_mean(mean, replay.backbone.shape).to(replay.backbone.device)
    few = trajectories.first(ROLLOUTS)
    deviations: list[Deviations] = []
    tried: list[tuple[Schedules, dict[int, float]]] = []
    with torch.inference_mode():
        for index in range(SEARCHES):
            found = best_on_surrogate(few if index else trajectories, deviations, start, calls)
            new, errors = rollouts(few, replay, rows[:ROLLOUTS], found, spread)
            deviations += new
            tried.append((found, errors))
    return {n: min(tried, key=lambda pair: pair[1][n])[0][n] for n in numbers}
