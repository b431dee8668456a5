"""The SideNet of a sampling: found on the MODEL, checked, with its strength, and within the memory that is free."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...bas_core.prediction import SideNetProtocol
from ...bas_core.strength import WeightedSideNet, with_strength
from ..models.attach import LoadedSideNet
from ..models.attention import ComfyAttention, attention_bytes
from .guider import cfg_of, distilled_guidance, known_guidance
from .model_caller import ModelCaller


def guidance_warnings(sidenet: LoadedSideNet, guider: Any) -> list[str]:
    """Where the guidance is none that the SideNet was made for.

    For a guidance-distilled model (FLUX.1-dev) a SideNet is made without CFG.
    """
    distilled, scale = distilled_guidance(guider) is not None, known_guidance(guider)
    found = []
    if scale is not None and not sidenet.card.supports_cfg(scale):
        found.append(("guidance" if distilled else "CFG", sidenet.card.describe_cfg(), scale))
    if distilled and cfg_of(guider) != 1:
        found.append(("CFG", "1", cfg_of(guider)))
    return [
        f"the SideNet {sidenet.name!r} was made for {kind} {scales}; at {scale:g} it is less accurate."
        for kind, scales, scale in found
    ]


def check_latent(sidenet: LoadedSideNet, x: Tensor) -> None:
    """Refuse latents that the SideNet cannot take, before the first backbone call.

    Raises:
        ValueError: packed audio and video, one-dimensional, or of other channels.
    """
    if x.ndim not in (4, 5):
        raise ValueError(
            f"A SideNet takes images and videos; this latent is audio, or audio and video packed into one "
            f"{tuple(x.shape)}. Set the method of BA-Solver Sampler to 'multistep', which works without a SideNet."
        )
    channels = sidenet.network.config.in_channels
    if x.shape[1] != channels:
        raise ValueError(
            f"The SideNet {sidenet.name!r} takes latents of {channels} channels; this one has {x.shape[1]} "
            f"{tuple(x.shape)}. Use a SideNet made for this model, and an empty latent of the model's own kind."
        )


def predictor_of(caller: ModelCaller, sidenet: LoadedSideNet | None) -> SideNetProtocol | None:
    """The SideNet with its strength, and without effect where an inpaint mask keeps the image.

    There the velocity points from the noise to the kept image and does not change along the path, which is what a
    straight line through two anchors says. A mask that changes with sigma is taken as it was at the step's anchor, as
    other samplers' steps take it.
    """
    if sidenet is None:
        return None
    attention = sidenet.network.attention
    if isinstance(attention, ComfyAttention):
        attention.options = caller.options.get("transformer_options", {})
    if caller.extra_args.get("denoise_mask") is None:
        return with_strength(sidenet.network, sidenet.strength)

    def weight(times: Tensor) -> Tensor:
        # Queries are stacked whole batches, each at one time.
        sigmas = caller.sigmas.parameterization.sigmas(times)[:: caller.shape[0]]
        masks = [torch.as_tensor(caller.mask(sigma)).expand(caller.shape) for sigma in sigmas]
        return sidenet.strength * torch.cat(masks)

    return WeightedSideNet(sidenet.network, weight)


def sidenet_chunk(sidenet: LoadedSideNet, x: Tensor) -> int | None:
    """How many samples of x [B, C, *spatial] one SideNet call may take: whole batches, within half of the free memory.

    ComfyUI makes room for the SideNet's weights but not for its activations.
    """
    config = sidenet.network.config
    positions = math.prod(x.shape[2:]) / config.patch_size**2
    # The widest point, attention, holds the feature, its norm, q, k, v and their product; with as much again in use.
    each = 16 * config.base_channels * positions * sidenet.network.input_conv.weight.element_size()
    each += attention_bytes(sidenet.network, x.shape[1:])
    samples = int(sidenet.patcher.get_free_memory(x.device) / 2 / each)
    batch = x.shape[0]
    return max(1, samples // batch) * batch
