"""The velocity field that a solver integrates: a model's branches, classifier-free guidance (CFG), the CFG interval."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .flow import time_of_each

CFGMode = Literal["per_branch", "combined"]
CFG_MODES: tuple[CFGMode, ...] = ("per_branch", "combined")
Evaluate = Callable[[Tensor, Tensor, int], Tensor]


class NonFiniteError(ArithmeticError):
    """The backbone or the SideNet returned NaN or infinity."""


class FiniteCheck:
    """Whether what the networks return is finite.

    Each tensor's extremes are taken on the device, where NaN and infinity show in them. Reading them makes the host
    wait for the device; inside `gathering` that is left to `read`, for all that were seen since.

    Attributes:
        before_callbacks: whether a solver that gathers reads before every callback, not only at its end.
        place: the step, as (number, total, time), for messages; None outside of a solver.
    """

    def __init__(self) -> None:
        self.before_callbacks = True
        self.place: tuple[int, int, float] | None = None
        self._waits = True
        self._seen: list[tuple[Tensor, Tensor, Callable[[int], Exception], tuple[int, int, float] | None]] = []

    def see(self, values: Tensor, fault: Callable[[int], Exception], samples: int = 0) -> None:
        """Look at values [..., B, ...], with B at the dimension `samples`; `fault` makes an error of a number of bad
        samples."""
        values = values.detach()
        others = [i for i in range(values.ndim) if i != samples]
        self._seen.append((values.amax(others), values.amin(others), fault, self.place))
        if self._waits:
            self.read()

    def read(self) -> None:
        """Raise the error of the first tensor since the last reading that was not finite."""
        seen, self._seen = self._seen, []
        if not seen:
            return
        finite = torch.cat([extreme for highest, lowest, *_ in seen for extreme in (highest, lowest)]).isfinite().cpu()
        if finite.all():
            return
        for (highest, _, fault, place), flags in zip(seen, finite.split([2 * len(h) for h, *_ in seen]), strict=True):
            bad = int((~flags.view(2, len(highest)).all(0)).sum())
            if bad:
                error = fault(bad)
                where = "" if place is None else f"Step {place[0]} of {place[1]}, from t = {place[2]:.4g}: "
                raise type(error)(f"{where}{error}")

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Reading is left to the caller, and done at the end."""
        self._waits = False
        try:
            yield
            self.read()
        finally:
            self._waits, self._seen = True, []


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

    @property
    def constant(self) -> bool:
        """Whether guidance applies at all times or at none."""
        return self.scale == 1 or self.interval == WHOLE

    def active(self, t: Tensor | float) -> bool:
        """Whether guidance changes the velocity at time t."""
        if self.constant:
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


def just_inside(t: Tensor | float) -> float:
    """t, or the smallest time above 0 where t is 0.

    A CFG interval excludes its lower end (lo < t, as published), so a field with the interval (0, hi] would jump at
    t = 0, where some solvers evaluate it. Deciding guidance by this time makes the field continuous there.
    """
    return max(float(t), sys.float_info.min)


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
        calls: how often the model was called, in all samplings.
        conditional_only: how many of the calls left out the unconditional branch that guidance needs.
        finite: looks at what the networks return.
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
        self.finite = FiniteCheck()

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

    def with_evaluate(self, evaluate: Evaluate) -> Field:
        """The same field over another `evaluate`, such as one that looks on; it counts its own calls."""
        return Field(evaluate, self.conditions, self.cfg, combined=self.combined, scale=self.scale)

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
        call, samples = self.calls, len(x)
        v = self.evaluate(x, time_of_each(t, x), branches)
        if v.shape != (branches, *x.shape):
            raise ValueError(f"The backbone must return {(branches, *x.shape)}; got {tuple(v.shape)}.")

        def fault(bad: int) -> NonFiniteError:
            return NonFiniteError(
                f"The backbone returned NaN or infinity for {bad} of {samples} samples at call {call}, "
                f"t = {float(t):.4g}. Try float32 or bfloat16 weights, or a lower guidance scale."
            )

        self.finite.see(v, fault, samples=1)
        return v.to(x.dtype)

    def call_conditional(self, x: Tensor, t: Tensor | float) -> Tensor:
        """A conditional-only call: the conditional velocity [B, C, ...]."""
        self.conditional_only += 1
        return self.call_model(x, t, 1)[0]


def check_labels(labels: Tensor, highest: int) -> Tensor:
    """The same class indices, if none is below 0 or above the highest, which is the null class of most models.

    A GPU meets others in the midst of a model call, and is unusable from there until the program ends.

    Raises:
        ValueError: saying which are wrong.
    """
    wrong = sorted(set(labels[(labels < 0) | (labels > highest)].tolist()))
    if wrong:
        raise ValueError(f"Classes must be from 0 to {highest}; got {', '.join(map(str, wrong))}. Choose others.")
    return labels


def model_field(
    model: Callable[..., Tensor],
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    guidance: Guidance = NO_GUIDANCE,
    mode: CFGMode = "per_branch",
    null_class: int | None = None,
) -> Field:
    """A field over `model(x, t)` or, with a condition, `model(x, t, cond)`.

    Args:
        model: x [N, C, ...], t [N] and cond [N, ...] to the velocity [N, C, ...].
        cond, uncond: [B, ...] conditions of the two branches (class labels, null classes).
        guidance: with a scale other than 1, needs `uncond`.
        mode: "per_branch" leaves the branches to the solver (the paper: the SideNet predicts each, and they are
            combined at each quadrature node's own time); "combined" gives it the guided velocity.
        null_class: for conditions that are class indices, the highest that there is; see `check_labels`.

    Raises:
        ValueError: a class that the model has not, guidance without `uncond`, or an unknown mode.
    """
    if mode not in CFG_MODES:
        raise ValueError(f"mode must be one of {', '.join(CFG_MODES)}; got {mode!r}.")
    if guidance.scale != 1 and uncond is None:
        raise ValueError("guidance with a scale other than 1 needs uncond, the unconditional branch's condition.")
    if uncond is not None and cond is None:
        raise ValueError("uncond was given without cond; give both, or neither.")
    for labels in (cond, uncond):
        if null_class is not None and labels is not None:
            check_labels(labels, null_class)

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
