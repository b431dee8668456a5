"""A SAMPLER for work that is not the usual sampling: inverting, editing, comparing and recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.samplers
from torch import Tensor


class Prepared(NamedTuple):
    """What ComfyUI hands to a sampler, with the MODEL loaded and the conditioning prepared.

    Attributes:
        model: ComfyUI's `KSamplerX0Inpaint`, as k-diffusion's samplers are given it; it holds `noise` and
            `latent_image`.
        extra_args: passed on to the model at each call, with the inpaint mask or None.
        callback: ComfyUI's preview, `(step, denoised, x, total)`, or None.
        disable: no progress bar.
    """

    model: Any
    extra_args: dict[str, Any]
    callback: Callable[..., None] | None
    disable: bool


class CallbackSampler(comfy.samplers.Sampler):
    """Calls a function in the place of sampling.

    ComfyUI's own samplers scale noise into the latent before they start and out of it when they end; on flow models
    the second divides by zero at sigma 1. This one does neither.

    Args:
        run: takes what is `Prepared`, and returns the guider's result, [B, C, *spatial] in the model's own space.
    """

    def __init__(self, run: Callable[[Prepared], Tensor]) -> None:
        self.run = run

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Called by ComfyUI's guiders; the arguments are theirs."""
        model = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        model.latent_image, model.noise = latent_image, noise
        return self.run(Prepared(model, {**extra_args, "denoise_mask": denoise_mask}, callback, disable_pbar))
