"""The bi-anchor solver (arXiv 2601.21542, section 3): pure steps, and the loop over a time grid beside them.

A step from t to s = t - delta, with the velocity known at the left anchor (x, t):

1. forward probe: the SideNet predicts the velocity at the quadrature nodes; quadrature gives a provisional end;
2. right anchor: one backbone call there;
3. backward refinement: the SideNet, from the right anchor, predicts the nodes nearer to it; a two-anchor SideNet
   predicts all inner nodes anew, from the anchor nearer to each and the other one;
4. quadrature again gives the accepted end.

The right anchor is the next step's left one, and the last step ends after the probe: N intervals are N calls. At
t = 1 the velocity is the noise minus what the model takes for the mean of its data, and hardly more: a SideNet that
keeps that mean can stand in for the first call, where the first interval is short, and saves it.
Nothing here switches gradients off or draws random numbers: a step can be differentiated, and tested with an exact
velocity in the SideNet's place. To sample, call `solve` under `torch.inference_mode()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .flow import per_sample, velocity_to_x0
from .grids import check_grid, starts_short
from .guidance import Field, NonFiniteError
from .quadrature import Rule, get_rule

METHODS = ("bi_anchor", "single_anchor")
DEFAULT_RULES = {"bi_anchor": "lobatto4", "single_anchor": "legendre3"}


class Predictor(Protocol):
    """What the solver needs of a SideNet: `SideNet` is one, and so is any function that takes its arguments by name.

    It is called with `x, v, t, h, cond`; an attribute `anchors` of 2 asks for `slope` and `span` too, and
    `config.guidance_input` for `scale`. It returns the change of velocity from t to t - h. A method
    `first_velocity(x, t)` can stand in for the first call.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


class StraightLine:
    """The SideNet whose output is zero: velocities on the straight line through two anchors.

    With it the bi-anchor solver is the Adams-Bashforth 2 / trapezoid predictor-corrector, one call a step.
    """

    anchors = 2

    def __call__(self, *, h: Tensor, slope: Tensor, **_: Any) -> Tensor:
        return slope * per_sample(h, slope)


class Anchor(NamedTuple):
    """A point of the path where the backbone was called.

    Attributes:
        x: [B, C, *spatial] state.
        v: [K, B, C, *spatial] branches of the velocity.
        t: 0-d time.
    """

    x: Tensor
    v: Tensor
    t: Tensor


class Query(NamedTuple):
    """One velocity to predict: at `time`, seen from `near`, with `far` as the second anchor if there is one."""

    near: Anchor
    far: Anchor | None
    time: Tensor


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


# --- SideNet calls ------------------------------------------------------------------------------------------------


def predict(
    sidenet: Predictor, queries: Sequence[Query], field: Field, branches: int, chunk: int | None = None
) -> Tensor:
    """Answer all queries of a phase in one SideNet batch.

    Args:
        sidenet: see `Predictor`.
        queries: M of them.
        field: for the branches' conditions and the guidance scale.
        branches: K, how many branches to predict.
        chunk: largest number of samples in one SideNet call; None = all M K B at once.

    Returns:
        [M, K, B, C, *spatial] velocities.
    """
    near = [q.near for q in queries]
    batch = near[0].x.shape[0]
    x = torch.cat([a.x for a in near for _ in range(branches)])
    v = torch.cat([a.v[:branches].flatten(0, 1) for a in near])

    def column(values: Sequence[Tensor | float]) -> Tensor:
        each = torch.stack([torch.as_tensor(value, dtype=x.dtype) for value in values])
        return each.to(x.device).repeat_interleave(branches * batch)

    inputs: dict[str, Tensor | None] = {
        "x": x,
        "v": v,
        "t": column([a.t for a in near]),
        "h": column([q.near.t - q.time for q in queries]),
        "cond": _conditions(field, branches, len(queries)),
    }
    if getattr(sidenet, "anchors", 1) == 2:
        inputs["slope"] = torch.cat([_slope(q, branches).flatten(0, 1) for q in queries])
        inputs["span"] = column([q.near.t - q.far.t if q.far else 0.0 for q in queries])
    if getattr(getattr(sidenet, "config", None), "guidance_input", False):
        inputs["scale"] = column([field.scale] * len(queries))
    size = chunk or len(x)
    changes = [
        sidenet(**{name: value if value is None else value[i : i + size] for name, value in inputs.items()})
        for i in range(0, len(x), size)
    ]
    change = changes[0] if len(changes) == 1 else torch.cat(changes)
    if not torch.isfinite(change).all():
        raise NonFiniteError(
            "The SideNet returned NaN or infinity. Run it in float32 or bfloat16, and check that it was made for "
            "this model."
        )
    return (v + change).unflatten(0, (len(queries), branches, batch))


def _conditions(field: Field, branches: int, queries: int) -> Tensor | None:
    conditions = [c for c in field.conditions[:branches] if c is not None]
    if not conditions:
        return None
    return torch.cat(conditions * queries)


def _slope(query: Query, branches: int) -> Tensor:
    """(v_near - v_far) / (t_far - t_near): the change of v for a step h toward the data, per unit of h."""
    near, far = query.near, query.far
    if far is None or float(near.t) == float(far.t):
        return torch.zeros_like(near.v[:branches])
    return (far.v[:branches] - near.v[:branches]) / (near.t - far.t).to(near.v.dtype)


# --- steps --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Everything about a run that does not change from step to step."""

    field: Field
    sidenet: Predictor
    rule: Rule
    chunk: int | None
    skip_first: bool = False

    @property
    def two_anchors(self) -> bool:
        return getattr(self.sidenet, "anchors", 1) == 2

    def node_time(self, t0: Tensor, t1: Tensor, c: float) -> Tensor:
        return t1 if c == 1 else t0 + c * (t1 - t0)

    def branches_at(self, times: Sequence[Tensor]) -> int:
        """How many branches velocities at these times need."""
        return 2 if any(self.field.guidance.active(t) for t in times) else 1

    def first_anchor(self, x: Tensor, t0: Tensor, branches: int) -> Anchor:
        """Where a run begins: by a backbone call, or by what the SideNet knows of it."""
        known: Callable[..., Tensor | None] | None = getattr(self.sidenet, "first_velocity", None)
        velocity = known(x, t0) if self.skip_first and known else None
        if velocity is not None:
            return Anchor(x, velocity.expand(branches, *x.shape), t0)
        return Anchor(x, self.field(x, t0, branches), t0)

    def seen_again(self) -> tuple[float, ...]:
        """The inner nodes that the backward refinement predicts anew."""
        return tuple(c for c in self.rule.nodes if 0 < c < 1 and (self.two_anchors or c > 0.5))


def probe(plan: Plan, left: Anchor, previous: Anchor | None, t1: Tensor) -> tuple[Tensor, dict[float, Tensor]]:
    """Forward probe: from the left anchor over the interval to t1 with SideNet velocities alone.

    Returns:
        The provisional end [B, C, *spatial], and the guided velocity at each node of the rule.
    """
    guidance = plan.field.guidance
    times = {c: plan.node_time(left.t, t1, c) for c in plan.rule.nodes}
    ahead = [c for c in plan.rule.nodes if c > 0]
    far = previous if plan.two_anchors else None
    predicted = predict(
        plan.sidenet,
        [Query(left, far, times[c]) for c in ahead],
        plan.field,
        plan.branches_at([times[c] for c in ahead]),
        plan.chunk,
    )
    velocities = {c: guidance.combine(v, times[c]) for c, v in zip(ahead, predicted, strict=True)}
    if plan.rule.nodes[0] == 0:
        velocities[0.0] = guidance.combine(left.v, left.t)
    return integrate(plan.rule, velocities, left.x, left.t, t1), velocities


def refine(
    plan: Plan, left: Anchor, right: Anchor, velocities: dict[float, Tensor]
) -> tuple[Tensor, dict[float, Tensor]]:
    """Backward refinement and second integration, with the right anchor known.

    Args:
        plan: rule, SideNet and field.
        left, right: the interval's anchors; `right.x` is the provisional end.
        velocities: what `probe` returned.

    Returns:
        The accepted end [B, C, *spatial], and the velocities it was integrated from.
    """
    guidance = plan.field.guidance
    t0, t1 = left.t, right.t
    velocities = velocities | {1.0: guidance.combine(right.v, t1)}
    inner = plan.seen_again()
    if inner:
        times = [plan.node_time(t0, t1, c) for c in inner]
        queries = []
        for c, time in zip(inner, times, strict=True):
            near, far = (left, right) if c <= 0.5 else (right, left)
            queries.append(Query(near, far if plan.two_anchors else None, time))
        predicted = predict(plan.sidenet, queries, plan.field, plan.branches_at(times), plan.chunk)
        velocities |= {c: guidance.combine(v, t) for c, v, t in zip(inner, predicted, times, strict=True)}
    return integrate(plan.rule, velocities, left.x, t0, t1), velocities


def integrate(rule: Rule, velocities: dict[float, Tensor], x: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    """x(t1) = x(t0) + (t1 - t0) * sum of weight times velocity over the rule's nodes."""
    total = torch.zeros_like(x)
    for c, weight in zip(rule.nodes, rule.weights, strict=True):
        total = torch.add(total, velocities[c], alpha=weight)
    return x + (t1 - t0).to(x.dtype) * total


def single_anchor_step(plan: Plan, anchor: Anchor, t1: Tensor) -> Tensor:
    """One interval from its left anchor alone, as the official single-anchor sampler takes it.

    That sampler decides on guidance by the anchor's time for the whole interval, and evaluates the unconditional
    branch only where it applies; the bi-anchor sampler decides at each node's own time.
    """
    guided = plan.field.guidance.active(anchor.t)
    times = [plan.node_time(anchor.t, t1, c) for c in plan.rule.nodes]
    predicted = predict(
        plan.sidenet, [Query(anchor, None, t) for t in times], plan.field, 2 if guided else 1, plan.chunk
    )
    velocities = {c: plan.field.guidance.combine(v, anchor.t) for c, v in zip(plan.rule.nodes, predicted, strict=True)}
    return integrate(plan.rule, velocities, anchor.x, anchor.t, t1)


def branches_needed(plan: Plan, times: Sequence[Tensor]) -> list[int]:
    """For each bi-anchor call, how many branches the nodes that are predicted from it need."""
    active: Callable[[Tensor], bool] = plan.field.guidance.active

    def any_active(interval: int, nodes: Sequence[float]) -> bool:
        if not 0 <= interval < len(times) - 1:
            return False
        return any(active(plan.node_time(times[interval], times[interval + 1], c)) for c in nodes)

    ahead = [c for c in plan.rule.nodes if c > 0]
    return [
        2
        if active(times[i])
        or any_active(i, ahead)
        or any_active(i - 1, plan.seen_again())
        or (plan.two_anchors and any_active(i + 1, ahead))
        else 1
        for i in range(len(times) - 1)
    ]


# --- the loop -----------------------------------------------------------------------------------------------------


def solve(  # noqa: PLR0913 - all but four have defaults, and go by name
    field: Field,
    sidenet: Predictor | None,
    x: Tensor,
    times: Tensor,
    *,
    method: str = "bi_anchor",
    rule: Rule | str | None = None,
    callback: Callback | None = None,
    chunk: int | None = None,
    skip_first: bool = False,
    correct: Correct | None = None,
    half_calls: Callable[[Field, Sequence[Tensor]], Field] | None = None,
) -> Tensor:
    """Integrate the field over a time grid with the bi-anchor or the single-anchor solver.

    Args:
        field: the velocity field; N intervals cost N of its calls.
        sidenet: a `SideNet`, any `Predictor`, or None for the straight line through two anchors (the
            Adams-Bashforth 2 / trapezoid predictor-corrector).
        x: [B, C, *spatial] state at `times[0]`; half precision is integrated in float32.
        times: [N + 1] strictly descending (sampling) or ascending (inversion), within [0, 1].
        method: "bi_anchor", or "single_anchor" (one call a step at its start; the paper's baseline).
        rule: a quadrature rule or its name. Default: lobatto4 for bi_anchor, legendre3 for single_anchor.
        callback: sees every finished `Step`; may raise to stop.
        chunk: largest number of samples in one SideNet call, when memory is short; None = one batch a phase.
        skip_first: a SideNet that knows the mean of the model's data may save the call at t = 1, which it does where
            the first interval is short beside the others (`grids.starts_short`): N - 1 calls. For noise from a random
            generator only: that from an inversion leads to one image and not to the mean.
        correct: steers a bi-anchor run from outside: from each `Proposal` to the state to go on with, such as
            `step_weights.StepWeights`. None = it goes on with what is proposed.
        half_calls: makes the field of a run over the grid cheaper, such as `half_calls.HalfCalls`, which evaluates one
            branch of guidance at some calls.

    Returns:
        [B, C, *spatial] state at `times[-1]`.

    Raises:
        ValueError: an argument does not fit; the message says which, what was required and what came.
        NonFiniteError: the backbone or the SideNet returned NaN or infinity; the message says at which step.
    """
    x = check_state(x)
    grid = list(check_grid(times).to(torch.promote_types(times.dtype, torch.float32)))
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}. Valid methods: {', '.join(METHODS)}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 sample, or None; got {chunk}.")
    predictor = StraightLine() if sidenet is None else sidenet
    field = field if half_calls is None else half_calls(field, grid)
    plan = Plan(field, predictor, get_rule(rule or DEFAULT_RULES[method]), chunk, skip_first and starts_short(grid))
    if method == "bi_anchor" and not plan.rule.has_both_ends:
        raise ValueError(f"bi_anchor needs a rule whose nodes include 0 and 1, such as lobatto4; got {plan.rule.name}.")
    if correct is not None and method != "bi_anchor":
        raise ValueError(f"Only bi_anchor can be corrected from outside; got method {method!r}.")
    steps = bi_anchor_steps(plan, grid, correct or as_proposed) if method == "bi_anchor" else _single_anchor_steps(plan)
    return run_steps(steps, field, x, grid, callback)


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


class Advance(NamedTuple):
    """A step's result: the new state, the guided velocity at its start, and what the next step needs."""

    x: Tensor
    velocity: Tensor
    state: Any


StepFunction = Callable[[int, Tensor, Tensor, Tensor, Any], Advance]


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


@dataclass(frozen=True)
class Proposal:
    """A state that the bi-anchor step is about to go on with, for those who steer a run.

    Attributes:
        index: the step's number from 0.
        accepted: whether this is the step's last word, or the provisional end that the backbone is called at.
        x: [B, C, *spatial] the proposed state at `t1`.
        start: the state at `t0`.
        t0, t1: 0-d, the step's ends.
        velocities: guided velocities of the anchors so far; `velocities[index]` is that at `t0`, and where the right
            anchor is known, its own follows.
        provisional: the state that the right anchor's velocity belongs to, where it is known.
    """

    index: int
    accepted: bool
    x: Tensor
    start: Tensor
    t0: Tensor
    t1: Tensor
    velocities: tuple[Tensor, ...]
    provisional: Tensor | None = None


Correct = Callable[[Proposal], Tensor]


def as_proposed(proposal: Proposal) -> Tensor:
    """The `Correct` of plain sampling: it leaves every proposed state as it is."""
    return proposal.x


def bi_anchor_steps(plan: Plan, grid: Sequence[Tensor], correct: Correct = as_proposed) -> StepFunction:
    """The bi-anchor step for `run_steps`.

    Args:
        plan: rule, SideNet and field.
        grid: the times of the whole run.
        correct: from what the solver proposes to the state to go on with, for what steers a run from outside. The
            backbone is called at the corrected provisional end.
    """
    needed = branches_needed(plan, grid)

    def step(index: int, x: Tensor, t0: Tensor, t1: Tensor, state: Any) -> Advance:
        if state is None:
            previous, left = None, plan.first_anchor(x, t0, needed[0])
            known: tuple[Tensor, ...] = (plan.field.guidance.combine(left.v, t0),)
        else:
            previous, reused, known = state
            left = reused._replace(x=x)
        velocity = known[index]
        last = index == len(grid) - 2
        end, velocities = probe(plan, left, previous, t1)
        end = correct(Proposal(index, last, end, x, t0, t1, known))
        if last:
            return Advance(end, velocity, None)
        right = Anchor(end, plan.field(end, t1, needed[index + 1]), t1)
        known = (*known, plan.field.guidance.combine(right.v, t1))
        accepted, _ = refine(plan, left, right, velocities)
        accepted = correct(Proposal(index, True, accepted, x, t0, t1, known, provisional=end))
        return Advance(accepted, velocity, (left, right, known))

    return step


def _single_anchor_steps(plan: Plan) -> StepFunction:
    def step(index: int, x: Tensor, t0: Tensor, t1: Tensor, state: None) -> Advance:
        branches = 2 if plan.field.guidance.active(t0) else 1
        anchor = Anchor(x, plan.field(x, t0, branches), t0) if index else plan.first_anchor(x, t0, branches)
        return Advance(single_anchor_step(plan, anchor, t1), plan.field.guidance.combine(anchor.v, t0), None)

    return step
