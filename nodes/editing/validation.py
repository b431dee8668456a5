"""Checks of the editing nodes' inputs: image latents, batches of prompts, masks."""

from __future__ import annotations

from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ...bas_core.sit import SiT
from ..models.labels import KEY


def check_image(model: Any, samples: Tensor) -> None:
    """Refuse an image latent [B, C, *spatial] that does not fit a MODEL.

    Raises:
        ValueError: other channels than the MODEL's, or a size that it cannot take.
    """
    channels = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != channels:
        raise ValueError(
            f"This MODEL's latents have {channels} channels; the image's have {samples.shape[1]}. Encode the image "
            "with the model's own VAE; if it has an alpha channel, remove that first (Split Image with Alpha)."
        )
    network = getattr(model.model, "diffusion_model", None)
    if isinstance(network, SiT):
        side = network.config.input_size
        if tuple(samples.shape[2:]) != (side, side):
            pixels = side * (1 if channels == 3 else 8)
            raise ValueError(
                f"This SiT takes latents of {side}x{side}, which is an image of {pixels}x{pixels} pixels; got "
                f"{samples.shape[3]}x{samples.shape[2]}. Scale the image to {pixels}x{pixels} (Upscale Image) first."
            )


def repeat_for_prompts(image: Tensor, *conditionings: Any) -> Tensor:
    """One image repeated for a batch of prompts; a batch of images stays as it is.

    ComfyUI repeats prompts for a batch of images by itself, but uses the first prompt alone for one image.

    Raises:
        ValueError: several images and another number of prompts above one, or two such numbers of prompts.
    """
    counts = {max(len(entry[0]), len(entry[1].get(KEY, ()))) for part in conditionings for entry in part or ()} - {1}
    if len(counts) > 1:
        raise ValueError(
            f"The prompts come in batches of {' and '.join(str(count) for count in sorted(counts))}. Connect as many "
            "source prompts as others, or one."
        )
    prompts = max(counts, default=1)
    if len(image) == 1:
        return comfy.utils.repeat_to_batch_size(image, prompts)
    if prompts not in (1, len(image)):
        raise ValueError(
            f"There are {len(image)} images and a batch of {prompts} prompts. Connect as many prompts as images, one "
            "prompt, or one image."
        )
    return image


def check_mask(mask: Tensor | None, latent: dict[str, Any], image: Tensor) -> Tensor | None:
    """The mask input of any size, or else the latent's own mask; None without either.

    Raises:
        ValueError: it is 0 everywhere, or its batch is not that of the images.
    """
    mask = latent.get("noise_mask") if mask is None else mask
    if mask is None:
        return None
    if not torch.count_nonzero(mask):
        raise ValueError("The mask is empty, so nothing may change. Paint what is to be edited, or leave it out.")
    if mask.ndim == 3 and image.ndim == 4 and len(mask) not in (1, len(image)):
        raise ValueError(f"There are {len(image)} images and {len(mask)} masks. Connect one mask, or one an image.")
    return mask
