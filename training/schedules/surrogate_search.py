"""The times of a run without a search on the model: on the recorded paths, with a few real runs to learn from.

A search that tries every grid on the model costs 30 to 60 samplings of every recorded run. Here grids are tried on a
stand-in (`stand_in.py`); a few real runs over the best of them tell how the model behaves beside its paths, and the
next search knows that. What ends nearest on the model is weighted on more runs, as all grids are (`fitting.py`).
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
from .fitting import FITTED_TRAJECTORIES, Fitting, Schedules, fit_schedule, has_conditional_only
from .solvers import endpoint_errors
from .surrogate import Deviations, MeanLine, SubsampledTrajectories, Surrogate, deviations_of, subsampled
from .time_search import search_times

# How often real runs are looked at, and how many of them for each number of calls. Of the times that were looked at the
# best are taken: once in a few recordings the stand-in is wrong about the last ones that it finds.
PROBES, PROBED = 3, 6
ROUNDS = 6
# No step is shorter than this share of the one before it, but for the last: the stand-in would have two calls at nearly
# one time, to tell what changes there, and the model does not keep to it so exactly.
SHORTEST = 0.6


def surrogate_search_nfe(runs: int, calls: Sequence[int]) -> int:
    """How many calls `search_on_surrogate` and the weights make, on so many runs; with half calls a run makes one more
    than
    it costs."""
    return (PROBES * PROBED + min(FITTED_TRAJECTORIES, runs)) * sum(n + 1 for n in calls)


def even_enough(times: Tensor) -> bool:
    """Whether steps shrink no faster than the stand-in can be trusted with."""
    steps = times.diff().abs()[:-1]
    return bool((steps[1:] >= SHORTEST * steps[:-1]).all())


def line_through(mean: Tensor | None) -> SideNetProtocol:
    """What takes a SideNet's place where there is none: it saves a first call where the mean of the data is given."""
    return StraightLine() if mean is None else MeanLine(mean)


def on_stand_in(subsampled: SubsampledTrajectories, seen: Sequence[Deviations], start: float, saves: bool) -> Fitting:
    """What is fitted on a stand-in, with or without the first call saved."""
    line = line_through(subsampled.means if saves else None)
    noise = subsampled.trajectories.states[
        torch.arange(len(subsampled)), torch.zeros(len(subsampled), dtype=torch.long)
    ]
    return Fitting(line, Surrogate(subsampled, seen).field(), noise, subsampled.truth, start)


def search_stand_in(
    subsampled: SubsampledTrajectories, seen: Sequence[Deviations], start: float, made: Mapping[int, int]
) -> Schedules:
    """The best runs on a stand-in, by number of calls: with the first call saved where that is the better for it.

    Args:
        subsampled, seen: of the stand-in.
        start: the time that sampling starts from.
        made: by number of calls, how many a run makes, half ones counted as whole.
    """
    found: dict[int, tuple[float, Schedule]] = {}
    for saves in (False, True)[: 1 + (subsampled.means is not None)]:
        fitting = on_stand_in(subsampled, seen, start, saves)
        runs = search_times(fitting, list(made.values()), ROUNDS, even_enough)
        for calls, count in made.items():
            ends = fit_schedule(fitting, runs[count].scaled(start))[0]
            error = endpoint_errors(ends, subsampled.truth(torch.zeros(()))).mean().item()
            if calls in found:
                other = found[calls][0]
                say(f"{calls} calls: about {error:.3g} with the first call saved, {other:.3g} with it made.")
            if calls not in found or error < found[calls][0]:
                found[calls] = error, runs[count]
    return {calls: run for calls, (_, run) in found.items()}


def watched(field: Field, subsampled: SubsampledTrajectories, calls: list[tuple[float, Tensor, Tensor]]) -> Field:
    """The same field, which notes time, state and velocity of each call, subsampled."""

    def evaluate(x: Tensor, t: Tensor, branches: int) -> Tensor:
        v = field.evaluate(x, t, branches)
        calls.append((float(t[0]), subsampled.thin(x), subsampled.thin(v[0])))
        return v

    return Field(evaluate, field.conditions, field.cfg, combined=field.combined, scale=field.scale)


def probe(
    subsampled: SubsampledTrajectories, replay: Replay, rows: Tensor, runs: Schedules, mean: Tensor | None
) -> tuple[list[Deviations], dict[int, float]]:
    """Real runs over these times from the recorded noises; the cost is added to `replay.spent`.

    Returns:
        What each saw, and how far from the recorded ends it came, by number of calls.
    """
    line, start = line_through(mean), replay.backbone.start
    seen, errors = [], {}
    for number, run in runs.items():
        calls: list[tuple[float, Tensor, Tensor]] = []
        field = watched(replay.field_of(rows), subsampled, calls)
        fitting = Fitting(line, field, replay.noise(rows), partial(replay.truth, rows), start)
        ends = fit_schedule(fitting, run.scaled(start))[0]
        replay.spent["probes"] += field.calls * len(rows)
        seen.append(deviations_of(subsampled, calls))
        errors[number] = endpoint_errors(ends, fitting.truth(torch.zeros(()))).mean().item()
    return seen, errors


def search_on_surrogate(replay: Replay, calls: Sequence[int], mean: Tensor | None) -> Schedules:
    """The best times found for each number of calls.

    Args:
        replay: recorded guided runs.
        calls: numbers of them.
        mean: [C, S, S] of the data, if a first call may be saved by it.
    """
    rows = replay.alike(FITTED_TRAJECTORIES)
    subset = subsampled(replay.trajectories, rows, 0 if mean is None else mean.shape[-1])
    field, start = replay.field_of(rows[:1]), replay.backbone.start
    made = {n: n + has_conditional_only(field, n) for n in calls}
    few = subset.first(PROBED)
    with torch.inference_mode():
        found = search_stand_in(subset, (), start, made)
        spread = mean_for(replay, mean)
        seen: list[Deviations] = []
        looked_at: list[tuple[Schedules, dict[int, float]]] = []
        for index in range(PROBES):
            found = search_stand_in(few, seen, start, made) if index else found
            saw, errors = probe(few, replay, rows[:PROBED], found, spread)
            seen += saw
            looked_at.append((found, errors))
    return {n: min(looked_at, key=lambda pair: pair[1][n])[0][n] for n in calls}


def mean_for(replay: Replay, mean: Tensor | None) -> Tensor | None:
    """The mean of the data [C, S, S] as the model's states are, and where they are."""
    return None if mean is None else spread_mean(mean, replay.backbone.shape).to(replay.backbone.device)
