"""A fit of multistep coefficients that is easy to see through: least squares, one step after another.

What schedules are made by is `training.schedules.end_fit`, which looks at the end of the path; this one gives tests
coefficients whose right values are known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from ba_solver.bas_core.guidance import Field
from ba_solver.bas_core.prediction import SideNetProtocol
from ba_solver.bas_core.schedule import Schedule, StepState
from ba_solver.bas_core.solver import Callback, make_solver, run_bi_anchor
from ba_solver.training.schedules.fitting import CFGFit, least_squares, linear_combination
from ba_solver.training.schedules.linear_form import RULE
from torch import Tensor

Truth = Callable[[Tensor], Tensor]


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
