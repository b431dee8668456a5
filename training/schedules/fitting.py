"""The weights of a run, for its steps and its half calls: least squares on recorded runs.

They are fitted closed loop: those of each step on the states that the steps before it lead to.
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
from ...bas_core.cfg_coefficients import HalfCallField, difference_terms
from ...bas_core.schedule import Schedule
from ...bas_core.sidenet import SideNet
from ...bas_core.solver import Callback, make_plan, run_bi_anchor
from ...bas_core.coefficients import add_terms, terms
from ...bas_core.steps import SideNetProtocol, StepState, knows_mean
from ..progress import progress
from ..recording.replay import Replay

# There are about as many weights in a row as steps, and thousands of numbers in a state: few runs say all.
WEIGHT_RUNS = 32
# Half calls, counted from a run's end. Two in a row, or any before the difference of the branches is known well, cost
# more than they save, and a second pair gained nothing on the demo.
HALVES = (-1, -3)
# Of fitted runs: it asks the SideNet once a step, lobatto3 three times and lobatto4 five times, and their weights find
# what a rule of higher order has beyond it (docs/training.md).
RULE = "lobatto2"
# Of the Gram matrix's mean diagonal: velocities of neighbouring times are nearly alike.
RIDGE = 1e-9

Truth = Callable[[Tensor], Tensor]
Runs = dict[int, Schedule]


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
    """What weights are fitted on, and for which solver.

    Attributes:
        sidenet: of the bi-anchor solver, or what stands in for one.
        field: of the runs.
        noise: [B, C, *spatial] where they begin.
        truth: their states at a time.
        start: the time that they begin at.
    """

    sidenet: SideNetProtocol | None
    field: Field
    noise: Tensor
    truth: Truth
    start: float = 1.0

    @property
    def skips(self) -> bool:
        """Whether a run can save its first call."""
        return self.start == 1 and self.sidenet is not None and knows_mean(self.sidenet)

    def halves(self, calls: int) -> bool:
        """Whether a number of calls is spent on one anchor more, of which two are half calls."""
        return takes_halves(self.field, calls)


def takes_halves(field: Field, calls: int) -> bool:
    """See `Fitting.halves`."""
    return field.pair is not None and calls > len(HALVES) + 1


class FitWeights:
    """A `Correct` that finds each step's weights by least squares, on the states that the steps before lead to.

    Args:
        truth: recorded states at a time.

    Attributes:
        rows: what was found, as `Schedule.coefficients` takes it.
    """

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.rows: list[list[float]] = []

    def __call__(self, proposal: StepState) -> Tensor:
        found = terms(proposal)
        self.rows.append(least_squares(found, self.truth(proposal.t1) - proposal.x).tolist())
        return add_terms(proposal.x, found, self.rows[-1])


class FitHalfCalls(HalfCallField):
    """Half calls that find their weights by least squares; to find them, each is a whole call.

    Args:
        field, times: see `HalfCallField`.
        made: how many calls the run makes.

    Attributes:
        found: their rows, as `Schedule.cfg_coefficients` takes them.
    """

    def __init__(self, field: Field, times: Sequence[Tensor], made: int) -> None:
        self.found: list[list[float]] = [[] for _ in range(made)]
        super().__init__(field, times, [[math.nan] if place - made in HALVES else [] for place in range(made)])

    def half_call(self, x: Tensor, t: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """The conditional velocity and the predicted difference, [B, C, *spatial] each."""
        conditional, unconditional = self.two.evaluate(x, t, 2)
        known = difference_terms(conditional, self.seen)
        self.found[place] = least_squares(known, conditional - unconditional).tolist()
        return conditional, add_terms(torch.zeros_like(conditional), known, self.found[place])


def fit_run(
    fitting: Fitting, run: Schedule, halved: bool = False, callback: Callback | None = None
) -> tuple[Tensor, Schedule]:
    """Go over a run's times once by `RULE`, and fit step weights, and if asked for half calls, on the way; `callback`
    sees every finished step.

    Returns:
        The ends [B, C, *spatial] that it came to, and the run with its weights.
    """
    steps = FitWeights(fitting.truth)
    halves = FitHalfCalls(fitting.field, run.grid, run.calls) if halved else None
    plan = make_plan(halves or fitting.field, fitting.sidenet, RULE, analytic_first_step=run.analytic_first_step)
    ends = run_bi_anchor(plan, fitting.noise, run.grid, steps, callback)
    found = halves.found if halves else ()
    return ends, dataclasses.replace(run, coefficients=steps.rows, cfg_coefficients=found, rule=RULE)


def fit_runs(runs: Mapping[int, Schedule], fitting: Fitting) -> Runs:
    """Runs by number of calls, with weights that are fitted on one pass over each."""
    fitted: Runs = {}
    for calls, run in progress(list(runs.items()), "step weights"):
        found = fit_run(fitting, run.scaled(fitting.start), fitting.halves(calls))[1]
        fitted[calls] = found.over(run.times)
    return fitted


def on_runs(sidenet: SideNetProtocol, replay: Replay, count: int) -> Fitting:
    """What is fitted on so many recorded runs."""
    rows = replay.alike(count)
    field, noise, truth = replay.field_of(rows), replay.noise(rows), partial(replay.truth, rows)
    return Fitting(sidenet, field, noise, truth, replay.backbone.start)


def fit_weights(sidenet: SideNet, replay: Replay, runs: Mapping[int, Schedule]) -> Runs:
    """`fit_runs` on `WEIGHT_RUNS` recorded runs; what it cost is added to `replay.spent`."""
    fitting = on_runs(sidenet, replay, WEIGHT_RUNS)
    with torch.inference_mode():
        found = fit_runs(runs, fitting)
    replay.spent["step weights"] += fitting.field.calls * len(fitting.noise)
    return found
