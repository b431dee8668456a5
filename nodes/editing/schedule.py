"""The times of an edit, the same each way."""

from __future__ import annotations

from typing import Any

from ...bas_core.editing import T_MIN, editing_grid
from ..models.attach import applied_sidenet
from ..models.parameterization import SigmaSchedule, flow_time, parameterization_of
from ..sampling.schedule import path_schedules, sigmas_for


def editing_schedule(model: Any, steps: int, denoise: float) -> SigmaSchedule:
    """The schedule [N + 1] of an edit, which is the same from the image to noise and back.

    Args:
        model: the MODEL; its SideNet's schedule is used if it has one.
        steps: N, at least 2. The last one is the step from the inversion's start to the image.
        denoise: in (0, 1]; 1 = up to pure noise.

    Raises:
        ValueError: the MODEL is neither a flow nor a diffusion model, its SideNet is for a part of the path, or denoise
            is too small for any step.
    """
    sampling = model.get_model_object("model_sampling")
    parameterization = parameterization_of(sampling)
    sidenet = applied_sidenet(model)
    if sidenet is not None:
        sidenet.card.check_whole_path(sidenet.name)
    sigmas = sigmas_for(sampling, steps - 1, denoise, path_schedules(model))
    # Diffusion models have a smallest noise level.
    start = max(T_MIN, flow_time(sampling, sampling.sigma_min))
    times = parameterization.times(sigmas.double())
    if times[0] <= start:
        raise ValueError(f"A denoise of {denoise:g} leaves nothing to edit. Set it higher; 0.6 to 1 is usual.")
    times = editing_grid(times, start).float()
    return SigmaSchedule(parameterization, parameterization.sigmas(times.double()).float(), times)
