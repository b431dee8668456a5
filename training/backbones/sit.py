"""SiT and REPA files: class-conditional, with CFG."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...bas_core.checkpoint import load_sit
from ...bas_core.files import fingerprint
from .base import DIFFUSERS_ONLY, Backbone, BackboneChoice


def open_backbone(where: str, choice: BackboneChoice, device: torch.device) -> Backbone:
    """A SiT from one of our files or a public one (see `load_sit`).

    Raises:
        FileNotFoundError, CheckpointError: there is no such file, or it holds no SiT.
    """
    choice.refuse_unused("sit", *DIFFUSERS_ONLY)
    dtype = choice.torch_dtype()
    sit = load_sit(where, device=device, dtype=dtype)
    config = sit.config

    def velocity(x: Tensor, t: Tensor, classes: Tensor, scale: float) -> Tensor:
        return sit(x, t, classes)

    in_pixels = config.in_channels == 3
    return Backbone(
        name=Path(where).stem,
        kind="sit",
        fingerprint=fingerprint(sit.state_dict()),
        shape=(config.in_channels, config.input_size, config.input_size),
        velocity=velocity,
        conditions=config.num_classes,
        null=config.num_classes,
        num_classes=config.num_classes,
        parameters=sum(p.numel() for p in sit.parameters()),
        patch_size=config.patch_size,
        device=device,
        dtype=dtype,
        # A SiT of latents comes without its autoencoder: there is nothing to decode with.
        decode=(lambda x: (x.clamp(-1, 1) + 1) / 2) if in_pixels else None,
        encode=(lambda images: images * 2 - 1) if in_pixels else None,
    )
