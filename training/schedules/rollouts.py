"""Samplings of the model from recorded noises: what a surrogate learns from, and what schedules are judged by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...bas_core.guidance import Field
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
        ends: [M, D].
        cfg_coefficients: of the conditional-only calls.
    """

    times: Tensor
    states: Tensor
    velocities: Tensor
    extra: Tensor
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
    """
    weights = form.weights.expand(len(noise), -1, -1)
    weights = (weights if scatter is None else weights + scatter).to(noise)
    calls = form.steps - (mean is not None)
    hook = CFGFit(form.steps, calls if conditional_only else 0)
    times = form.times.float().tolist()
    used: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    x = noise
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
        seen.append((coordinates.of(x), coordinates.of(v - missed), coordinates.of(missed)))
        x = noise + sum(_by_sample(weights[:, k, j], each) * each for j, each in enumerate(used))
    states, velocities, extra = (torch.stack(part) for part in zip(*seen, strict=True))
    return Rollout(form.times[:-1], states, velocities, extra, coordinates.of(x), hook.cfg_rows)


def _by_sample(weights: Tensor, like: Tensor) -> Tensor:
    return weights.view(-1, *[1] * (like.ndim - 1))


def scattered(form: LinearForm, samples: int, size: float, generator: torch.Generator) -> Tensor:
    """[M, N, N] random changes of weights, larger where the path is long; rows' sums change by half of a weight's."""
    steps = form.steps
    changes = torch.randn(samples, steps, steps, generator=generator, dtype=torch.float64).tril()
    sums = torch.diagonal(changes, dim1=1, dim2=2) / 2
    changes = changes.tril(-1) + torch.diag_embed(sums - changes.tril(-1).sum(2))
    return changes * (size * (form.times[0] - form.times[1:]))[:, None]
