"""How a sampling starts: from random noise, or from what already holds an image."""

from __future__ import annotations

from typing import Any

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


def not_random_noise(model: Any, extra_args: dict[str, Any], x: Tensor) -> str:
    """Why the start is not random noise from which any image may come; empty if it is.

    Args:
        model: ComfyUI's `KSamplerX0Inpaint`, or a function around it that passes on `inner_model` alone.
        extra_args: of the sampler.
        x: [B, C, *spatial] the noised state.
    """
    if extra_args.get("denoise_mask") is not None:
        return "an inpaint mask is set"
    for condition in model.inner_model.conds.get("positive", ()):
        if condition.get("control") is not None or not IMAGE_CONDITIONS.isdisjoint(condition.get("model_conds", ())):
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
