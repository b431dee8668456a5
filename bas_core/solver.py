"""The bi-anchor solver (arXiv 2601.21542, section 3), its single-anchor baseline, and the loop over the steps.

`solve` is the entry point. `bi_anchor_step` is the method, from predictor to corrector. Three parts act on it: the
field's guidance combines the branches of CFG at every node's time, the SideNet predicts velocities
(`prediction.predict`), and the hook of a schedule adjusts states and model calls (`schedule.ScheduleHook`).

`solve` keeps no gradients. `run_bi_anchor`, which fitting calls, leaves them as the caller has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .flow import velocity_to_x0
from .grids import as_grid
from .guidance import Field, NonFiniteError
from .prediction import Anchor, Query, SideNetProtocol, StraightLine, check_sidenet, predict
from .quadrature import Rule, get_rule
from .schedule import Schedule, StepHook, StepState

METHODS = ("bi_anchor", "single_anchor")
SINGLE_ANCHOR_RULE = "legendre3"
Times = Sequence[float]


@dataclass(frozen=True)
class Solver:
    """Everything about a sampling that does not change from step to step; see `make_solver`."""

    field: Field
    sidenet: SideNetProtocol
    rule: Rule
    hook: StepHook
    chunk: int | None
    analytic_first_step: bool

    @property
    def two_anchors(self) -> bool:
        """Whether predictions are made from two anchors."""
        return self.sidenet.anchors == 2

    @property
    def corrected_nodes(self) -> tuple[float, ...]:
        """The inner nodes that the corrector predicts anew: all with two anchors, else those near the right."""
        return tuple(c for c in self.rule.nodes if 0 < c < 1 and (self.two_anchors or c > 0.5))

    def branches_at(self, times: Times) -> int:
        """How many branches the solver needs for guided velocities at these times."""
        return 2 if any(self.field.guidance.active(t) for t in times) else 1

    def predict(self, queries: Sequence[Query], index: int, corrector: bool = False) -> list[Tensor]:
        """Guided velocities [B, C, *spatial] at the queries' times, from one SideNet batch; where the hook takes the
        SideNet's part of step number `index` away again, from the straight line."""
        times = [query.time for query in queries]
        sidenet = self.sidenet if self.hook.asks_sidenet(index, corrector) else StraightLine()
        branches = predict(sidenet, queries, self.field, self.branches_at(times), self.chunk)
        return [self.field.guidance.combine(v, time) for v, time in zip(branches, times, strict=True)]

    def first_anchor(self, x: Tensor, t: float, branches: int) -> Anchor:
        """Where sampling starts: by a model call, or by the SideNet's data mean."""
        if self.analytic_first_step and self.sidenet.has_data_mean:
            return Anchor(x, self.sidenet.analytic_velocity(x, t).expand(branches, *x.shape), t)
        return Anchor(x, self.hook.call_model(self.field, 0, x, t, branches), t)


def make_solver(
    field: Field,
    sidenet: SideNetProtocol | None,
    rule: Rule | str = Schedule.rule,
    hook: StepHook | None = None,
    chunk: int | None = None,
    analytic_first_step: bool = False,
) -> Solver:
    """A solver for one sampling.

    Args:
        field: the velocity field.
        sidenet: a `SideNet` or its like; None = the straight line through two anchors, the multistep method.
        rule: the quadrature rule, or its name.
        hook: of a schedule, an edit or a fit; None = nothing acts on the steps.
        chunk: largest number of samples in one SideNet call, when memory is short; None = one batch a phase.
        analytic_first_step: a SideNet with a data mean replaces the first model call.

    Raises:
        ValueError: an unknown rule, or a chunk below 1.
        TypeError: the SideNet lacks a member that the solver needs.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 sample, or None; got {chunk}.")
    network = StraightLine() if sidenet is None else sidenet
    return Solver(field, check_sidenet(network), get_rule(rule), hook or StepHook(), chunk, analytic_first_step)


# --- the steps --------------------------------------------------------------------------------------------------------


class StepResult(NamedTuple):
    """A finished step: the state at its end, the guided velocity at its start, and what the next step needs."""

    x: Tensor
    velocity: Tensor
    memory: Any


def node_time(t: float, s: float, c: float) -> float:
    """The time of node c in [0, 1] of the interval from t to s."""
    return s if c == 1 else t + c * (s - t)


def integrate(rule: Rule, v: dict[float, Tensor], x: Tensor, t: float, s: float) -> Tensor:
    """x_s = x_t + (s - t) * sum of w_c v_c over the rule's nodes c; the weights' sum is 1."""
    mean, weights = v[rule.nodes[0]], rule.weights[0]
    for c, weight in zip(rule.nodes[1:], rule.weights[1:], strict=True):
        weights += weight
        mean = torch.lerp(mean, v[c], weight / weights)
    return torch.add(x, mean, alpha=s - t)


def bi_anchor_step(
    solver: Solver, index: int, x: Tensor, times: Times, branches: int, left: Anchor, previous: Anchor | None
) -> StepResult:
    """One bi-anchor step from t to s, with one model call, at s; the last step makes none (paper, section 3).

    Args:
        solver: field, SideNet, rule and hook.
        index: the step's number i from 0; t and s are the times i and i + 1.
        x: [B, C, *spatial] the state x_t.
        times: N + 1 times.
        branches: how many branches the model call is asked for.
        left: v_t, and where it was evaluated: at the predictor's state of the step before.
        previous: the anchor before, for SideNets with two.

    Returns:
        x_s, v_t, and the anchors for the next step.
    """
    t, s, rule = times[index], times[index + 1], solver.rule
    last, left = index == len(times) - 2, left._replace(x=x)
    guidance, adjust = solver.field.guidance, solver.hook.adjust
    v_t = guidance.combine(left.v, t)

    # Predictor: from the left anchor the SideNet predicts v(t - h) = v_t + h S(x_t, v_t, t, h) at all nodes ahead.
    ahead = [c for c in rule.nodes if c > 0]
    far = previous if solver.two_anchors else None
    found = solver.predict([Query(left, far, node_time(t, s, c)) for c in ahead], index)
    v = {0.0: v_t} | dict(zip(ahead, found, strict=True))
    x_pred = adjust(StepState(index, last, integrate(rule, v, x, t, s), x, t, s, v_t))
    if last:
        return StepResult(x_pred, v_t, None)

    # The right anchor: the model call. Of the predictions only those that the corrector keeps stay in memory.
    inner = solver.corrected_nodes
    del found
    v = {c: v[c] for c in rule.nodes if c < 1 and c not in inner}
    right = Anchor(x_pred, solver.hook.call_model(solver.field, index + 1, x_pred, s, branches), s)
    v[1.0] = v_s = guidance.combine(right.v, s)

    # Corrector: the nodes nearer to the right anchor are predicted anew, looking back from it. A SideNet with two
    # anchors predicts every inner node anew, from the nearer anchor and the other one.
    if inner:
        sides = [(left, right) if c <= 0.5 else (right, left) for c in inner]
        found = solver.predict(
            [
                Query(near, far if solver.two_anchors else None, node_time(t, s, c))
                for c, (near, far) in zip(inner, sides, strict=True)
            ],
            index,
            corrector=True,
        )
        v |= dict(zip(inner, found, strict=True))
    x_s = adjust(StepState(index, last, integrate(rule, v, x, t, s), x, t, s, v_t, x_pred, v_s))
    # The next step begins at x_s, and needs of both anchors the velocities alone.
    return StepResult(x_s, v_t, (right._replace(x=x_s), left._replace(x=x_s)))


def single_anchor_step(solver: Solver, index: int, x: Tensor, times: Times) -> StepResult:
    """One step from its left anchor alone, with a model call at its start (paper, section 2; the baseline).

    The official single-anchor sampler decides on guidance by the anchor's time for the whole interval; the bi-anchor
    sampler decides at each node's own time.
    """
    t, s, rule, guidance = times[index], times[index + 1], solver.rule, solver.field.guidance
    branches = 2 if guidance.active(t) else 1
    anchor = Anchor(x, solver.field(x, t, branches), t) if index else solver.first_anchor(x, t, branches)
    queries = [Query(anchor, None, node_time(t, s, c)) for c in rule.nodes]
    predicted = predict(solver.sidenet, queries, solver.field, branches, solver.chunk)
    v = {c: guidance.combine(each, t) for c, each in zip(rule.nodes, predicted, strict=True)}
    return StepResult(integrate(rule, v, x, t, s), guidance.combine(anchor.v, t), None)


def branches_for_calls(solver: Solver, times: Times) -> list[int]:
    """For each model call of the bi-anchor solver, how many branches the nodes need that are predicted from it."""
    last = len(times) - 2

    def needed(interval: int, nodes: Sequence[float]) -> bool:
        inside = 0 <= interval <= last
        return inside and solver.branches_at([node_time(times[interval], times[interval + 1], c) for c in nodes]) == 2

    ahead = [c for c in solver.rule.nodes if c > 0]
    return [
        2
        if solver.field.guidance.active(times[i])
        or needed(i, ahead)
        or needed(i - 1, solver.corrected_nodes)
        or (solver.two_anchors and needed(i + 1, ahead))
        else 1
        for i in range(len(times) - 1)
    ]


# --- the loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What a callback sees of a finished step.

    Attributes:
        index, total: the step's number from 0, and how many there are.
        time, next_time: the step's ends.
        x: state at `time`.
        velocity: guided velocity at `time`.
        x_next: state at `next_time`.
        calls: model calls so far, in this sampling.
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
StepFunction = Callable[[int, Tensor, Any], StepResult]


def run_steps(step: StepFunction, field: Field, x: Tensor, times: Times, callback: Callback | None = None) -> Tensor:
    """Apply `step(index, x, memory)` to every interval; the one loop of all solvers.

    Raises:
        NonFiniteError: a step met NaN or infinity; the message says at which step and times.
    """
    memory: Any = None
    total, calls_before = len(times) - 1, field.calls
    try:
        for index, (t, s) in enumerate(pairwise(times)):
            field.finite.place = (index + 1, total, t)
            x_next, velocity, memory = step(index, x, memory)
            field.finite.see(x_next, _overflow)
            if callback is not None:
                if field.finite.before_callbacks:
                    field.finite.read()
                calls = field.calls - calls_before
                callback(Step(index, total, t, s, x, velocity, x_next, calls))
            x = x_next
            del x_next, velocity  # which would stay in memory during the next step
    finally:
        field.finite.place = None
    return x


def _overflow(bad: int) -> NonFiniteError:
    return NonFiniteError("The integration, with finite backbone velocities, left NaN or infinity.")


def run_bi_anchor(solver: Solver, x: Tensor, times: Times, callback: Callback | None = None) -> Tensor:
    """The bi-anchor solver from x at the first of N + 1 times to the last one; N model calls.

    Raises:
        ValueError: the rule has no node at one of the ends.
        NonFiniteError: see `run_steps`.
    """
    if not solver.rule.has_both_ends:
        raise ValueError(
            f"bi_anchor needs a rule whose nodes include 0 and 1, such as lobatto4; got {solver.rule.name}."
        )
    times = [float(t) for t in times]
    if isinstance(solver.sidenet, StraightLine) and solver.field.guidance.constant and solver.rule.exactness > 0:
        # Every such rule integrates a straight line exactly; this one with the fewest nodes.
        solver = dataclasses.replace(solver, rule=get_rule("lobatto2"))
    branches = [*branches_for_calls(solver, times), 0]

    def step(index: int, x: Tensor, anchors: tuple[Anchor, Anchor | None] | None) -> StepResult:
        left, previous = anchors or (solver.first_anchor(x, times[0], branches[0]), None)
        return bi_anchor_step(solver, index, x, times, branches[index + 1], left, previous)

    return run_steps(step, solver.field, x, times, callback)


def run_single_anchor(solver: Solver, x: Tensor, times: Times, callback: Callback | None = None) -> Tensor:
    """The single-anchor solver, as `run_bi_anchor`."""
    times = [float(t) for t in times]

    def step(index: int, x: Tensor, _: None) -> StepResult:
        return single_anchor_step(solver, index, x, times)

    return run_steps(step, solver.field, x, times, callback)


def solve(
    field: Field,
    sidenet: SideNetProtocol | None,
    x: Tensor,
    schedule: Schedule | Tensor,
    *,
    method: str = "bi_anchor",
    rule: Rule | str | None = None,
    callback: Callback | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Integrate the field over a schedule with the bi-anchor or the single-anchor solver.

    Args:
        field: the velocity field; it is called as often as the schedule says (`Schedule.calls`).
        sidenet: a `SideNet` or its like; None = the straight line through two anchors, which is the Adams-Bashforth 2 /
            trapezoid predictor-corrector; with a fitted schedule, the schedule alone. One without a data mean calls
            the model for an analytic first step.
        x: [B, C, *spatial] state at the schedule's first time; half precision is integrated in float32.
        schedule: a `Schedule`, such as `card.schedules_for(cfg)[5]`; or plain times [N + 1], strictly descending
            (sampling) or ascending (inversion), within [0, 1], for N model calls.
        method: "bi_anchor", or "single_anchor" (a call at the start of every step), which takes plain times only.
        rule: a quadrature rule or its name. Default: the schedule's own for bi_anchor (lobatto4 for plain times),
            legendre3 for single_anchor.
        callback: sees every finished `Step`; may raise to stop.
        chunk: largest number of samples in one SideNet call, when memory is short; None = one batch a phase.

    Returns:
        [B, C, *spatial] state at the last time.

    Raises:
        ValueError: an argument does not fit; the message says which, what was required and what came.
        TypeError: the SideNet lacks a member that the solver needs.
        NonFiniteError: the model or the SideNet returned NaN or infinity; the message says at which step. It is raised
            where the host waits for the device: before the next callback or at the end (`guidance.FiniteCheck`).
    """
    x = as_float(x)
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}. Valid methods: {', '.join(METHODS)}.")
    if not isinstance(schedule, Schedule):
        times = as_grid(schedule).tolist()
        hook, usual, analytic = StepHook(), Schedule.rule, False
    elif schedule.fitted and method != "bi_anchor":
        raise ValueError(f"The schedule's coefficients were fitted for bi_anchor; got method {method!r}.")
    elif schedule.fitted and rule is not None and get_rule(rule).name != schedule.rule:
        raise ValueError(
            f"The schedule's coefficients were fitted for the rule {schedule.rule}; got {get_rule(rule).name}. Leave "
            "the rule out, or give the schedule's times alone."
        )
    else:
        times, hook, usual = list(schedule.times), schedule.hook(), schedule.rule
        analytic = schedule.analytic_first_step
    if method == "single_anchor":
        run, rule = run_single_anchor, rule or SINGLE_ANCHOR_RULE
    else:
        run, rule = run_bi_anchor, rule or usual
    with torch.no_grad(), field.finite.gathering():
        field.finite.see(x, _not_finite)
        return run(make_solver(field, sidenet, rule, hook, chunk, analytic), x, times, callback)


def as_state(x: Tensor) -> Tensor:
    """The state in float32 or better, if it is one.

    Raises:
        ValueError: not a float tensor [B, C, H, W] or [B, C, T, H, W], empty, or not finite.
    """
    x = as_float(x)
    if not x.isfinite().all():
        raise _not_finite(len(x))
    return x


def _not_finite(bad: int) -> ValueError:
    return ValueError("x must be finite; it holds NaN or infinity before the first step.")


def as_float(x: Tensor) -> Tensor:
    """`as_state` without a look at the values, which would wait for the device."""
    if not isinstance(x, Tensor) or x.ndim not in (4, 5) or not x.is_floating_point() or not x.numel():
        what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a float tensor [B, C, H, W] or [B, C, T, H, W] with B > 0; got {what}.")
    return x.to(torch.promote_types(x.dtype, torch.float32))
