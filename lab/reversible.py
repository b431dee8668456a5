"""Algebraically reversible integration on the demo, beside the bi-anchor solver's, at equal calls.

    python -m ba_solver.lab.reversible            # a few minutes on two cores; prints a table

A reversible method undoes its own steps exactly, whatever their error, if it is given its whole last state. Why the
solver keeps residuals instead is in docs/editing.md.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ..bas_core.editing import START
from ..bas_core.flow import interpolate
from ..bas_core.grids import time_grid
from ..bas_core.guidance import Field
from ..bas_core.quadrature import get_rule
from ..bas_core.solver import solve
from ..bas_core.steps import Anchor, Plan, Predictor, single_anchor_step
from ..training.demo.assets import DEMO_CFG, load_demo
from .editing_data import SEARCH_SEED, drawn, noise_for
from .round_trips import decibels

Increment = Callable[[Tensor, Tensor, Tensor], Tensor]
Velocity = Callable[[Tensor, Tensor], Tensor]
COUPLING = 0.9


def coupled_forward(step: Increment, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """McCallum and Foster's reversible form of a one-step method (which Rex uses): two of its steps an interval.

    Args:
        step: (x, t0, t1) to the method's x(t1) - x(t0).
        x: [B, C, *spatial].
        times: [N + 1].

    Returns:
        Both of the states that it couples; either is a solution.
    """
    y = z = x
    for t0, t1 in pairwise(times):
        y = COUPLING * y + (1 - COUPLING) * z + step(z, t0, t1)
        z = z - step(y, t1, t0)
    return y, z


def coupled_backward(step: Increment, y: Tensor, z: Tensor, times: Tensor) -> Tensor:
    """Undo `coupled_forward` over the same times."""
    for t0, t1 in reversed(list(pairwise(times))):
        z = z + step(y, t1, t0)
        y = (y - (1 - COUPLING) * z - step(z, t0, t1)) / COUPLING
    return y


def heun_forward(velocity: Velocity, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reversible Heun (Kidger et al. 2021, algorithm 1), one call an interval; its state is three tensors."""
    y = z = x
    v = velocity(x, times[0])
    for t0, t1 in pairwise(times):
        z = 2 * y - z + (t1 - t0) * v
        v_next = velocity(z, t1)
        y = y + (t1 - t0) / 2 * (v + v_next)
        v = v_next
    return y, z, v


def heun_backward(velocity: Velocity, y: Tensor, z: Tensor, v: Tensor, times: Tensor) -> Tensor:
    """Undo `heun_forward` over the same times."""
    for t0, t1 in reversed(list(pairwise(times))):
        z = 2 * y - z - (t1 - t0) * v
        v_before = velocity(z, t0)
        y = y - (t1 - t0) / 2 * (v + v_before)
        v = v_before
    return y


def single_anchor_increment(field: Field, sidenet: Predictor) -> Increment:
    """The single-anchor BA step, the only one of ours that needs no history: x(t1) - x(t0) for one call."""
    plan = Plan(field, sidenet, get_rule("legendre3"), None)
    return lambda x, t0, t1: single_anchor_step(plan, Anchor(x, field(x, t0), t0), t1) - x


def compare(calls: int, cfg: float, images: int = 8) -> list[tuple[str, float, float, float]]:
    """Rows of (method, RMSE of its noise, PSNR of its return, PSNR of its return from the noise alone)."""
    demo = load_demo()
    batch = drawn(SEARCH_SEED, torch.arange(images))
    start = interpolate(batch.images, noise_for(batch.images, SEARCH_SEED), START)
    field = demo.field(batch.labels, cfg)

    def grid(intervals: int) -> Tensor:
        return (START + (1 - START) * time_grid(intervals, 2.0)).flip(0)

    exact = solve(field, demo.sidenet, start, grid(160))

    def row(name: str, noise: Tensor, back: Tensor, alone: Tensor) -> tuple[str, float, float, float]:
        error = (noise - exact).square().mean().sqrt().item()
        return name, error, decibels(back, start).mean().item(), decibels(alone, start).mean().item()

    up = grid(calls)
    noise = solve(field, demo.sidenet, start, up)
    plain = solve(field, demo.sidenet, noise, up.flip(0))
    rows = [row("bi-anchor, no residuals", noise, plain, plain)]
    step, half = single_anchor_increment(field, demo.sidenet), grid(calls // 2)
    y, z = coupled_forward(step, start, half)
    rows.append(row("coupled single-anchor", y, coupled_backward(step, y, z, half), coupled_backward(step, y, y, half)))
    y, z, v = heun_forward(field.velocity, start, up)
    alone = heun_backward(field.velocity, y, y, field.velocity(y, up[-1]), up)
    rows.append(row("reversible Heun", y, heun_backward(field.velocity, y, z, v, up), alone))
    return rows


if __name__ == "__main__":
    with torch.inference_mode():
        for cfg in (1.0, DEMO_CFG):
            for calls in (6, 10, 20):
                for name, error, back, alone in compare(calls, cfg):
                    print(f"CFG {cfg:g}, {calls:2} calls, {name:24}: {error:.4f}  {back:6.1f} dB  {alone:6.1f} dB")
