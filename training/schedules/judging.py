"""What a schedule comes to on trajectories that nothing was fitted on, and when another one is nearer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from torch import Tensor

from ...bas_core.guidance import Field, just_inside
from ...bas_core.prediction import SideNetProtocol
from ...bas_core.schedule import Schedule
from ...bas_core.solver import solve
from ..recording.replay import Replay
from .solvers import endpoint_errors
from .surrogate import Coordinates

# How much the logarithm of two schedules' ratio differs from noise to noise, and how many noises that is worth.
TYPICAL_SPREAD, PRIOR_NOISES = 0.5, 2


@dataclass(frozen=True)
class Found:
    """What a search came to for one NFE.

    Attributes:
        schedule: to sample by.
        errors: RMSE from each validation noise.
        known: the best known method on its best grid.
        known_error: its error from the same noises, on the surrogate.
        seconds: of a sampling, for one sample.
    """

    schedule: Schedule
    errors: Sequence[float]
    known: str
    known_error: float
    seconds: float

    @property
    def error(self) -> float:
        """The mean of the errors."""
        return mean(self.errors)

    @property
    def standard_error(self) -> float:
        """Of that mean."""
        return stdev(self.errors) / len(self.errors) ** 0.5 if len(self.errors) > 1 else 0.0


def log_ratios(tried: Sequence[float], own: Sequence[float]) -> list[float]:
    """Of two schedules' errors from the same noises, which differ much between noises and less between methods."""
    return [math.log(max(a, 1e-12) / max(b, 1e-12)) for a, b in zip(tried, own, strict=True)]


def clearly_nearer(tried: Sequence[float], own: Sequence[float]) -> bool:
    """Whether one schedule ends nearer than another from the same noises: on average, and by more than a standard error
    of the ratio's logarithm, so that neither a single noise decides nor one that goes far astray is overlooked.

    A noise or a few do not show their own spread, so that `TYPICAL_SPREAD` counts as two noises more (a scaled inverse
    chi-squared prior of the variance; Gelman et al. 2013, section 3.2).
    """
    difference = log_ratios(tried, own)
    center, count = mean(difference), len(difference)
    squares = PRIOR_NOISES * TYPICAL_SPREAD**2 + sum((each - center) ** 2 for each in difference)
    return mean(tried) < mean(own) and center + math.sqrt(squares / (PRIOR_NOISES + count - 1) / count) < 0


def watched(field: Field, coordinates: Coordinates, seen: list[tuple[float, Tensor, Tensor]]) -> Field:
    """The same field, which adds time, state and guided velocity, in coordinates, of every call of all branches to
    `seen`."""

    def evaluate(x: Tensor, t: Tensor, branches: int) -> Tensor:
        v = field.evaluate(x, t, branches)
        time = just_inside(t[0])
        if branches == 1 + field.cfg.active(time):
            seen.append((float(t[0]), coordinates.of(x), coordinates.of(field.cfg.combine(v, time))))
        return v

    return field.with_evaluate(evaluate)


def judge(
    sidenet: SideNetProtocol,
    schedule: Schedule,
    replay: Replay,
    rows: Tensor,
    watch: Callable[[Field], Field] = lambda field: field,
) -> tuple[list[float], float]:
    """Sample from the noises of some rows; the model calls are added to `replay.nfe`.

    Returns:
        Each one's RMSE, and seconds a sample.
    """
    field = watch(replay.field_of(rows))
    begun = time.perf_counter()
    start, end = replay.backbone.first_time, replay.backbone.last_time
    ends = solve(field, sidenet, replay.noise(rows), schedule.scaled(start, end))
    errors = endpoint_errors(ends, replay.truth(rows, torch.tensor(end))).tolist()
    replay.nfe["validation"] += round(field.nfe * len(rows))
    return errors, (time.perf_counter() - begun) / len(rows)
