"""The velocity field that a solver integrates: its branches, classifier-free guidance and the CFG interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["branch", "guided"]
Evaluate = Callable[[Tensor, Tensor, int], Tensor]


class NonFiniteError(ArithmeticError):
    """The backbone or the SideNet returned NaN or infinity."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance v = v_u + scale (v_c - v_u) where lo < t <= hi, and v = v_c elsewhere.

    Attributes:
        scale: 1 = none. Below 1 the unconditional branch has a share too (the official sampler ignores such scales).
        interval: (lo, hi) in flow time; the paper samples SiT with (0, 0.7).
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        lo, hi = self.interval
        if not math.isfinite(self.scale):
            raise ValueError(f"The guidance scale must be finite; got {self.scale}.")
        if not 0 <= lo <= hi <= 1:
            raise ValueError(f"The CFG interval (lo, hi) must satisfy 0 <= lo <= hi <= 1; got {self.interval}.")

    def active(self, t: Tensor | float) -> bool:
        """Whether guidance changes the velocity at time t."""
        lo, hi = self.interval
        return self.scale != 1 and lo < float(t) <= hi

    def combine(self, branches: Tensor, t: Tensor | float) -> Tensor:
        """Branches [K, B, ...] (conditional first) to the velocity [B, ...] at time t."""
        conditional = branches[0]
        if not self.active(t):
            return conditional
        return torch.lerp(branches[1], conditional, self.scale)


NO_GUIDANCE = Guidance()


def just_inside(t: Tensor | float) -> Tensor:
    """t, or the smallest time above 0: what guidance is decided by where the whole field is wanted at t = 0.

    The interval's lower end is excluded (lo < t, as published), which would make a field guided with (0, 1] jump at
    t = 0, where some solvers evaluate it. The field's value there is its limit.
    """
    t = torch.as_tensor(t, dtype=torch.promote_types(torch.as_tensor(t).dtype, torch.float32))
    return t.clamp_min(torch.finfo(t.dtype).tiny)


class Field:
    """A velocity field with its branches; counts its calls (the NFE) and refuses what is not finite.

    Args:
        evaluate: `(x [B, C, ...], t [B], K) -> [K, B, C, ...]`, the first K branches in one backbone call.
        conditions: for each branch what the SideNet is told of it: a tensor of batch size B (class indices),
            or None.
        guidance: what the *solver* combines the branches with. A field that guides by itself ("guided" mode)
            has one branch and `NO_GUIDANCE`.
        scale: the CFG scale the field was guided with, for SideNets that take it as an input.
        branches: for a field that guides by itself, the same one in branches, if there is one.

    Attributes:
        calls: how often the field was called.
        halves: how many of these evaluated one branch where guidance has two (`half_calls`).
    """

    def __init__(
        self,
        evaluate: Evaluate,
        conditions: tuple[Tensor | None, ...] = (None,),
        guidance: Guidance = NO_GUIDANCE,
        scale: float = 1.0,
        branches: Field | None = None,
    ) -> None:
        if guidance.scale != 1 and len(conditions) < 2:
            raise ValueError("Guidance needs an unconditional branch; got the conditional one alone.")
        self.evaluate = evaluate
        self.conditions = conditions
        self.guidance = guidance
        self.scale = scale
        self.branches = branches
        self.calls = 0
        self.halves = 0

    @property
    def cost(self) -> float:
        """What the calls cost, in whole calls."""
        return self.calls - self.halves / 2

    @property
    def pair(self) -> Field | None:
        """The field in two branches that are guided at every time; None where there are none."""
        field = self.branches or self
        whole = field.guidance.scale != 1 and field.guidance.interval == NO_GUIDANCE.interval
        return field if whole and len(field.conditions) > 1 else None

    def __call__(self, x: Tensor, t: Tensor | float, branches: int = 1) -> Tensor:
        """The first `branches` branches at one time t for all samples: [K, B, C, ...], in x's dtype.

        Raises:
            NonFiniteError: the backbone returned NaN or infinity.
            ValueError: the backbone returned another shape.
        """
        self.calls += 1
        v = self.evaluate(x, torch.as_tensor(t, dtype=x.dtype).to(x.device).expand(x.shape[0]), branches)
        if v.shape != (branches, *x.shape):
            raise ValueError(f"The backbone must return {(branches, *x.shape)}; got {tuple(v.shape)}.")
        if not torch.isfinite(v).all():
            bad = int((~torch.isfinite(v)).flatten(2).any(-1).any(0).sum())
            raise NonFiniteError(
                f"The backbone returned NaN or infinity for {bad} of {x.shape[0]} samples at call {self.calls}, "
                f"t = {float(t):.4g}. Try float32 or bfloat16 weights, or a lower guidance scale."
            )
        return v.to(x.dtype)

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The guided velocity [B, C, ...]; the unconditional branch is evaluated only where guidance is active."""
        time = just_inside(t)
        return self.guidance.combine(self(x, t, 2 if self.guidance.active(time) else 1), time)


def combined(branches: Evaluate, guidance: Guidance) -> Evaluate:
    """Branches guided as one; the unconditional one is evaluated only where guidance is active."""

    def guided(x: Tensor, t: Tensor, count: int) -> Tensor:
        time = just_inside(t[0])
        return guidance.combine(branches(x, t, 2 if guidance.active(time) else 1), time)[None]

    return guided


def model_field(
    model: Callable[..., Tensor],
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    guidance: Guidance = NO_GUIDANCE,
    mode: Mode = "branch",
) -> Field:
    """A field over `model(x, t)` or, with a condition, `model(x, t, cond)`.

    Args:
        model: x [N, C, ...], t [N] and cond [N, ...] to the velocity [N, C, ...].
        cond, uncond: [B, ...] conditions of the two branches (class labels, null classes).
        guidance: with a scale other than 1, needs `uncond`.
        mode: "branch" leaves the branches to the solver (the paper: the SideNet predicts each, and they are
            combined at each quadrature node's own time); "guided" gives it the guided velocity.

    Raises:
        ValueError: guidance without `uncond`, or an unknown mode.
    """
    if mode not in ("branch", "guided"):
        raise ValueError(f"mode must be 'branch' or 'guided'; got {mode!r}.")
    if guidance.scale != 1 and uncond is None:
        raise ValueError("guidance with a scale other than 1 needs uncond, the unconditional branch's condition.")
    if uncond is not None and cond is None:
        raise ValueError("uncond was given without cond; give both, or neither.")

    def branches(x: Tensor, t: Tensor, count: int) -> Tensor:
        given = [c for c in (cond, uncond)[:count] if c is not None]
        if any(c.shape[0] != x.shape[0] for c in given):
            raise ValueError(f"Conditions must have x's batch size {x.shape[0]}; got {[c.shape[0] for c in given]}.")
        arguments = (torch.cat(given),) if given else ()
        v = model(torch.cat([x] * count), torch.cat([t] * count), *arguments)
        if v.shape != (count * x.shape[0], *x.shape[1:]):
            raise ValueError(f"The backbone must return {(count * x.shape[0], *x.shape[1:])}; got {tuple(v.shape)}.")
        return v.unflatten(0, (count, -1))

    both = Field(branches, (cond,) if uncond is None else (cond, uncond), guidance, guidance.scale)
    if mode == "branch":
        return both

    return Field(combined(branches, guidance), (cond,), NO_GUIDANCE, guidance.scale, both)
