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
        ValueError: fewer than one interval, or no grid (see `check_grid`).
    """
    if intervals < 1:
        raise ValueError(f"intervals must be at least 1; got {intervals}.")
    known = check_grid(times)
    if len(known) == intervals + 1:
        return known
    position = torch.linspace(0, len(known) - 1, intervals + 1, dtype=torch.float64)
    left = position.floor().long().clamp(max=len(known) - 2)
    values = known.double()
    return torch.lerp(values[left], values[left + 1], position - left).to(times.dtype)


# The longest first interval, in mean intervals, whose call is saved (see `runs.FittedRun`). What the mean of the data
# does not say of the single image grows with its square: on the demo's uniform grids it would be most of the error,
# where the first step is .3 to .45 of the mean one it is hardly seen.
SHORT_START = 0.45


def starts_short(times: Sequence[float] | Tensor) -> bool:
    """Whether a grid leads from pure noise toward the data, in a first step so short that its call can be saved."""
    first, second, last = float(times[0]), float(times[1]), float(times[-1])
    return first == 1 and 0 < first - second <= SHORT_START * (first - last) / (len(times) - 1)


# How far the times of a run may be from a known grid's: sigmas are rounded on their way through other programs.
SAME_TIME = 1e-3


def same_grid(times: Sequence[float] | Tensor, known: Sequence[float] | Tensor) -> bool:
    """Whether a run's times are those of a known grid from 1; models that start below 1 shrink it."""
    return len(times) == len(known) and all(
        abs(float(a) - float(times[0]) * float(b)) <= SAME_TIME for a, b in zip(times, known, strict=True)
    )


def grid_of_calls(make: Callable[[int], Tensor], calls: int, skip_first: bool) -> Tensor:
    """The grid that spends a number of backbone calls, from `make`, which makes one of so many intervals.

    Args:
        make: intervals to a descending grid [intervals + 1].
        calls: at least 1.
        skip_first: the run may save its first call (see `runs.FittedRun`), which makes room for one more interval.
    """
    longer = make(calls + 1)
    return longer if skip_first and starts_short(longer) else make(calls)


def check_grid(times: Tensor) -> Tensor:
    """Return the grid on the CPU if it can be integrated over.

    Raises:
        ValueError: it is not 1-D, has fewer than two times, leaves [0, 1], or does not strictly descend or ascend.
    """
    if not isinstance(times, Tensor) or times.ndim != 1 or times.numel() < 2 or not times.is_floating_point():
        what = f"{times.dtype} of shape {tuple(times.shape)}" if isinstance(times, Tensor) else type(times).__name__
        raise ValueError(f"times must be a 1-D float tensor of at least two times; got {what}.")
    values = times.detach().cpu()
    if not values.isfinite().all() or values.min() < 0 or values.max() > 1:
        raise ValueError(f"times must lie in [0, 1], 1 = noise; got {values.tolist()}.")
    steps = values.diff()
    if not ((steps < 0).all() or (steps > 0).all()):
        raise ValueError(f"times must strictly descend (to sample) or ascend (to invert); got {values.tolist()}.")
    return times.cpu()
