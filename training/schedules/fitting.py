"""The coefficients of a schedule, for its steps and its conditional-only calls: least squares on trajectories.

Each step's coefficients are fitted on the states that the steps before it lead to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...bas_core.guidance import Field
from ...bas_core.prediction import SideNetProtocol
from ...bas_core.schedule import Schedule, ScheduleHook, StepState
from ...bas_core.solver import Callback, make_solver, run_bi_anchor
from ..progress import progress
from ..recording.replay import Replay
from .linear_form import RULE

# A step has about as many coefficients as there are steps, and a state thousands of numbers: few trajectories will do.
FIT_TRAJECTORIES = 16
# Conditional-only calls, counted from a schedule's end. Two in a row, or any earlier, cost more than they save.
CONDITIONAL_ONLY = (-1, -3)
# Over the Gram matrix's mean diagonal: velocities of neighbouring times are nearly alike.
RIDGE = 1e-9

Truth = Callable[[Tensor], Tensor]
Schedules = dict[int, Schedule]
CFGRows = list[list[float]]


def least_squares(columns: Sequence[Tensor], target: Tensor) -> Tensor:
    """Coefficients of the combination of `columns` nearest to `target`, all [B, C, *spatial], in double precision and
    on the CPU, as some devices have none."""
    gram = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    moment = gram.new_zeros(len(columns))
    for sample in range(len(target)):  # one by one, for double precision takes much memory
        matrix = torch.stack([column[sample].flatten() for column in columns], 1).cpu().double()
        gram += matrix.T @ matrix
        moment += matrix.T @ target[sample].flatten().cpu().double()
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(columns), dtype=gram.dtype)
    # The pseudo-inverse: where all columns are zero, so are the coefficients.
    return torch.linalg.pinv(gram, hermitian=True) @ moment


def linear_combination(x: Tensor, regressors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """x + sum of coefficient times regressor."""
    for coefficient, regressor in zip(coefficients, regressors, strict=True):
        x = torch.add(x, regressor, alpha=coefficient)
    return x


@dataclass(frozen=True)
class Fitting:
    """The data that a schedule is fitted on, and its SideNet.

    Attributes:
        sidenet: of the bi-anchor solver; a straight line counts as one.
        field: of the samples.
        noise: [B, C, *spatial] where they begin.
        truth: their states at a time.
        start, end: the times that they begin and end at.
    """

    sidenet: SideNetProtocol | None
    field: Field
    noise: Tensor
    truth: Truth
    start: float = 1.0
    end: float = 0.0

    @property
    def analytic_first_step(self) -> bool:
        """Whether the SideNet can make the first velocity from the data mean."""
        return self.start == 1 and self.sidenet is not None and self.sidenet.has_data_mean


def takes_conditional_only(field: Field, nfe: int) -> bool:
    """Whether a schedule of so many NFE has one call more, of which two are conditional-only."""
    return field.can_omit_unconditional and enough_for_conditional_only(nfe)


def enough_for_conditional_only(nfe: int) -> bool:
    """Whether there are whole calls enough to predict from."""
    return nfe > len(CONDITIONAL_ONLY) + 1


class CFGFit(ScheduleHook):
    """Calls the model, and finds the coefficients of conditional-only calls by least squares, for which both branches
    are evaluated.

    Args:
        steps: N.
        calls: how many of the last calls may be conditional-only; 0 = none is.

    Attributes:
        cfg_rows: the CFG coefficients, as `Schedule.cfg_coefficients` takes them.
        missed: [B, C, *spatial] by how much the last conditional-only call's guided velocity is off.
    """

    def __init__(self, steps: int, calls: int) -> None:
        super().__init__((), (), steps)
        self.conditional_only = [call - calls in CONDITIONAL_ONLY for call in range(calls)]
        self.first_call = steps - calls
        self.cfg_rows: CFGRows = [[] for _ in range(calls)]
        self.missed: Tensor | None = None
        self.seen_conditional: list[Tensor] = []
        self.seen_differences: list[Tensor] = []

    def keep(self, call: int, conditional: Tensor, difference: Tensor | None = None) -> None:
        """See `ScheduleHook`; all of it."""
        if difference is not None:
            self.seen_differences.append(difference)
        self.seen_conditional.append(conditional.clone())  # a view would keep both branches in memory

    def predict_difference(self, field: Field, call: int, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """See `ScheduleHook`; with fresh coefficients."""
        conditional, unconditional = field.call_model(x, t, 2)
        difference = conditional - unconditional
        regressors = self.seen_differences + [conditional - earlier for earlier in self.seen_conditional]
        self.cfg_rows[call] = least_squares(regressors, difference).tolist()
        predicted = linear_combination(torch.zeros_like(conditional), regressors, self.cfg_rows[call])
        self.missed = (field.cfg.scale - 1) * (predicted - difference)
        return conditional, predicted


class FitHook(CFGFit):
    """Finds multistep coefficients too, on the states that the steps before lead to.

    Args:
        schedule: its times and calls.
        truth: recorded states at a time.
        conditional_only: whether the calls `CONDITIONAL_ONLY` are conditional-only.

    Attributes:
        rows: the multistep coefficients, as `Schedule.coefficients` takes them.
    """

    def __init__(self, schedule: Schedule, truth: Truth, conditional_only: bool) -> None:
        super().__init__(schedule.steps, schedule.calls if conditional_only else 0)
        self.rows: list[list[float]] = []
        self.truth = truth
        self.anchors: list[Tensor] = []

    def adjust(self, state: StepState) -> Tensor:
        """See `ScheduleHook`; with fresh coefficients."""
        regressors = self.regressors(state)
        truth = self.truth(torch.tensor(state.s, dtype=state.x.dtype))
        found = least_squares(regressors, truth - state.x).tolist()
        self.rows.append([*found, 0.0])
        return linear_combination(state.x, regressors, found)

    def regressors(self, state: StepState) -> list[Tensor]:
        """What a step may add to its state, but for d v_i: [B, C, *spatial] each; see `Schedule.coefficients`."""
        if state.predicted is None:
            self.anchors[state.index :] = [state.velocity]
        elif state.end_velocity is not None:
            self.anchors[state.index + 1 :] = [state.end_velocity]
        now, length = state.velocity, state.s - state.t
        straight = state.x_start + length * now
        ends = [state.x - straight]
        if state.predicted is not None:
            ends.append(state.predicted - straight)
        return ends + [length * (v - now) for j, v in enumerate(self.anchors) if j != state.index]


def fit_schedule(
    fitting: Fitting, schedule: Schedule, conditional_only: bool = False, callback: Callback | None = None
) -> tuple[Tensor, Schedule]:
    """Sample once over a schedule's times by `RULE`, and fit its coefficients on the way.

    Args:
        fitting: the data.
        schedule: its times are taken, scaled to the fitting's start.
        conditional_only: fit conditional-only calls too.
        callback: sees every finished step.

    Returns:
        The ends [B, C, *spatial], and the schedule with its coefficients.
    """
    hook = FitHook(schedule, fitting.truth, conditional_only)
    analytic = schedule.analytic_first_step
    solver = make_solver(fitting.field, fitting.sidenet, RULE, hook, analytic_first_step=analytic)
    ends = run_bi_anchor(solver, fitting.noise, schedule.times, callback)
    fitted = dataclasses.replace(schedule, coefficients=hook.rows, cfg_coefficients=hook.cfg_rows, rule=RULE)
    return ends, fitted


def fit_schedules(schedules: Mapping[int, Schedule], fitting: Fitting) -> Schedules:
    """Schedules by NFE, with coefficients fitted on their times."""
    fitted: Schedules = {}
    for nfe, schedule in progress(list(schedules.items()), "fit coefficients"):
        found = fit_schedule(fitting, schedule.scaled(fitting.start, fitting.end), schedule.conditional_only > 0)[1]
        fitted[nfe] = found.with_times(schedule.times)
    return fitted


def fit_coefficients(sidenet: SideNetProtocol, replay: Replay, schedules: Mapping[int, Schedule]) -> Schedules:
    """`fit_schedules` on recorded trajectories; the model calls are added to `replay.nfe`."""
    rows = replay.cfg_rows(FIT_TRAJECTORIES)
    field, noise = replay.field_of(rows), replay.noise(rows)
    backbone = replay.backbone
    fitting = Fitting(sidenet, field, noise, partial(replay.truth, rows), backbone.first_time, backbone.last_time)
    with torch.inference_mode():
        found = fit_schedules(schedules, fitting)
    replay.nfe["coefficients"] += field.calls * len(noise)
    return found
