"""Time grids: 1-D tensors of N + 1 times for N intervals, descending to sample, ascending to invert."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def time_shift(t: Tensor, shift: float) -> Tensor:
    """The resolution shift of SD3 and FLUX, s t / (1 + (s - 1) t): s > 1 spends more steps near the noise.

    Raises:
        ValueError: shift is not positive.
    """
    if not shift > 0:
        raise ValueError(f"shift must be positive; got {shift}.")
    return shift * t / (1 + (shift - 1) * t)


def time_grid(intervals: int, shift: float = 1.0, cosine: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A descending grid from the family (time shift, cosine blend); the defaults give the paper's uniform grid.

    Args:
        intervals: N, the number of intervals and, for one-call solvers, of backbone calls.
        shift: see `time_shift`.
        cosine: 0 = as it is, 1 = half a cosine, which gathers times at both ends; -1 = the reverse, gathering
            them in the middle.
        dtype: of the result.

    Returns:
        [N + 1] times, 1 first and 0 last.

    Raises:
        ValueError: fewer than one interval, or parameters out of range.
    """
    if intervals < 1:
        raise ValueError(f"intervals must be at least 1; got {intervals}.")
    if not -1 <= cosine <= 1:
        raise ValueError(f"cosine must lie in [-1, 1]; got {cosine}.")
    if shift == 1 and not cosine:
        return torch.linspace(1, 0, intervals + 1, dtype=dtype)
    t = torch.linspace(1, 0, intervals + 1, dtype=torch.float64)
    t = time_shift((1 - cosine) * t + cosine * (1 - torch.cos(math.pi * t)) / 2, shift)
    t[0], t[-1] = 1, 0  # rounding must not move the ends
    return t.to(dtype)


def resample_grid(times: Tensor, intervals: int) -> Tensor:
    """A grid of the same shape with another number of intervals, by linear interpolation of time over step number.

    Args:
        times: [N + 1] grid.
        intervals: of the result.

    Returns:
        [intervals + 1] times in the dtype of `times`, with the same ends; `times` itself where N is `intervals`.

    Raises:
        ValueError: fewer than one interval, or no grid (see `as_grid`).
    """
    if intervals < 1:
        raise ValueError(f"intervals must be at least 1; got {intervals}.")
    known = as_grid(times)
    if len(known) == intervals + 1:
        return known
    return times_at(known, torch.linspace(0, len(known) - 1, intervals + 1, dtype=torch.float64)).to(times.dtype)


def grid_between(grid: Tensor, start: float, end: float = 0.0) -> Tensor:
    """The times of a grid from 1 to 0 over a part of the path, from exactly `start` to exactly `end`."""
    return (1 - grid) * end + grid * start


def times_at(times: Tensor, positions: Tensor) -> Tensor:
    """The times of a grid [N + 1] at positions from 0 (its first) to N (its last), float64, by linear interpolation."""
    left = positions.floor().long().clamp(max=len(times) - 2)
    values = times.double()
    return torch.lerp(values[left], values[left + 1], positions - left)


# The longest analytic first step (see `schedule.Schedule`), over the mean step. Its error grows with the square of its
# length: on the demo's uniform grids it is most of the whole error, at .3 to .45 of the mean step it is negligible.
LONGEST_ANALYTIC_STEP = 0.45


def has_short_first_step(times: Sequence[float] | Tensor) -> bool:
    """Whether times descend from pure noise with a first step that is short enough to be analytic."""
    first, second, last = float(times[0]), float(times[1]), float(times[-1])
    return first == 1 and 0 < first - second <= LONGEST_ANALYTIC_STEP * (first - last) / (len(times) - 1)


def grid_for_nfe(make: Callable[[int], Tensor], nfe: int, has_data_mean: bool) -> Tensor:
    """The grid that takes a number of model calls, from `make`, which makes one of so many steps.

    Args:
        make: steps to a descending grid [steps + 1].
        nfe: at least 1.
        has_data_mean: whether the SideNet can replace the first call, which leaves a call for one step more.
    """
    longer = make(nfe + 1)
    return longer if has_data_mean and has_short_first_step(longer) else make(nfe)


def as_grid(times: Tensor) -> Tensor:
    """The grid on the CPU, if a solver can integrate over it.

    Raises:
        ValueError: it is not 1-D, has fewer than two times, leaves [0, 1], or does not strictly descend or ascend.
    """
    if not isinstance(times, Tensor) or times.ndim != 1 or times.numel() < 2 or not times.is_floating_point():
        what = f"{times.dtype} of shape {tuple(times.shape)}" if isinstance(times, Tensor) else type(times).__name__
        raise ValueError(f"times must be a 1-D float tensor of at least two times; got {what}.")
    times = times.cpu()
    values = times.detach()
    if not values.isfinite().all() or values.min() < 0 or values.max() > 1:
        raise ValueError(f"times must lie in [0, 1], 1 = noise; got {values.tolist()}.")
    steps = values.diff()
    if not ((steps < 0).all() or (steps > 0).all()):
        raise ValueError(f"times must strictly descend (to sample) or ascend (to invert); got {values.tolist()}.")
    return times
