"""Editing: an image's path to noise, and a new path beside it that ends in another image.

A solver that keeps the ODE can be run from data to noise (inversion) and back under another condition (arXiv
2601.21542, section on editing). What comes back differs from the image by the solver's error. Two steps make the
return exact, whatever the solver:

1. A `SourcePath` holds the states of the way to noise, the backbone's velocities there, and for every step back the
   *residual*: the path's state less the one that the solver proposes from the path's own earlier state.
2. `edit` takes the same steps back under the target condition and adds the residuals. Under the source condition
   every state is then the path's own.

The source path may be the image's own ODE path (`invert`), or the straight line from the image to one noise
(`straight_path`). On the straight line, `edit` integrates the difference of the target's and the source's velocity,
which is inversion-free editing (FlowEdit, Kulikov et al. 2024) with this solver's steps. Residuals that are cached and
added back: DirectEdit (arXiv 2605.02417). The pull toward the source: after RF-Inversion (Rout et al. 2024).

An image lies at t = 0, where a network's velocity means little. Inversion leaves it at a small time, the last of the
grid above 0, and the last step back, from there to 0, is the sampler's own.
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
from .grids import check_grid
from .guidance import Field
from .solver import Callback, Step, check_state, make_plan, run_bi_anchor
from .steps import Correct, Predictor, Proposal

# Where an inversion leaves the image; see `editing_grid`. Smaller, and velocities mean less; larger, and less of the
# image is inverted. Both measured on the demo.
START = 0.05
# How far an edited state of unit scale is from its source where the two no longer show the same; see `Control.fade`.
FADE = 0.3
# A state's root-mean-square is about hypot((1 - t) rms of the image, t). Inversions that go wrong pass any bound.
DIVERGED = 2.5


class DivergedError(ArithmeticError):
    """An inversion left the range in which states of a path to noise lie."""


@dataclass(frozen=True)
class Control:
    """What holds an edit to its source.

    Attributes:
        eta: in [0, 1], how far each new state is pulled to the source path's state at its time (0 = not at all,
            1 = onto it), as RF-Inversion's controller strength.
        window: (lo, hi), the flow times of the states that are pulled.
        fade: where the edited state has left the source path's by this much (root-mean-square over the channels and
            the neighbouring places), none of the residual is added back, and less the nearer it is to that: residuals
            hold the outlines of what the edit takes away. None adds them back everywhere, as the straight path of
            inversion-free editing needs; 0 nowhere.
    """

    eta: float = 0.0
    window: tuple[float, float] = (0.0, 1.0)
    fade: float | None = None

    def __post_init__(self) -> None:
        lo, hi = self.window
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1]; got {self.eta}. 0 = not at all, 1 = onto the source path.")
        if self.fade is not None and not 0 <= self.fade < math.inf:
            raise ValueError(f"fade must be a distance from 0 on, or None; got {self.fade}.")
        if not 0 <= lo <= hi <= 1:
            raise ValueError(f"The window (lo, hi) must satisfy 0 <= lo <= hi <= 1; got {self.window}.")

    def pull(self, t: Tensor | float) -> float:
        """eta where t lies in the window, else 0."""
        lo, hi = self.window
        return self.eta if lo <= float(t) <= hi else 0.0

    def share(self, left: Tensor) -> Tensor | float:
        """How much of the residual is added where the state is `left` [B, C, *spatial] away from the path's."""
        if self.fade is None:
            return 1.0
        if self.fade == 0:
            return 0.0
        pool = F.avg_pool2d if left.ndim == 4 else F.avg_pool3d
        distance = pool(left.square().mean(1, keepdim=True), 3, 1, 1, count_include_pad=False).sqrt()
        return (1 - distance / self.fade).clamp_min(0)


FREE = Control()


@dataclass(frozen=True)
class SourcePath:
    """A path from noise to an image, and what a solver has to be told to follow it.

    Attributes:
        times: [N + 1], descending to 0.
        states: N + 1 of [B, C, *spatial]; the last is the image.
        residuals: for (step, whether it is the accepted end or the provisional one): the state less what the solver
            proposes for it.
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


def editing_grid(times: Tensor, start: float = START) -> Tensor:
    """A sampling grid moved up to end at `start`, with a last interval from there to 0; for `invert` and `edit`.

    Args:
        times: [N] descending to 0, for N - 1 intervals.
        start: the small time at which inversions leave the image.

    Returns:
        [N + 1] times for N intervals and N calls.

    Raises:
        ValueError: no grid that descends to 0, or a start that is not between 0 and its first time.
    """
    times = _check_downward(times)
    top = times[0]
    if not 0 < start < top:
        raise ValueError(f"start must lie between 0 and the grid's first time {float(top):.4g}; got {start}.")
    moved = start + (top - start) / top * times
    moved[0] = top
    return torch.cat([moved, times[-1:]])


def invert(
    field: Field,
    sidenet: Predictor | None,
    image: Tensor,
    times: Tensor,
    noise: Tensor | None = None,
    *,
    callback: Callback | None = None,
    chunk: int | None = None,
) -> SourcePath:
    """Take an image to noise along its ODE, with the bi-anchor solver up the grid; N calls for N intervals.

    The path's states are those at which the backbone was called, so that its velocities there are known and the
    residuals cost no further calls.

    Args:
        field: the velocity under the source condition.
        sidenet: see `solve`.
        image: [B, C, *spatial], the state at t = 0.
        times: [N + 1] descending to 0, the grid of the way back; N > 1. The higher its first time, the more an edit
            may change; the last above 0 is where the image is left (see `editing_grid`).
        noise: of the image's shape: what the image is mixed with where it is left, (1 - t) image + t noise. An image
            without any is no typical state of a path, and the noise that it is taken to is weaker than any sample.
            None leaves the image as it is.
        callback: sees every finished `Step` on the way up; may raise to stop.
        chunk: see `solve`.

    Raises:
        ValueError: an argument does not fit.
        NonFiniteError: the backbone or the SideNet returned NaN or infinity.
        DivergedError: the states grow beyond what a path to noise holds.
    """
    image = check_state(image)
    down = tuple(_check_downward(times))
    up = down[-2::-1]
    if len(up) < 2:
        raise ValueError("An inversion needs a grid of at least 2 intervals, the last of which it does not invert.")
    start = image if noise is None else interpolate(image, _check_noise(noise, image), up[0])
    states: list[Tensor] = []
    velocities: list[Tensor] = []

    def noted(x: Tensor, t: Tensor, count: int) -> Tensor:
        v = field(x, t[0], _branches(field))
        states.append(x)
        velocities.append(v)
        return v[:count]

    recorder = Field(noted, field.conditions, field.guidance, field.scale)
    plan = make_plan(recorder, sidenet, chunk=chunk)
    end = run_bi_anchor(plan, start, up, _divergence_watch(field, image, up), callback)
    recorder(end, up[-1])
    return _source_path(field, sidenet, down, [*states[::-1], image], velocities[::-1], chunk)


def straight_path(
    field: Field,
    sidenet: Predictor | None,
    image: Tensor,
    noise: Tensor,
    times: Tensor,
    *,
    callback: Callback | None = None,
    chunk: int | None = None,
) -> SourcePath:
    """The straight line from an image to one noise as a source path, for inversion-free editing; N calls.

    Args:
        field: the velocity under the source condition.
        sidenet: see `solve`.
        image: [B, C, *spatial], the state at t = 0.
        noise: of the image's shape, the state at t = 1.
        times: [N + 1] descending to 0.
        callback: sees every `Step` after the path's calls; may raise to stop.
        chunk: see `solve`.

    Raises:
        ValueError, NonFiniteError: as `invert`.
    """
    image = check_state(image)
    noise = _check_noise(noise, image)
    down = tuple(_check_downward(times))
    states = [interpolate(image, noise, t) for t in down[:-1]]
    velocities = []
    for index, (x, t) in enumerate(zip(states, down, strict=False)):
        velocities.append(field(x, t, _branches(field)))
        if callback is not None:
            guided = field.guidance.combine(velocities[-1], t)
            following = image if index == len(states) - 1 else states[index + 1]
            callback(Step(index, len(states), float(t), float(down[index + 1]), x, guided, following, field.calls))
    return _source_path(field, sidenet, down, [*states, image], velocities, chunk)


def edit(
    field: Field,
    sidenet: Predictor | None,
    source: SourcePath,
    control: Control = FREE,
    mask: Tensor | None = None,
    *,
    callback: Callback | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Regenerate a source path's image under another condition; N calls.

    With the path's own field the result is the image itself, up to rounding.

    Args:
        field: the velocity under the target condition.
        sidenet: the one that the path was made with.
        source: from `invert` or `straight_path`.
        control: what holds the edit to its source.
        mask: broadcasts with [B, C, *spatial], in [0, 1]: 1 = edited, 0 = the source path is replayed, and the image
            stays as it is bit by bit. None = all of it is edited.
        callback: sees every finished `Step`; may raise to stop.
        chunk: see `solve`.

    Returns:
        [B, C, *spatial] the edited image.

    Raises:
        ValueError: the mask does not fit, or asks for nothing.
        NonFiniteError: the backbone or the SideNet returned NaN or infinity.
    """
    if mask is not None:
        mask = check_mask(mask, source.image)

    def steer(proposal: Proposal) -> Tensor:
        there = source.states[proposal.index + 1]
        residual = source.residuals[proposal.index, proposal.accepted]
        x = proposal.x + control.share(proposal.x + residual - there) * residual
        keep = control.pull(source.times[proposal.index + 1])
        if mask is not None:
            return torch.lerp(x, there, 1 - mask * (1 - keep))
        return torch.lerp(x, there, keep) if keep else x

    return run_bi_anchor(make_plan(field, sidenet, chunk=chunk), source.noise, tuple(source.times), steer, callback)


def reconstruct(
    field: Field,
    sidenet: Predictor | None,
    source: SourcePath,
    *,
    callback: Callback | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Integrate from a path's noise back to t = 0 without its residuals: what inversion alone gives; N calls.

    Args and errors as `edit`; `field` is the velocity under the source condition.
    """
    plan = make_plan(field, sidenet, chunk=chunk)
    return run_bi_anchor(plan, source.noise, tuple(source.times), callback=callback)


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


def _check_downward(times: Tensor) -> Tensor:
    """The grid in float32 or better.

    Raises:
        ValueError: it is no grid, or does not descend to 0.
    """
    grid = check_grid(times)
    if grid[-1] != 0:
        raise ValueError(f"An editing grid must descend to 0, the image, as a sampling grid does; got {grid.tolist()}.")
    return grid.to(torch.promote_types(grid.dtype, torch.float32))


def _check_noise(noise: Tensor, image: Tensor) -> Tensor:
    if noise.shape != image.shape:
        raise ValueError(f"noise must have the image's shape {tuple(image.shape)}; got {tuple(noise.shape)}.")
    return noise.to(image)


def _divergence_watch(field: Field, image: Tensor, up: Sequence[Tensor]) -> Correct:
    """Changes nothing; stops an inversion whose states have grown too large."""
    power = image.square().flatten(1).mean(1)

    def watch(proposal: Proposal) -> Tensor:
        t = float(proposal.t1)
        largest = (proposal.x.square().flatten(1).mean(1) / ((1 - t) ** 2 * power + t**2)).max().sqrt().item()
        if largest > DIVERGED:
            raise DivergedError(
                f"The inversion diverges: in step {proposal.index + 1} of {len(up) - 1}, at t = {t:.3g}, the state is "
                f"{largest:.1f} times as large as on a path to noise. Lower the source guidance, which is "
                f"{field.scale:g} (1 is the safest), or use more calls."
            )
        return proposal.x

    return watch


def _branches(field: Field) -> int:
    """How many branches a source path keeps: all that any step may combine."""
    return 2 if field.guidance.scale != 1 else 1


def _source_path(
    field: Field,
    sidenet: Predictor | None,
    grid: Sequence[Tensor],
    states: Sequence[Tensor],
    velocities: Sequence[Tensor],
    chunk: int | None,
) -> SourcePath:
    """The path through given states, with the residuals of a solver that is told the velocities there."""
    told = iter(velocities)
    table = Field(lambda x, t, count: next(told)[:count], field.conditions, field.guidance, field.scale)
    residuals: dict[tuple[int, bool], Tensor] = {}

    def follow(proposal: Proposal) -> Tensor:
        there = states[proposal.index + 1]
        residuals[proposal.index, proposal.accepted] = there - proposal.x
        return there

    run_bi_anchor(make_plan(table, sidenet, chunk=chunk), states[0], grid, follow)
    return SourcePath(torch.stack(list(grid)), tuple(states), residuals)
