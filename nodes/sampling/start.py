"""How a sampling starts: from random noise, or from what already holds an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import comfy.sample
import torch
from torch import Tensor

# What ComfyUI's models are given beside the prompt (`extra_conds` in comfy/model_base.py) that shows an image or video.
IMAGE_CONDITIONS = {
    "c_concat", "concat_latent_image", "ref_latents", "ref_latent", "reference_latent", "reference_motion",
    "ref_contexts", "clip_fea", "clip_fea_ref", "clip_fea_pose", "clip_img", "image_cond", "pose_latents",
    "face_pixel_values", "vace_context", "control_video", "context_latents", "context_pose",
    "camera_conditions", "keyframe_idxs", "time_dim_concat", "time_dim_replace", "generated_keyframes",
    "denoise_mask", "siglip_feats", "lq_latent", "effnet", "sam_latents", "condition",
}  # fmt: skip
# Neighbouring values of random noise are not alike; their correlation is below this many standard deviations.
SPREADS = 6.0


class Latent(NamedTuple):
    """What a LATENT tells a sampling, as KSampler takes it.

    Attributes:
        samples: [B, C, *spatial].
        mask: its noise mask, 1 = drawn; ComfyUI resizes it, and some models (LTX-2, Wan 2.2) are told of it.
        batch_index: which noises of a seed its samples have; None = the first ones.
    """

    samples: Tensor
    mask: Tensor | None = None
    batch_index: Sequence[int] | None = None

    def noise(self, seed: int) -> Tensor:
        """KSampler's noise of a seed, [B, C, *spatial]."""
        index = self.batch_index
        index = index if index is not None and len(index) == len(self.samples) else None
        return comfy.sample.prepare_noise(self.samples, seed, index)


def noised(model_sampling: Any, sigma: Tensor, noise: Tensor, image: Tensor, top: bool) -> Tensor:
    """The state [B, C, *spatial] in which ComfyUI's samplers start from noise and image; `top`: at the top sigma."""
    state: Tensor = model_sampling.noise_scaling(sigma.reshape(1).to(noise), noise.clone(), image.to(noise), top)
    return state


def noise_in(model_sampling: Any, sigma: Tensor, state: Tensor, image: Tensor, top: bool) -> Tensor:
    """The noise [B, C, *spatial] from which `noised` makes a state."""
    zeros = torch.zeros_like(state)
    factor = noised(model_sampling, sigma, torch.ones_like(state), zeros, top)
    return (state - noised(model_sampling, sigma, zeros, image, top)) / factor


def holds_image(conditions: Sequence[dict[str, Any]]) -> bool:
    """Whether conditions of one side, prepared by ComfyUI, show an image or video to the model."""
    return any(
        condition.get("control") is not None or not IMAGE_CONDITIONS.isdisjoint(condition.get("model_conds", ()))
        for condition in conditions
    )


def not_random_noise(model: Any, extra_args: dict[str, Any], x: Tensor) -> str:
    """Why the start is not random noise from which any image may come; empty if it is.

    Args:
        model: ComfyUI's `KSamplerX0Inpaint`, or a function around it that passes on `inner_model` alone.
        extra_args: of the sampler.
        x: [B, C, *spatial] the noised state.
    """
    if extra_args.get("denoise_mask") is not None:
        return "an inpaint mask is set"
    if holds_image(model.inner_model.conds.get("positive", ())):
        return "the conditioning holds an image"
    noise = getattr(model, "noise", None)
    if noise is not None and not bool((noise != 0).flatten(1).any(1).all()):
        return "no noise was added"
    return "" if is_white(x) else "the noise is not random"


def is_white(x: Tensor) -> bool:
    """Whether neighbours of [B, C, *spatial] along each spatial axis are uncorrelated, in every sample."""
    x = x.float()
    for axis in range(2, x.ndim):
        size = x.shape[axis]
        if size < 2:
            continue
        products = x.narrow(axis, 0, size - 1) * x.narrow(axis, 1, size - 1)
        correlation = products.flatten(1).mean(1) / x.square().flatten(1).mean(1).clamp_min(1e-12)
        if bool((correlation.abs() > SPREADS / products[0].numel() ** 0.5).any()):
            return False
    return bool(torch.isfinite(x).all())
