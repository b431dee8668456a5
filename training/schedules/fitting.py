"""The coefficients of a schedule, multistep and CFG: least squares on recorded trajectories.

They are fitted closed loop: each step's coefficients on the states that the steps before it lead to.
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
from ...bas_core.schedule import Schedule, ScheduleHook, StepState, linear_combination
from ...bas_core.sidenet import SideNet
from ...bas_core.solver import Callback, make_solver, run_bi_anchor
from ..progress import progress
from ..recording.replay import Replay

# A row has about as many coefficients as there are steps, and a state has thousands of numbers: few trajectories
# suffice.
FITTED_TRAJECTORIES = 32
# The conditional-only calls, counted from the end. Two in a row, or any before v_c - v_u is known well, cost more than
# they save, and a second pair gained nothing on the demo.
CONDITIONAL_ONLY = (-1, -3)
# The rule of fitted schedules asks the SideNet once a step, lobatto3 three times and lobatto4 five times; coefficients
# make up for a higher order (docs/measurements.md).
RULE = "lobatto2"
# Relative to the Gram matrix's mean diagonal: velocities of neighbouring times are nearly alike.
RIDGE = 1e-9

Truth = Callable[[Tensor], Tensor]
Schedules = dict[int, Schedule]


def least_squares(columns: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """Coefficients of the combination of `columns` nearest to `wanted`, all [B, C, *spatial], in double precision."""
    gram = torch.zeros(len(columns), len(columns), dtype=torch.float64, device=wanted.device)
    moment = gram.new_zeros(len(columns))
    for sample in range(len(wanted)):  # one by one, for double precision takes much memory
        matrix = torch.stack([column[sample].flatten() for column in columns], 1).double()
        gram += matrix.T @ matrix
        moment += matrix.T @ wanted[sample].flatten().double()
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(columns), dtype=gram.dtype, device=gram.device)
    # The pseudo-inverse: where all columns are zero, so are the coefficients.
    return torch.linalg.pinv(gram, hermitian=True) @ moment


@dataclass(frozen=True)
class Fitting:
    """Trajectories that coefficients are fitted on, and the solver.

    Attributes:
        sidenet: of the bi-anchor solver.
        field: of the trajectories.
        noise: [B, C, *spatial] their first states.
        truth: their states at a time.
        start: their first time.
    """

    sidenet: SideNetProtocol | None
    field: Field
    noise: Tensor
    truth: Truth
    start: float = 1.0

    @property
    def analytic(self) -> bool:
        """Whether a first step can be analytic."""
        return self.start == 1 and self.sidenet is not None and self.sidenet.has_data_mean


def has_conditional_only(field: Field, nfe: int) -> bool:
    """Whether a schedule of so many NFE takes one step more, and two of its calls conditional-only."""
    return field.can_omit_unconditional and nfe > len(CONDITIONAL_ONLY) + 1


class FitHook(ScheduleHook):
    """Finds coefficients by least squares on the states that the steps before lead to; to fit a conditional-only call,
    both branches are evaluated.

    Args:
        schedule: its times and calls.
        truth: recorded states at a time.
        conditional_only: whether the calls `CONDITIONAL_ONLY` are conditional-only.

    Attributes:
        rows: the multistep coefficients, as `Schedule.coefficients` takes them.
        cfg_rows: the CFG coefficients, as `Schedule.cfg_coefficients` takes them.
    """

    def __init__(self, schedule: Schedule, truth: Truth, conditional_only: bool) -> None:
        calls = schedule.calls if conditional_only else 0
        self.rows: list[list[float]] = []
        self.cfg_rows: list[list[float]] = [[] for _ in range(calls)]
        pending = [[0.0] if call - calls in CONDITIONAL_ONLY else [] for call in range(calls)]
        super().__init__((), pending, schedule.steps)
        self.truth = truth

    def predict_difference(self, field: Field, x: Tensor, t: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """See `ScheduleHook`; with fresh coefficients."""
        conditional, unconditional = field.call_model(x, t, 2)
        regressors = self.difference_regressors(conditional)
        self.cfg_rows[row] = least_squares(regressors, conditional - unconditional).tolist()
        return conditional, linear_combination(torch.zeros_like(conditional), regressors, self.cfg_rows[row])

    def adjust(self, state: StepState) -> Tensor:
        """See `ScheduleHook`; with fresh coefficients."""
        regressors = self.state_regressors(state)
        self.rows.append(least_squares(regressors, self.truth(state.s) - state.x).tolist())
        return linear_combination(state.x, regressors, self.rows[-1])


def fit_schedule(
    fitting: Fitting, schedule: Schedule, conditional_only: bool = False, callback: Callback | None = None
) -> tuple[Tensor, Schedule]:
    """Sample once over a schedule's times by `RULE`, and fit its coefficients on the way.

    Args:
        fitting: the trajectories.
        schedule: its times are taken.
        conditional_only: whether to fit conditional-only calls.
        callback: sees every finished step.

    Returns:
        The ends [B, C, *spatial], and the schedule with coefficients.
    """
    hook = FitHook(schedule, fitting.truth, conditional_only)
    solver = make_solver(fitting.field, fitting.sidenet, RULE, hook, analytic_first_step=schedule.analytic_first_step)
    ends = run_bi_anchor(solver, fitting.noise, schedule.grid_in(fitting.noise.dtype), callback)
    fitted = dataclasses.replace(schedule, coefficients=hook.rows, cfg_coefficients=hook.cfg_rows, rule=RULE)
    return ends, fitted


def fit_schedules(schedules: Mapping[int, Schedule], fitting: Fitting) -> Schedules:
    """Schedules by NFE, with coefficients from one sampling over each."""
    fitted: Schedules = {}
    for nfe, schedule in progress(list(schedules.items()), "coefficients"):
        halved = has_conditional_only(fitting.field, nfe)
        fitted[nfe] = fit_schedule(fitting, schedule.scaled(fitting.start), halved)[1].with_times(schedule.times)
    return fitted


def fitting_on(sidenet: SideNetProtocol, replay: Replay, count: int) -> Fitting:
    """So many recorded trajectories to fit on."""
    rows = replay.alike(count)
    field, noise, truth = replay.field_of(rows), replay.noise(rows), partial(replay.truth, rows)
    return Fitting(sidenet, field, noise, truth, replay.backbone.start)


def fit_coefficients(sidenet: SideNet, replay: Replay, schedules: Mapping[int, Schedule]) -> Schedules:
    """`fit_schedules` on `FITTED_TRAJECTORIES`; the NFE are added to `replay.spent`."""
    fitting = fitting_on(sidenet, replay, FITTED_TRAJECTORIES)
    with torch.inference_mode():
        found = fit_schedules(schedules, fitting)
    replay.spent["coefficients"] += fitting.field.calls * len(fitting.noise)
    return found
