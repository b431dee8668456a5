"""Run the solver: `solve` over a fitted run or a time grid, and the one loop that all solvers share.

The steps are in `steps.py`; what a run over a grid may have learned is in `runs.py`. At t = 1 the velocity is the
noise minus what the model takes for the mean of its data, and hardly more: a SideNet that keeps that mean can stand in
for the first call, where the first interval is short, and saves it. To sample, call `solve` under
`torch.inference_mode()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .flow import velocity_to_x0
from .grids import check_grid
from .guidance import Field, NonFiniteError
from .quadrature import Rule, get_rule
from .runs import FittedRun
from .steps import (
    Correct,
    Plan,
    Predictor,
    StepFunction,
    StraightLine,
    as_proposed,
    bi_anchor_steps,
    single_anchor_steps,
)

METHODS = ("bi_anchor", "single_anchor")
SINGLE_ANCHOR_RULE = "legendre3"


@dataclass(frozen=True)
class Step:
    """What a callback sees of a finished step.

    Attributes:
        index, total: the step's number from 0, and how many there are.
        time, next_time: the step's ends.
        x: state at `time`.
        velocity: guided velocity at `time`.
        x_next: state at `next_time`.
        calls: backbone calls so far.
    """

    index: int
    total: int
    time: float
    next_time: float
    x: Tensor
    velocity: Tensor
    x_next: Tensor
    calls: int

    @property
    def denoised(self) -> Tensor:
        """The image that the velocity points to: x_0 = x - t v."""
        return velocity_to_x0(self.x, self.velocity, self.time)


Callback = Callable[[Step], None]


def solve(
    field: Field,
    sidenet: Predictor | None,
    x: Tensor,
    run: FittedRun | Tensor,
    *,
    method: str = "bi_anchor",
    rule: Rule | str | None = None,
    callback: Callback | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Integrate the field over a run with the bi-anchor or the single-anchor solver.

    Args:
        field: the velocity field; it is called as often as the run says (`FittedRun.calls`).
        sidenet: a `SideNet`, any `Predictor`, or None for the straight line through two anchors (the
            Adams-Bashforth 2 / trapezoid predictor-corrector). One that knows no mean of the data makes the call that
            the run would save.
        x: [B, C, *spatial] state at the run's first time; half precision is integrated in float32.
        run: a `FittedRun`, such as `card.runs[5]`; or a plain time grid [N + 1], strictly descending (sampling) or
            ascending (inversion), within [0, 1], for N calls.
        method: "bi_anchor", or "single_anchor" (one call a step at its start; the paper's baseline), which takes plain
            runs only.
        rule: a quadrature rule or its name. Default: the run's own for bi_anchor (lobatto4 where nothing is fitted),
            legendre3 for single_anchor.
        callback: sees every finished `Step`; may raise to stop.
        chunk: largest number of samples in one SideNet call, when memory is short; None = one batch a phase.

    Returns:
        [B, C, *spatial] state at the run's last time.

    Raises:
        ValueError: an argument does not fit; the message says which, what was required and what came.
        NonFiniteError: the backbone or the SideNet returned NaN or infinity; the message says at which step.
    """
    x = check_state(x)
    run = run if isinstance(run, FittedRun) else FittedRun(check_grid(run))
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}. Valid methods: {', '.join(METHODS)}.")
    if run.fitted and method != "bi_anchor":
        raise ValueError(f"Step weights and half calls were fitted for bi_anchor; got method {method!r}.")
    field = run.field_over(field)
    usual = run.rule if method == "bi_anchor" else SINGLE_ANCHOR_RULE
    plan = make_plan(field, sidenet, rule or usual, chunk, run.skip_first)
    if method == "bi_anchor":
        return run_bi_anchor(plan, x, run.grid, run.correct, callback)
    return run_steps(single_anchor_steps(plan), field, x, run.grid, callback)


def make_plan(
    field: Field,
    sidenet: Predictor | None,
    rule: Rule | str = FittedRun.rule,
    chunk: int | None = None,
    skip_first: bool = False,
) -> Plan:
    """What the steps need to know of a run; arguments as in `solve`.

    Raises:
        ValueError: an unknown rule, or a chunk below 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 sample, or None; got {chunk}.")
    return Plan(field, StraightLine() if sidenet is None else sidenet, get_rule(rule), chunk, skip_first)


def run_bi_anchor(
    plan: Plan, x: Tensor, grid: Sequence[Tensor], correct: Correct = as_proposed, callback: Callback | None = None
) -> Tensor:
    """Run the bi-anchor steps over a grid, steered from outside by `correct`; for `solve`, for fitting and for edits.

    Args:
        plan: field, SideNet and rule.
        x: [B, C, *spatial] state at `grid[0]`.
        grid: 0-d times.
        correct: from each `Proposal` to the state to go on with.
        callback: sees every finished `Step`.

    Raises:
        ValueError: the rule has no node at one of the ends.
        NonFiniteError: the backbone or the SideNet returned NaN or infinity.
    """
    if not plan.rule.has_both_ends:
        raise ValueError(f"bi_anchor needs a rule whose nodes include 0 and 1, such as lobatto4; got {plan.rule.name}.")
    return run_steps(bi_anchor_steps(plan, grid, correct), plan.field, x, grid, callback)


def check_state(x: Tensor) -> Tensor:
    """The state in float32 or better, if it is one.

    Raises:
        ValueError: not a float tensor [B, C, H, W] or [B, C, T, H, W], empty, or not finite.
    """
    if not isinstance(x, Tensor) or x.ndim not in (4, 5) or not x.is_floating_point() or not x.numel():
        what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a float tensor [B, C, H, W] or [B, C, T, H, W] with B > 0; got {what}.")
    if not x.isfinite().all():
        raise ValueError("x must be finite; it holds NaN or infinity before the first step.")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def run_steps(step: StepFunction, field: Field, x: Tensor, grid: Sequence[Tensor], callback: Callback | None) -> Tensor:
    """Apply `step(index, x, t0, t1, state)` over the grid; the one loop of all solvers."""
    state: Any = None
    total = len(grid) - 1
    for index, (t0, t1) in enumerate(pairwise(grid)):
        try:
            advance = step(index, x, t0, t1, state)
            if not advance.x.isfinite().all():
                raise NonFiniteError("The integration, with finite backbone velocities, left NaN or infinity.")
        except NonFiniteError as error:
            raise NonFiniteError(f"Step {index + 1} of {total}, from t = {float(t0):.4g}: {error}") from error
        if callback is not None:
            callback(Step(index, total, float(t0), float(t1), x, advance.velocity, advance.x, field.calls))
        x, state = advance.x, advance.state
    return x
