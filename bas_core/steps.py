"""The steps of the bi-anchor solver (arXiv 2601.21542, section 3), as pure functions. `solver.py` loops over them.

A step from t to s = t - delta, with the velocity known at the left anchor (x, t):

1. forward probe: the SideNet predicts the velocity at the quadrature nodes; quadrature gives a provisional end;
2. right anchor: one backbone call there;
3. backward refinement: the SideNet, from the right anchor, predicts the nodes nearer to it; a two-anchor SideNet
   predicts all inner nodes anew, from the anchor nearer to each and the other one;
4. quadrature again gives the accepted end.

The right anchor is the next step's left one, and the last step ends after the probe: N intervals are N calls.
Nothing here switches gradients off or draws random numbers: a step can be differentiated, and tested with an exact
velocity in the SideNet's place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .flow import per_sample
from .guidance import Field, NonFiniteError
from .quadrature import Rule


class Predictor(Protocol):
    """What the solver needs of a SideNet: `SideNet` is one, and so is any function that takes its arguments by name.

    It is called with `x, v, t, h, cond`; an attribute `anchors` of 2 asks for `slope` and `span` too, and
    `config.guidance_input` for `scale`. It returns the change of velocity from t to t - h. A method
    `first_velocity(x, t)` can stand in for the first call.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


def knows_mean(sidenet: Any) -> bool:
    """Whether a SideNet keeps the mean of the model's data, with which it can save a run's first call."""
    return getattr(getattr(sidenet, "config", None), "mean_size", 0) > 0


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


# --- steps for a loop ---------------------------------------------------------------------------------------------


class Advance(NamedTuple):
    """A step's result: the new state, the guided velocity at its start, and what the next step needs."""

    x: Tensor
    velocity: Tensor
    state: Any


StepFunction = Callable[[int, Tensor, Tensor, Tensor, Any], Advance]


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


def single_anchor_steps(plan: Plan) -> StepFunction:
    """The single-anchor step for `run_steps`."""

    def step(index: int, x: Tensor, t0: Tensor, t1: Tensor, state: None) -> Advance:
        branches = 2 if plan.field.guidance.active(t0) else 1
        anchor = Anchor(x, plan.field(x, t0, branches), t0) if index else plan.first_anchor(x, t0, branches)
        return Advance(single_anchor_step(plan, anchor, t1), plan.field.guidance.combine(anchor.v, t0), None)

    return step
