"""The velocity field that a solver integrates: a model's branches, classifier-free guidance (CFG), the CFG interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CFGMode = Literal["per_branch", "combined"]
CFG_MODES: tuple[CFGMode, ...] = ("per_branch", "combined")
Evaluate = Callable[[Tensor, Tensor, int], Tensor]


class NonFiniteError(ArithmeticError):
    """The backbone or the SideNet returned NaN or infinity."""


WHOLE = (0.0, 1.0)
# Times in float32 differ from the edges that people write by less.
EDGE = 1e-6


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance v = v_u + scale (v_c - v_u) inside an interval of times, and v = v_c elsewhere.

    Attributes:
        scale: 1 = none. Below 1 the unconditional branch has a share too (the official sampler ignores such scales).
        interval: (lo, hi) in flow time. (0, 1) is all times, both ends included; another interval is lo < t <= hi, as
            published, with edges compared to `EDGE`. The paper samples SiT with (0, 0.7).
    """

    scale: float = 1.0
    interval: tuple[float, float] = WHOLE

    def __post_init__(self) -> None:
        lo, hi = (float(edge) for edge in self.interval)
        object.__setattr__(self, "interval", (lo, hi))
        if not math.isfinite(self.scale):
            raise ValueError(f"The guidance scale must be finite; got {self.scale}.")
        if not 0 <= lo <= hi <= 1:
            raise ValueError(f"The CFG interval (lo, hi) must satisfy 0 <= lo <= hi <= 1; got {self.interval}.")

    def active(self, t: Tensor | float) -> bool:
        """Whether guidance changes the velocity at time t."""
        if self.scale == 1 or self.interval == WHOLE:
            return self.scale != 1
        lo, hi = self.interval
        return lo + (EDGE if lo else 0) < float(t) <= hi + EDGE

    def combine(self, branches: Tensor, t: Tensor | float) -> Tensor:
        """Branches [K, B, ...] (conditional first) to the velocity [B, ...] at time t."""
        conditional = branches[0]
        if not self.active(t):
            return conditional
        return torch.lerp(branches[1], conditional, self.scale)


NO_GUIDANCE = Guidance()


def just_inside(t: Tensor | float) -> Tensor:
    """t, or the smallest time above 0 where t is 0.

    A CFG interval excludes its lower end (lo < t, as published), so a field with the interval (0, hi] would jump at
    t = 0, where some solvers evaluate it. Deciding guidance by this time makes the field continuous there.
    """
    t = torch.as_tensor(t, dtype=torch.promote_types(torch.as_tensor(t).dtype, torch.float32))
    return t.clamp_min(torch.finfo(t.dtype).tiny)


class Field:
    """A velocity field: a model's branches under classifier-free guidance (CFG). It counts its calls (the NFE).

    Args:
        evaluate: `(x [B, C, ...], t [B], K) -> [K, B, C, ...]`, the first K branches in one model call, the
            conditional one first.
        conditions: one for each branch, as a SideNet takes it: a tensor of batch size B (class indices), or None.
        guidance: how the branches are combined.
        combined: whether the field combines its branches (combined CFG) or leaves them to the solver, which combines
            them at each quadrature node's own time (per-branch CFG, the paper's).
        scale: the CFG scale for SideNets that take it as an input; None = the guidance's. Models that combine in a way
            of their own, or take the scale as an input, have one branch here and no guidance.

    Attributes:
        calls: how often the model was called.
        conditional_only: how many of the calls left out the unconditional branch that guidance needs.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        conditions: tuple[Tensor | None, ...] = (None,),
        guidance: Guidance = NO_GUIDANCE,
        *,
        combined: bool = False,
        scale: float | None = None,
    ) -> None:
        if guidance.scale != 1 and len(conditions) < 2:
            raise ValueError("Guidance needs an unconditional branch; got the conditional one alone.")
        self.evaluate = evaluate
        self.conditions = conditions
        self.cfg = guidance
        self.combined = combined
        self.scale = guidance.scale if scale is None else scale
        self.calls = 0
        self.conditional_only = 0

    @property
    def nfe(self) -> float:
        """Function evaluations so far; a conditional-only call counts one half."""
        return self.calls - self.conditional_only / 2

    @property
    def guidance(self) -> Guidance:
        """The guidance that is left to the solver."""
        return NO_GUIDANCE if self.combined else self.cfg

    @property
    def can_omit_unconditional(self) -> bool:
        """Whether a call can leave out the unconditional branch: CFG of two branches, at all times."""
        return self.cfg.scale != 1 and self.cfg.interval == WHOLE

    def __call__(self, x: Tensor, t: Tensor | float, branches: int = 1) -> Tensor:
        """The velocity at one time t for all samples, as the solver takes it.

        Args:
            x: [B, C, ...] state.
            t: 0-d time.
            branches: K, how many branches to return; a combined field returns its one velocity.

        Returns:
            [K, B, C, ...] in x's dtype.

        Raises:
            NonFiniteError: the model returned NaN or infinity.
            ValueError: the model returned another shape.
        """
        if not self.combined:
            return self.call_model(x, t, branches)
        time = just_inside(t)
        return self.cfg.combine(self.call_model(x, t, 2 if self.cfg.active(time) else 1), time)[None]

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The guided velocity [B, C, ...]; the unconditional branch is evaluated only where guidance is active."""
        time = just_inside(t)
        return self.guidance.combine(self(x, t, 2 if self.guidance.active(time) else 1), time)

    def call_model(self, x: Tensor, t: Tensor | float, branches: int) -> Tensor:
        """One model call: its first `branches` branches [K, B, C, ...], whether the field combines them or not.

        Raises:
            NonFiniteError, ValueError: see `__call__`.
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

    def call_conditional(self, x: Tensor, t: Tensor | float) -> Tensor:
        """A conditional-only call: the conditional velocity [B, C, ...]."""
        self.conditional_only += 1
        return self.call_model(x, t, 1)[0]


def model_field(
    model: Callable[..., Tensor],
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    guidance: Guidance = NO_GUIDANCE,
    mode: CFGMode = "per_branch",
) -> Field:
    """A field over `model(x, t)` or, with a condition, `model(x, t, cond)`.

    Args:
        model: x [N, C, ...], t [N] and cond [N, ...] to the velocity [N, C, ...].
        cond, uncond: [B, ...] conditions of the two branches (class labels, null classes).
        guidance: with a scale other than 1, needs `uncond`.
        mode: "per_branch" leaves the branches to the solver (the paper: the SideNet predicts each, and they are
            combined at each quadrature node's own time); "combined" gives it the guided velocity.

    Raises:
        ValueError: guidance without `uncond`, or an unknown mode.
    """
    if mode not in CFG_MODES:
        raise ValueError(f"mode must be one of {', '.join(CFG_MODES)}; got {mode!r}.")
    if guidance.scale != 1 and uncond is None:
        raise ValueError("guidance with a scale other than 1 needs uncond, the unconditional branch's condition.")
    if uncond is not None and cond is None:
        raise ValueError("uncond was given without cond; give both, or neither.")

    def branches(x: Tensor, t: Tensor, count: int) -> Tensor:
        conditions = [c for c in (cond, uncond)[:count] if c is not None]
        if any(c.shape[0] != x.shape[0] for c in conditions):
            sizes = [c.shape[0] for c in conditions]
            raise ValueError(f"Conditions must have x's batch size {x.shape[0]}; got {sizes}.")
        arguments = (torch.cat(conditions),) if conditions else ()
        v = model(torch.cat([x] * count), torch.cat([t] * count), *arguments)
        if v.shape != (count * x.shape[0], *x.shape[1:]):
            raise ValueError(f"The backbone must return {(count * x.shape[0], *x.shape[1:])}; got {tuple(v.shape)}.")
        return v.unflatten(0, (count, -1))

    return Field(branches, (cond,) if uncond is None else (cond, uncond), guidance, combined=mode == "combined")
