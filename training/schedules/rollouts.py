"""Samplings of the model from recorded noises: what a surrogate learns from, and what schedules are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...bas_core.guidance import Field
from ...bas_core.prediction import Anchor, Query, SideNetProtocol, StraightLine, predict
from .fitting import CFGFit, CFGRows
from .linear_form import LinearForm
from .surrogate import Coordinates


@dataclass(frozen=True)
class Rollout:
    """A sampling of M noises in N calls, in D coordinates.

    Attributes:
        times: [N] of the calls.
        states, velocities: [N, M, D] where the model was called, and what it returned.
        extra: [N, M, D] what the sampling took instead of these velocities, less them: zero but for an analytic first
            step and conditional-only calls.
        predictions: [N, M, D] what a SideNet predicts of each step beyond the straight line; zero without one.
        ends: [M, D].
        cfg_coefficients: of the conditional-only calls.
    """

    times: Tensor
    states: Tensor
    velocities: Tensor
    extra: Tensor
    predictions: Tensor
    ends: Tensor
    cfg_coefficients: CFGRows


def roll_out(
    field: Field,
    noise: Tensor,
    form: LinearForm,
    coordinates: Coordinates,
    *,
    mean: Tensor | None = None,
    conditional_only: bool = False,
    scatter: Tensor | None = None,
    sidenet: SideNetProtocol | None = None,
) -> Rollout:
    """Sample, and keep what was seen.

    Args:
        field: of the samples.
        noise: [M, C, *spatial].
        form: the method.
        coordinates: in which states are kept.
        mean: [M, C, *spatial] or [C, *spatial] of the data: the first velocity is noise minus it, without a call.
        conditional_only: whether the calls `CONDITIONAL_ONLY` are; their coefficients are fitted on the way.
        scatter: [M, N, N] added to the weights of each sample.
        sidenet: is asked in each step; `form` says how much of its answer is taken.
    """
    weights = form.weights.expand(len(noise), -1, -1)
    weights = (weights if scatter is None else weights + scatter).to(noise)
    calls = form.steps - (mean is not None)
    hook = CFGFit(form.steps, calls if conditional_only else 0)
    times = form.times.float().tolist()
    used: list[Tensor] = []
    seen: list[tuple[Tensor, ...]] = []
    x = noise
    added = torch.zeros_like(noise)
    anchors: list[Anchor] = []
    for k in range(form.steps):
        t = times[k]
        hook.missed = None
        if mean is not None and k == 0:
            v = noise - mean
        else:
            v = hook.call_model(field, k, x, t, 2 if field.guidance.active(t) else 1)
            v = field.guidance.combine(v, t)
        used.append(v)
        missed = torch.zeros_like(v) if hook.missed is None else hook.missed
        anchors = [*anchors[-1:], Anchor(x, v[None], t)]
        predicted = torch.zeros_like(x) if sidenet is None else beyond_the_line(sidenet, field, anchors, times[k + 1])
        seen.append(tuple(coordinates.of(part) for part in (x, v - missed, missed, predicted)))
        if form.network is not None:
            added = torch.add(added, predicted, alpha=float(form.network[k]))
        x = noise + added + sum(_by_sample(weights[:, k, j], each) * each for j, each in enumerate(used))
    states, velocities, extra, predictions = (torch.stack(part) for part in zip(*seen, strict=True))
    return Rollout(form.times[:-1], states, velocities, extra, predictions, coordinates.of(x), hook.cfg_rows)


def beyond_the_line(sidenet: SideNetProtocol, field: Field, anchors: Sequence[Anchor], s: float) -> Tensor:
    """What a SideNet adds to the bi-anchor step from the last anchor to s, by `linear_form.RULE`, beyond the straight
    line through the last two: [M, C, *spatial]."""
    query = [Query(anchors[-1], anchors[-2] if len(anchors) > 1 else None, s)]
    ours, line = (predict(each, query, field, 1)[0][0] for each in (sidenet, StraightLine()))
    return (s - anchors[-1].t) / 2 * (ours - line)


def _by_sample(weights: Tensor, like: Tensor) -> Tensor:
    return weights.view(-1, *[1] * (like.ndim - 1))


def scattered(form: LinearForm, samples: int, size: float, generator: torch.Generator) -> Tensor:
    """[M, N, N] random changes of weights, larger where the path is long; rows' sums change by half of a weight's."""
    steps = form.steps
    changes = torch.randn(samples, steps, steps, generator=generator, dtype=torch.float64).tril()
    sums = torch.diagonal(changes, dim1=1, dim2=2) / 2
    changes = changes.tril(-1) + torch.diag_embed(sums - changes.tril(-1).sum(2))
    return changes * (size * (form.times[0] - form.times[1:]))[:, None]
