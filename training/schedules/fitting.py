"""The coefficients of conditional-only calls: least squares on the states that the calls before lead to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...bas_core.guidance import Field
from ...bas_core.schedule import Schedule, ScheduleHook

# Schedules are fitted on so many trajectories: more, with fewer rollouts each, end no nearer. Of very many a quarter is
# taken, and at most the second number.
FIT_TRAJECTORIES, MOST_FIT_TRAJECTORIES = 32, 64
# Conditional-only calls, counted from a schedule's end. Two in a row, or any earlier, cost more than they save.
CONDITIONAL_ONLY = (-1, -3)
# Over the Gram matrix's mean diagonal: velocities of neighbouring times are nearly alike.
RIDGE = 1e-9

Schedules = dict[int, Schedule]
CFGRows = list[list[float]]


def fit_count(trajectories: int) -> int:
    """On how many of so many trajectories schedules are fitted."""
    return min(trajectories, max(FIT_TRAJECTORIES, min(MOST_FIT_TRAJECTORIES, trajectories // 4)))


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
