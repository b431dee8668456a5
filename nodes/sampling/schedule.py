"""Sigmas for a number of backbone calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ...bas_core.grids import grid_for_nfe, resample_grid
from ...bas_core.schedule import Schedule
from ..models.paths import path_of

GRIDS = ("auto", "model")


def sigmas_for(
    model_sampling: Any, calls: int, denoise: float, runs: Mapping[int, Schedule], has_data_mean: bool = False
) -> Tensor:
    """The SideNet's own times for a whole run of so many calls, and else `stretched_sigmas`, which takes the same
    arguments."""
    if calls in runs and denoise == 1:
        return _on_path(model_sampling, torch.stack(runs[calls].grid)).cpu()
    return stretched_sigmas(model_sampling, calls, denoise, runs, has_data_mean)


def stretched_sigmas(
    model_sampling: Any, calls: int, denoise: float, runs: Mapping[int, Schedule], has_data_mean: bool = False
) -> Tensor:
    """The last `calls` + 1 sigmas of a grid long enough to start at the noise level that `denoise` asks for.

    Args:
        model_sampling: the MODEL's.
        calls: of the backbone.
        denoise: in (0, 1]; the whole grid has calls / denoise steps, as in ComfyUI's own schedulers.
        runs: the SideNet's fitted runs by number of calls; may be empty.
        has_data_mean: the SideNet may save the call at t = 1; a whole run then has one sigma more.

    Raises:
        ValueError: the MODEL is neither a flow nor a diffusion model.
    """
    total = max(calls, int(calls / denoise))
    if not runs:
        whole = comfy.samplers.calculate_sigmas(model_sampling, "simple", total)
    else:
        nearest = torch.stack(runs[min(runs, key=lambda known: abs(known - total))].grid)
        times = grid_for_nfe(lambda intervals: resample_grid(nearest, intervals), total, has_data_mean)
        whole = _on_path(model_sampling, times)
    return whole.cpu() if total == calls else whole[-(calls + 1) :].cpu()


def _on_path(model_sampling: Any, times: Tensor) -> Tensor:
    """Sigmas of flow times. Diffusion models start below t = 1, at their largest sigma: the grid is shrunk to that."""
    path = path_of(model_sampling)
    highest = torch.as_tensor(float(model_sampling.sigma_max), dtype=torch.float64)
    shrink = torch.clamp(path.times(highest) / times[0], max=1.0)
    return path.sigmas(times.double() * shrink).clamp(max=highest).float()
