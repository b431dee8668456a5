"""A `diffusers` autoencoder: from states to images and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Conversion = Callable[[Tensor], Tensor]


def autoencoder(pipeline: Any, dimensions: int) -> tuple[Conversion | None, Conversion | None]:
    """Decoder and encoder between states and images [B, 3, H, W] in [0, 1], where the autoencoder's scale is known.

    States have so many dimensions: 4, or 5 for videos, of which decoding shows the middle frame.
    """
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return None, None
    # Qwen-Image's states are images, and its autoencoder is one of videos.
    of_videos = any(parameter.ndim == 5 for parameter in vae.parameters())
    config = vae.config
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        if not config.get("scaling_factor"):
            return None, None
        mean, std = [float(config.get("shift_factor") or 0.0)], [1 / config["scaling_factor"]]

    def scaled(values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, *[1] * (like.ndim - 2))

    def decode(x: Tensor) -> Tensor:
        latents = (x * scaled(std, x) + scaled(mean, x)).to(vae.dtype)
        shown = latents.unsqueeze(2) if of_videos and latents.ndim == 4 else latents
        pixels = vae.decode(shown, return_dict=False)[0].float()
        frames = pixels[:, :, pixels.shape[2] // 2] if pixels.ndim == 5 else pixels
        return (frames.clamp(-1, 1) + 1) / 2

    def encode(images: Tensor) -> Tensor:
        pixels = (images.to(vae.device) * 2 - 1).to(vae.dtype)
        encoded = vae.encode(pixels.unsqueeze(2) if of_videos else pixels)
        latents = (encoded.latent if "latent" in encoded else encoded.latent_dist.mode()).float()
        latents = latents.squeeze(2) if latents.ndim > dimensions else latents
        return (latents - scaled(mean, latents)) / scaled(std, latents)

    return decode, encode
