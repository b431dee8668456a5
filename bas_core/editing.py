"""Editing: an image's trajectory to noise, and a new trajectory beside it that ends in another image.

A solver that keeps the ODE integrates from data to noise (inversion) and back under another condition (arXiv
2601.21542, section on editing). The return differs from the image by the solver's error. Two parts make it exact,
whatever the solver:

1. A `SourceTrajectory` holds the states of the way to noise, the model's velocities there, and for every step back the
   *residual*: the trajectory's state less the state that the solver reaches from the trajectory's earlier one.
2. `edit` takes the same steps back under the target condition and adds the residuals. Under the source condition every
   state is then the trajectory's own.

The source trajectory is either the image's own ODE trajectory (`invert`) or the straight line from the image to one
noise (`straight_trajectory`). On the straight line, `edit` integrates the difference of the target's and the source's
velocity, which is inversion-free editing (FlowEdit, Kulikov et al. 2024) with this solver's steps. Cached residuals:
DirectEdit (arXiv 2605.02417). The pull toward the source: after RF-Inversion (Rout et al. 2024).

At t = 0, where the image is, a network's velocity means little. Inversion starts at a small time, the last of the grid
above 0, and the last step back, from there to 0, is the sampler's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as attribute

import torch
import torch.nn.functional as F
from torch import Tensor

from .flow import interpolate
from .grids import as_grid
from .guidance import Field
from .prediction import SideNetProtocol
from .schedule import StepHook, StepState
from .solver import Callback, Step, as_state, make_solver, run_bi_anchor

# The time at which an inversion starts; see `editing_grid`. At smaller times velocities mean less, at larger ones less
# of the image is inverted. Measured on the demo.
T_MIN = 0.05
# Distance between an edited state of unit scale and its source where they show different things; see `Control.fade`.
FADE = 0.3
# An inversion has diverged where a state is so many times larger than hypot((1 - t) rms of the image, t).
DIVERGED = 2.5


class DivergedError(ArithmeticError):
    """An inversion left the range in which states of a trajectory to noise lie."""


@dataclass(frozen=True)
class Control:
    """How an edit is held to its source.

    Attributes:
        eta: in [0, 1], how strongly each new state is pulled to the source trajectory's state at its time (0 = not at
            all, 1 = onto it), RF-Inversion's controller strength.
        window: (lo, hi), the flow times of the states that are pulled.
        fade: residuals hold the outlines of what the edit removes, so less of a residual is added where the edited
            state is far from the source: all of it at distance 0, none from this distance on (root-mean-square over
            the channels and neighbouring places). None adds residuals everywhere, as the straight trajectory of
            inversion-free editing needs; 0 nowhere.
    """

    eta: float = 0.0
    window: tuple[float, float] = (0.0, 1.0)
    fade: float | None = None

    def __post_init__(self) -> None:
        lo, hi = self.window
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1]; got {self.eta}. 0 = not at all, 1 = onto the source trajectory.")
        if self.fade is not None and not 0 <= self.fade < math.inf:
            raise ValueError(f"fade must be a distance from 0 on, or None; got {self.fade}.")
        if not 0 <= lo <= hi <= 1:
            raise ValueError(f"The window (lo, hi) must satisfy 0 <= lo <= hi <= 1; got {self.window}.")

    def eta_at(self, t: Tensor | float) -> float:
        """eta where t lies in the window, else 0."""
        lo, hi = self.window
        return self.eta if lo <= float(t) <= hi else 0.0

    def residual_weight(self, distance: Tensor) -> Tensor | float:
        """The share of the residual to add where the edited state is `distance` [B, C, *spatial] from the source's."""
        if self.fade is None:
            return 1.0
        if self.fade == 0:
            return 0.0
        size = mean_of_neighbours(distance.square().mean(1, keepdim=True)).sqrt()
        return (1 - size / self.fade).clamp_min(0)


def mean_of_neighbours(x: Tensor) -> Tensor:
    """The mean over each place of [B, 1, *spatial] and those next to it, also diagonally.

    One axis after another: a mean over a box is that of means, and not every device has `avg_pool3d`.
    """
    for axis in range(2, x.ndim):
        rows = x.movedim(axis, -1)
        means = F.avg_pool1d(rows.reshape(-1, 1, rows.shape[-1]), 3, 1, 1, count_include_pad=False)
        x = means.view(rows.shape).movedim(-1, axis)
    return x


NO_CONTROL = Control()


@dataclass(frozen=True)
class SourceTrajectory:
    """A trajectory from noise to an image, and the residuals with which a solver follows it.

    Attributes:
        times: [N + 1], descending to 0.
        states: N + 1 of [B, C, *spatial]; the last is the image.
        residuals: by (step, `StepState.accepted`): the trajectory's state less the solver's.
    """

    times: Tensor
    states: tuple[Tensor, ...]
    residuals: dict[tuple[int, bool], Tensor] = attribute(repr=False)

    @property
    def noise(self) -> Tensor:
        """[B, C, *spatial], the state at `times[0]`."""
        return self.states[0]

    @property
    def image(self) -> Tensor:
        """[B, C, *spatial], the state at t = 0."""
        return self.states[-1]


def editing_grid(times: Tensor, start: float = T_MIN) -> Tensor:
    """A sampling grid moved up to end at `start`, with a last interval from there to 0; for `invert` and `edit`.

    Args:
        times: [N] descending to 0, for N - 1 intervals.
        start: the small time at which inversions start.

    Returns:
        [N + 1] times for N intervals and N calls.

    Raises:
        ValueError: no grid that descends to 0, or a start that is not between 0 and its first time.
    """
    times = _as_descending(times)
    top = times[0]
    if not 0 < start < top:
        raise ValueError(f"start must lie between 0 and the grid's first time {float(top):.4g}; got {start}.")
    moved = start + (top - start) / top * times
    moved[0] = top
    return torch.cat([moved, times[-1:]])


def invert(
    field: Field,
    sidenet: SideNetProtocol | None,
    image: Tensor,
    times: Tensor,
    noise: Tensor | None = None,
    *,
    callback: Callback | None = None,
    chunk: int | None = None,
) -> SourceTrajectory:
    """Take an image to noise along its ODE, with the bi-anchor solver up the grid; N calls for N intervals.

    The trajectory's states are those where the model was called, so that the residuals cost no further calls.

    Args:
        field: the velocity under the source condition.
        sidenet: see `solve`.
        image: [B, C, *spatial], the state at t = 0.
        times: [N + 1] descending to 0, the grid of the way back; N > 1. The higher its first time, the more an edit
            may change; the inversion starts at the last time above 0 (see `editing_grid`).
        noise: of the image's shape; the inversion starts from (1 - t) image + t noise. An image without noise is no
            typical state of a trajectory, and its inverted noise is weaker than random noise. None = no noise.
        callback: sees every finished `Step` on the way up; may raise to stop.
        chunk: see `solve`.

    Raises:
        ValueError: an argument does not fit.
        NonFiniteError: the backbone or the SideNet returned NaN or infinity.
        DivergedError: the states grow beyond a trajectory to noise.
    """
    image = as_state(image)
    grid = _as_descending(times)
    up = grid.tolist()[-2::-1]
    if len(up) < 2:
        raise ValueError("An inversion needs a grid of at least 2 intervals, the last of which it does not invert.")
    start = image if noise is None else interpolate(image, _check_noise(noise, image), up[0])
    recorder = _Recorder(image, field, len(up) - 1)
    solver = make_solver(field, sidenet, hook=recorder, chunk=chunk)
    end = run_bi_anchor(solver, start, up, callback)
    recorder.call_model(field, len(up) - 1, end, up[-1], 1)
    states = [*recorder.states[::-1], image]
    return _source_trajectory(field, sidenet, grid, states, recorder.velocities[::-1], chunk)


def straight_trajectory(
    field: Field,
    sidenet: SideNetProtocol | None,
    image: Tensor,
    noise: Tensor,
    times: Tensor,
    *,
    callback: Callback | None = None,
    chunk: int | None = None,
) -> SourceTrajectory:
    """The straight line from an image to one noise as a source trajectory, for inversion-free editing; N calls.

    Args:
        field: the velocity under the source condition.
        sidenet: see `solve`.
        image: [B, C, *spatial], the state at t = 0.
        noise: of the image's shape, the state at t = 1.
        times: [N + 1] descending to 0.
        callback: sees every `Step` after the model calls; may raise to stop.
        chunk: see `solve`.

    Raises:
        ValueError, NonFiniteError: as `invert`.
    """
    image = as_state(image)
    noise = _check_noise(noise, image)
    grid = _as_descending(times)
    down = grid.tolist()
    states = [interpolate(image, noise, t) for t in down[:-1]]
    velocities, before = [], field.calls
    for index, (x, t) in enumerate(zip(states, down, strict=False)):
        velocities.append(field(x, t, _branches(field)))
        if callback is not None:
            guided = field.guidance.combine(velocities[-1], t)
            following = image if index == len(states) - 1 else states[index + 1]
            callback(Step(index, len(states), t, down[index + 1], x, guided, following, field.calls - before))
    return _source_trajectory(field, sidenet, grid, [*states, image], velocities, chunk)


def edit(
    field: Field,
    sidenet: SideNetProtocol | None,
    source: SourceTrajectory,
    control: Control = NO_CONTROL,
    mask: Tensor | None = None,
    *,
    callback: Callback | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Regenerate a source trajectory's image under another condition; N calls.

    With the trajectory's own field the result is the image itself, up to rounding.

    Args:
        field: the velocity under the target condition.
        sidenet: the one that the trajectory was made with.
        source: from `invert` or `straight_trajectory`.
        control: how the edit is held to its source.
        mask: broadcasts with [B, C, *spatial], in [0, 1]: 1 = edited, 0 = the image stays as it is, bit by
            bit. None = all of it is edited.
        callback: sees every finished `Step`; may raise to stop.
        chunk: see `solve`.

    Returns:
        [B, C, *spatial] the edited image.

    Raises:
        ValueError: the mask does not fit, or asks for nothing.
        NonFiniteError: the backbone or the SideNet returned NaN or infinity.
    """
    hook = _EditHook(source, control, None if mask is None else check_mask(mask, source.image))
    return run_bi_anchor(
        make_solver(field, sidenet, hook=hook, chunk=chunk), source.noise, source.times.tolist(), callback
    )


def reconstruct(
    field: Field,
    sidenet: SideNetProtocol | None,
    source: SourceTrajectory,
    *,
    callback: Callback | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Integrate from a trajectory's noise back to t = 0 without residuals, as plain inversion does; N calls.

    Args and errors as `edit`; `field` is the velocity under the source condition.
    """
    return run_bi_anchor(make_solver(field, sidenet, chunk=chunk), source.noise, source.times.tolist(), callback)


def check_mask(mask: Tensor, image: Tensor) -> Tensor:
    """The mask in the image's type and on its device.

    Raises:
        ValueError: not finite, outside [0, 1], of a shape that does not broadcast, or 0 everywhere.
    """
    try:
        torch.broadcast_to(mask, image.shape)
    except RuntimeError:
        raise ValueError(
            f"The mask must broadcast with the image {tuple(image.shape)}; got {tuple(mask.shape)}. Resize it."
        ) from None
    if not mask.isfinite().all() or mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"The mask must lie in [0, 1]; got {mask.min().item():.3g} to {mask.max().item():.3g}.")
    if not mask.any():
        raise ValueError("The mask is 0 everywhere, so nothing may change. Paint what is to be edited (1 = edited).")
    return mask.to(image)


# --- the steps ----------------------------------------------------------------------------------------------------


def _as_descending(times: Tensor) -> Tensor:
    """The grid in float32 or better.

    Raises:
        ValueError: it is no grid, or does not descend to 0.
    """
    grid = as_grid(times)
    if grid[-1] != 0:
        raise ValueError(f"An editing grid must descend to 0, the image, as a sampling grid does; got {grid.tolist()}.")
    return grid.to(torch.promote_types(grid.dtype, torch.float32))


def _check_noise(noise: Tensor, image: Tensor) -> Tensor:
    if noise.shape != image.shape:
        raise ValueError(f"noise must have the image's shape {tuple(image.shape)}; got {tuple(noise.shape)}.")
    return noise.to(image)


def _branches(field: Field) -> int:
    """How many branches a source trajectory keeps: all that any step may combine."""
    return 2 if field.guidance.scale != 1 else 1


class _Recorder(StepHook):
    """Records the states and velocities of an inversion's model calls; stops an inversion that diverges."""

    def __init__(self, image: Tensor, field: Field, steps: int) -> None:
        self.power = image.square().flatten(1).mean(1)
        self.scale, self.steps = field.scale, steps
        self.states: list[Tensor] = []
        self.velocities: list[Tensor] = []

    def call_model(self, field: Field, index: int, x: Tensor, t: float, branches: int) -> Tensor:
        v = field(x, t, _branches(field))
        self.states.append(x)
        self.velocities.append(v)
        return v[:branches]

    def adjust(self, state: StepState) -> Tensor:
        t = float(state.s)
        largest = (state.x.square().flatten(1).mean(1) / ((1 - t) ** 2 * self.power + t**2)).max().sqrt().item()
        if largest > DIVERGED:
            raise DivergedError(
                f"The inversion diverges: in step {state.index + 1} of {self.steps}, at t = {t:.3g}, the state is "
                f"{largest:.1f} times as large as on a trajectory to noise. Lower the source guidance, which is "
                f"{self.scale:g} (1 is the safest), or use more steps."
            )
        return state.x


class _FollowHook(StepHook):
    """Leads the solver through given states with given velocities, and records the residuals."""

    def __init__(self, states: Sequence[Tensor], velocities: Sequence[Tensor]) -> None:
        self.states, self.velocities = states, velocities
        self.residuals: dict[tuple[int, bool], Tensor] = {}

    def call_model(self, field: Field, index: int, x: Tensor, t: float, branches: int) -> Tensor:
        return self.velocities[index][:branches]

    def adjust(self, state: StepState) -> Tensor:
        target = self.states[state.index + 1]
        self.residuals[state.index, state.accepted] = target - state.x
        return target


class _EditHook(StepHook):
    """Adds the residuals, pulls to the source trajectory, and keeps what the mask keeps."""

    def __init__(self, source: SourceTrajectory, control: Control, mask: Tensor | None) -> None:
        self.source, self.control, self.mask = source, control, mask

    def adjust(self, state: StepState) -> Tensor:
        target = self.source.states[state.index + 1]
        residual = self.source.residuals[state.index, state.accepted]
        x = state.x + self.control.residual_weight(state.x + residual - target) * residual
        eta = self.control.eta_at(self.source.times[state.index + 1])
        if self.mask is not None:
            return torch.lerp(x, target, 1 - self.mask * (1 - eta))
        return torch.lerp(x, target, eta) if eta else x


def _source_trajectory(
    field: Field,
    sidenet: SideNetProtocol | None,
    times: Tensor,
    states: Sequence[Tensor],
    velocities: Sequence[Tensor],
    chunk: int | None,
) -> SourceTrajectory:
    """The trajectory through given states, with the residuals of a solver that is given the velocities there."""
    hook = _FollowHook(states, velocities)
    run_bi_anchor(make_solver(field, sidenet, hook=hook, chunk=chunk), states[0], times.tolist())
    return SourceTrajectory(times, tuple(states), hook.residuals)
