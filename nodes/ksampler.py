"""`ba_solver` in the sampler list of KSampler: the only place that changes anything of ComfyUI's.

The list is appended to in place, never replaced, so that other packs' samplers stay; ComfyUI finds the function by its
name in k-diffusion's module.
"""

from __future__ import annotations

import comfy.k_diffusion.sampling
import comfy.samplers

from .sampling.sampler import sample_ba_solver

NAME = "ba_solver"


def register() -> None:
    """Add the sampler's name and function, once."""
    setattr(comfy.k_diffusion.sampling, f"sample_{NAME}", sample_ba_solver)
    if NAME not in comfy.samplers.KSampler.SAMPLERS:
        comfy.samplers.KSampler.SAMPLERS.append(NAME)
