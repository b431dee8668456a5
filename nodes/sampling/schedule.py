"""Sigmas for a number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ...bas_core.grids import grid_for_nfe, resample_grid
from ...bas_core.schedule import Schedule
from ..models.parameterization import parameterization_of


def sigmas_for(
    model_sampling: Any, steps: int, denoise: float, schedules: Mapping[int, Schedule], analytic_first: bool = False
) -> Tensor:
    """The SideNet's own sigmas of so many steps; else those of `stretched_sigmas`, which takes the same arguments."""
    if steps in schedules and denoise == 1:
        return _sigmas_of(model_sampling, torch.stack(schedules[steps].grid)).cpu()
    return stretched_sigmas(model_sampling, steps, denoise, schedules, analytic_first)


def stretched_sigmas(
    model_sampling: Any, steps: int, denoise: float, schedules: Mapping[int, Schedule], analytic_first: bool = False
) -> Tensor:
    """The last `steps` + 1 sigmas of a schedule long enough to start at the noise level that `denoise` asks for.

    Args:
        model_sampling: the MODEL's.
        steps: model calls.
        denoise: in (0, 1]; the whole schedule has steps / denoise steps, as in ComfyUI's own schedulers.
        schedules: the SideNet's, by number of model calls; may be empty.
        analytic_first: the SideNet may take a first step analytically; a whole schedule then has one sigma more.

    Raises:
        ValueError: the MODEL is neither a flow nor a diffusion model.
    """
    total = max(steps, int(steps / denoise))
    if not schedules:
        whole = comfy.samplers.calculate_sigmas(model_sampling, "simple", total)
    else:
        nearest = torch.stack(schedules[min(schedules, key=lambda known: abs(known - total))].grid)
        times = grid_for_nfe(lambda intervals: resample_grid(nearest, intervals), total, analytic_first)
        whole = _sigmas_of(model_sampling, times)
    return whole.cpu() if total == steps else whole[-(steps + 1) :].cpu()


def _sigmas_of(model_sampling: Any, times: Tensor) -> Tensor:
    """Sigmas of flow times, shrunk for diffusion models, which start below t = 1, at their largest sigma."""
    parameterization = parameterization_of(model_sampling)
    highest = torch.as_tensor(float(model_sampling.sigma_max), dtype=torch.float64)
    shrink = torch.clamp(parameterization.times(highest) / times[0], max=1.0)
    return parameterization.sigmas(times.double() * shrink).clamp(max=highest).float()
