"""The coefficients of a schedule, for its steps and its conditional-only calls: least squares on trajectories.

Each step's coefficients are fitted on the states that the steps before it lead to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...bas_core.guidance import Field
from ...bas_core.half_calls import HalfCallField, difference_terms
from ...bas_core.runs import FittedRun
from ...bas_core.solver import Callback, make_plan, run_bi_anchor
from ...bas_core.step_weights import add_terms, terms
from ...bas_core.steps import Predictor, Proposal, knows_mean
from ..progress import progress
from ..recording.replay import Replay

# A step has about as many coefficients as there are steps, and a state thousands of numbers: few trajectories will do.
FIT_TRAJECTORIES = 32
# Conditional-only calls, counted from a schedule's end. Two in a row, or any earlier, cost more than they save.
CONDITIONAL_ONLY = (-1, -3)
# The quadrature rule of schedules: it asks the SideNet once a step (lobatto4: five times), and the coefficients make up
# for its lower order.
RULE = "lobatto2"
# Over the Gram matrix's mean diagonal: velocities of neighbouring times are nearly alike.
RIDGE = 1e-9

Truth = Callable[[Tensor], Tensor]
Schedules = dict[int, FittedRun]


def least_squares(columns: Sequence[Tensor], target: Tensor) -> Tensor:
    """Coefficients of the combination of `columns` nearest to `target`, all [B, C, *spatial], in double precision."""
    gram = torch.zeros(len(columns), len(columns), dtype=torch.float64, device=target.device)
    moment = gram.new_zeros(len(columns))
    for sample in range(len(target)):  # one by one, for double precision takes much memory
        matrix = torch.stack([column[sample].flatten() for column in columns], 1).double()
        gram += matrix.T @ matrix
        moment += matrix.T @ target[sample].flatten().double()
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(columns), dtype=gram.dtype, device=gram.device)
    # The pseudo-inverse: where all columns are zero, so are the coefficients.
    return torch.linalg.pinv(gram, hermitian=True) @ moment


@dataclass(frozen=True)
class Fitting:
    """The data that a schedule is fitted on, and its SideNet.

    Attributes:
        sidenet: of the bi-anchor solver; a straight line counts as one.
        field: of the samples.
        noise: [B, C, *spatial] where they begin.
        truth: their states at a time.
        start: the time that they begin at.
    """

    sidenet: Predictor | None
    field: Field
    noise: Tensor
    truth: Truth
    start: float = 1.0

    @property
    def analytic_first_step(self) -> bool:
        """Whether the SideNet can make the first velocity from the data mean."""
        return self.start == 1 and self.sidenet is not None and knows_mean(self.sidenet)


def takes_conditional_only(field: Field, nfe: int) -> bool:
    """Whether a schedule of so many NFE has one call more, of which two are conditional-only."""
    return field.pair is not None and nfe > len(CONDITIONAL_ONLY) + 1


class FitCoefficients:
    """A step hook that finds each step's coefficients by least squares.

    Args:
        truth: recorded states at a time.

    Attributes:
        rows: the coefficients found, as `FittedRun.step_weights` takes them.
    """

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.rows: list[list[float]] = []

    def __call__(self, proposal: Proposal) -> Tensor:
        found = terms(proposal)
        self.rows.append(least_squares(found, self.truth(proposal.t1) - proposal.x).tolist())
        return add_terms(proposal.x, found, self.rows[-1])


class FitConditionalOnly(HalfCallField):
    """Conditional-only calls whose coefficients are found by least squares; meanwhile both branches are evaluated.

    Args:
        field, times: see `HalfCallField`.
        calls: how many calls the schedule makes.

    Attributes:
        found: the coefficients, as `FittedRun.half_calls` takes them.
    """

    def __init__(self, field: Field, times: Sequence[Tensor], calls: int) -> None:
        self.found: list[list[float]] = [[] for _ in range(calls)]
        rows = [[math.nan] if place - calls in CONDITIONAL_ONLY else [] for place in range(calls)]
        super().__init__(field, times, rows)

    def half_call(self, x: Tensor, t: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """The conditional velocity and the predicted difference of the branches, [B, C, *spatial] each."""
        conditional, unconditional = self.two.evaluate(x, t, 2)
        earlier = difference_terms(conditional, self.seen)
        self.found[place] = least_squares(earlier, conditional - unconditional).tolist()
        return conditional, add_terms(torch.zeros_like(conditional), earlier, self.found[place])


def fit_schedule(
    fitting: Fitting, schedule: FittedRun, conditional_only: bool = False, callback: Callback | None = None
) -> tuple[Tensor, FittedRun]:
    """Sample once over a schedule's times by `RULE`, and fit its coefficients on the way.

    Args:
        fitting: the data.
        schedule: its times are taken, scaled to the fitting's start.
        conditional_only: fit conditional-only calls too.
        callback: sees every finished step.

    Returns:
        The ends [B, C, *spatial], and the schedule with its coefficients.
    """
    hook = FitCoefficients(fitting.truth)
    branches = FitConditionalOnly(fitting.field, schedule.grid, schedule.calls) if conditional_only else None
    plan = make_plan(branches or fitting.field, fitting.sidenet, RULE, skip_first=schedule.skip_first)
    ends = run_bi_anchor(plan, fitting.noise, schedule.grid, hook, callback)
    found = branches.found if branches else ()
    return ends, dataclasses.replace(schedule, step_weights=hook.rows, half_calls=found, rule=RULE)


def fit_schedules(schedules: Mapping[int, FittedRun], fitting: Fitting) -> Schedules:
    """Schedules by NFE, with coefficients fitted on their times."""
    fitted: Schedules = {}
    for nfe, schedule in progress(list(schedules.items()), "fit coefficients"):
        conditional_only = takes_conditional_only(fitting.field, nfe)
        found = fit_schedule(fitting, schedule.scaled(fitting.start), conditional_only)[1]
        fitted[nfe] = found.over(schedule.times)
    return fitted


def fit_coefficients(sidenet: Predictor, replay: Replay, schedules: Mapping[int, FittedRun]) -> Schedules:
    """`fit_schedules` on recorded trajectories; the model calls are added to `replay.nfe`."""
    rows = replay.median_cfg_rows(FIT_TRAJECTORIES)
    field, noise = replay.field_of(rows), replay.noise(rows)
    fitting = Fitting(sidenet, field, noise, partial(replay.truth, rows), replay.backbone.start)
    with torch.inference_mode():
        found = fit_schedules(schedules, fitting)
    replay.nfe["coefficients"] += field.calls * len(noise)
    return found
