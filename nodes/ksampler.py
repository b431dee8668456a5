"""`ba_solver` in KSampler's list of samplers: the only file that changes anything in ComfyUI.

ComfyUI finds a sampler's function by its name in the k-diffusion module.
"""

from __future__ import annotations

import comfy.k_diffusion.sampling
import comfy.samplers

from .sampling.sampler import sample_ba_solver

NAME = "ba_solver"


def register() -> None:
    """Add the sampler's function, and its name once; the list stays the same object, with other packs' samplers."""
    setattr(comfy.k_diffusion.sampling, f"sample_{NAME}", sample_ba_solver)
    if NAME not in comfy.samplers.KSampler.SAMPLERS:
        comfy.samplers.KSampler.SAMPLERS.append(NAME)
