"""The SideNet of a run: found on the MODEL, checked, with its strength, and within the memory that is free."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...bas_core.prediction import SideNetProtocol
from ...bas_core.strength import WeightedSideNet, with_strength
from ..models.attach import LoadedSideNet, applied_sidenet
from .backbone import Backbone, embedded_guidance


def sidenet_for(guider: Any) -> LoadedSideNet | None:
    """The SideNet on a guider's MODEL; None at strength 0, which is the multistep baseline.

    Raises:
        ValueError: the MODEL has none.
    """
    sidenet = applied_sidenet(guider.model_patcher)
    if sidenet is None:
        raise ValueError(
            "BA-solver needs a SideNet on the MODEL, and there is none. Add the nodes Load SideNet and Apply SideNet "
            "between the model loader and the sampler, or use BA-Solver Sampler with the method 'multistep', which "
            "does without."
        )
    return sidenet if sidenet.strength else None


def guidance_doubts(sidenet: LoadedSideNet, guider: Any) -> list[str]:
    """Where the run's guidance leaves what the SideNet was trained for.

    A model that takes its guidance as an input (FLUX.1-dev) was recorded with that and without CFG.
    """
    cfg, embedded = float(getattr(guider, "cfg", 1.0)), embedded_guidance(guider)
    card, taken = sidenet.card, cfg if embedded is None else embedded
    doubts = (
        [] if card.supports_cfg(taken) else [("CFG" if embedded is None else "guidance", card.describe_cfg(), taken)]
    )
    if embedded is not None and not math.isclose(cfg, 1.0):
        doubts.append(("CFG", "1", cfg))
    return [
        f"the SideNet {sidenet.name!r} was made for {what} {scales}; at {scale:g} it is less accurate."
        for what, scales, scale in doubts
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


def predictor_of(backbone: Backbone, sidenet: LoadedSideNet | None) -> SideNetProtocol | None:
    """The SideNet with its strength, held back where an inpaint mask keeps the image as it is.

    There the velocity points from the noise straight to the kept image and does not change along the path, which is
    what the straight line through two anchors says. Where another node lets the mask change with sigma, the one that
    ComfyUI used at the anchor holds, as it does for a step of other samplers.
    """
    if sidenet is None:
        return None
    if backbone.extra_args.get("denoise_mask") is None:
        return with_strength(sidenet.network, sidenet.strength)
    path = backbone.schedule.path

    def weight(times: Tensor) -> Tensor:
        batch = backbone.shape[0]
        sigmas = path.sigmas(times)[::batch]  # queries are stacked whole batches, each at one time
        masks = [torch.as_tensor(backbone.mask(sigma)).expand(backbone.shape) for sigma in sigmas]
        return sidenet.strength * torch.cat(masks)

    return WeightedSideNet(sidenet.network, weight)


def sidenet_chunk(sidenet: LoadedSideNet, x: Tensor) -> int | None:
    """How many samples of x one SideNet call may take: whole batches, within half of the free memory.

    ComfyUI makes room for the SideNet's weights but not for its activations.
    """
    config = sidenet.network.config
    positions = math.prod(x.shape[2:]) / config.patch_size**2
    # The widest point, attention, holds the feature, its norm, q, k, v and their product; with as much again in use.
    each = 16 * config.base_channels * positions * sidenet.network.input_conv.weight.element_size()
    samples = int(comfy.model_management.get_free_memory(x.device) / 2 / each)
    batch = x.shape[0]
    return max(1, samples // batch) * batch
