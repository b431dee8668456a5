"""Fitted step weights: what velocities at earlier anchors add to a step of the bi-anchor solver on one time grid.

A linear multistep method weights all velocities so far; the bi-anchor step knows two, and what the SideNet makes of
them. On a fixed grid both fit together: to what the solver proposes, each step adds a few differences that would be
zero if the velocity did not change, with weights found by least squares on recorded runs (`training.runs.fitting`).
So the weights correct the SideNet's mean bias too, such as too long an extrapolation. All weights zero is the
published solver, and a straight path stays exact with any weights: where an inpaint mask keeps the image, they do
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .steps import Proposal


def terms(proposal: Proposal) -> list[Tensor]:
    """What a step may add to the state that is proposed: [B, C, *spatial] each, zero where the velocity is constant.

    With v_i the velocity at the step's start, d its signed length and p = x_i + d v_i the end of a straight path:
    proposed - p; provisional - p once the right anchor is known; d (v_j - v_i) for every other anchor j.
    """
    now = proposal.velocities[proposal.index]
    length = (proposal.t1 - proposal.t0).to(now.dtype)
    straight = proposal.start + length * now
    ends = [proposal.x - straight]
    if proposal.provisional is not None:
        ends.append(proposal.provisional - straight)
    return ends + [length * (v - now) for j, v in enumerate(proposal.velocities) if j != proposal.index]


def row_of(proposal: Proposal) -> int:
    """Which row of weights a proposal takes: every step but the last has one for its provisional end and one after."""
    return 2 * proposal.index + (proposal.provisional is not None)


def row_length(row: int) -> int:
    """How many terms row number `row` has."""
    index, refined = divmod(row, 2)
    return 1 + index + 2 * refined


def plain_numbers(row: Sequence[float] | Tensor) -> list[float]:
    """A row of weights as numbers, whatever they are kept as."""
    return row.tolist() if isinstance(row, Tensor) else list(row)


def check_step_weights(rows: Sequence[Sequence[float] | Tensor], intervals: int) -> None:
    """Refuse rows that do not fit a run of so many intervals.

    Raises:
        ValueError: there are too few or too many numbers, or one is not finite.
    """
    wanted, lengths = [row_length(row) for row in range(2 * intervals - 1)], [len(row) for row in rows]
    if lengths != wanted:
        raise ValueError(f"Step weights for {intervals} intervals come in rows of {wanted} numbers; got {lengths}.")
    if not all(math.isfinite(weight) for row in rows for weight in plain_numbers(row)):
        raise ValueError("Step weights must be finite.")


def add_terms(x: Tensor, found: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """x + sum of weight times term."""
    for weight, term in zip(weights, found, strict=True):
        x = x + weight * term
    return x
