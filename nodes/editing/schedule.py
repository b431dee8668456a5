"""The times of an edit, the same each way."""

from __future__ import annotations

from typing import Any

import torch

from ...bas_core.editing import START, editing_grid
from ..models.attach import applied_sidenet
from ..models.parameterization import SigmaSchedule, parameterization_of
from ..sampling.schedule import stretched_sigmas


def editing_schedule(model: Any, calls: int, strength: float) -> SigmaSchedule:
    """The sigmas of an edit: a number of calls each way, from as far up as the strength says.

    Args:
        model: the MODEL; its SideNet's grid is used where it has one.
        calls: N, at least 2; the last step, from the inversion's start to the image, is one of them.
        strength: in (0, 1]; 1 = up to pure noise, as `denoise` elsewhere.

    Raises:
        ValueError: the MODEL is neither a flow nor a diffusion model, or the strength is too small for any step.
    """
    sampling = model.get_model_object("model_sampling")
    path = parameterization_of(sampling)
    sidenet = applied_sidenet(model)
    sigmas = stretched_sigmas(sampling, calls - 1, strength, sidenet.card.runs if sidenet else {})
    # Diffusion models know no noise level below their smallest.
    lowest = float(path.times(torch.as_tensor(float(sampling.sigma_min), dtype=torch.float64)))
    start = max(START, lowest)
    times = path.times(sigmas.double())
    if times[0] <= start:
        raise ValueError(f"A strength of {strength:g} leaves nothing to edit. Set it higher; 0.6 to 1 is usual.")
    times = editing_grid(times, start).float()
    return SigmaSchedule(path, path.sigmas(times.double()).float(), times)
