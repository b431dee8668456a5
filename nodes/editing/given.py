"""What people connect to the editing nodes, checked in words: image latents, prompts of another number, masks."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.utils
import torch
from torch import Tensor

from ...bas_core.sit import SiT
from ..models.labels import KEY


def image_of(model: Any, latent: dict[str, Any]) -> Tensor:
    """The image latent [B, C, *spatial] that a MODEL edits.

    Raises:
        ValueError: audio, other channels than the MODEL's, or a size that it cannot take.
    """
    samples = latent["samples"]
    if samples.is_nested or samples.ndim not in (4, 5):
        raise ValueError("BA Edit and BA Invert take images and videos; this latent holds audio. Connect an image's.")
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    known = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != known:
        raise ValueError(
            f"This MODEL's latents have {known} channels; the image's have {samples.shape[1]}. Encode the image with "
            "the model's own VAE; if it has an alpha channel, remove that first (Split Image with Alpha)."
        )
    network = getattr(model.model, "diffusion_model", None)
    if isinstance(network, SiT):
        side = network.config.input_size
        if tuple(samples.shape[2:]) != (side, side):
            pixels = side * (1 if known == 3 else 8)
            raise ValueError(
                f"This SiT takes latents of {side}x{side}, which is an image of {pixels}x{pixels} pixels; got "
                f"{samples.shape[3]}x{samples.shape[2]}. Scale the image to {pixels}x{pixels} (Upscale Image) first."
            )
    return samples


def as_many_images_as_prompts(image: Tensor, *conditionings: Any) -> Tensor:
    """One image repeated for a batch of prompts; a batch of images stays as it is.

    ComfyUI repeats prompts for a batch of images by itself, and would use the first prompt alone for one image.

    Raises:
        ValueError: several images and another number of prompts above one, or two such numbers of prompts.
    """
    counts = {max(len(entry[0]), len(entry[1].get(KEY, ()))) for part in conditionings for entry in part or ()} - {1}
    if len(counts) > 1:
        raise ValueError(
            f"The prompts come in batches of {' and '.join(str(count) for count in sorted(counts))}. Give as many "
            "source prompts as others, or one."
        )
    prompts = max(counts, default=1)
    if prompts == 1 or prompts == len(image):
        return image
    if len(image) > 1:
        raise ValueError(
            f"There are {len(image)} images and a batch of {prompts} prompts. Give as many prompts as images, one "
            "prompt, or one image."
        )
    return comfy.utils.repeat_to_batch_size(image, prompts)


def mask_of(mask: Tensor | None, latent: dict[str, Any], image: Tensor) -> Tensor | None:
    """The mask input, or else the latent's own, of any size; None where there is neither.

    Raises:
        ValueError: it is 0 everywhere, or asks for other images than there are.
    """
    mask = latent.get("noise_mask") if mask is None else mask
    if mask is None:
        return None
    if not torch.count_nonzero(mask):
        raise ValueError("The mask is empty, so nothing may change. Paint what is to be edited, or leave it out.")
    if mask.ndim == 3 and image.ndim == 4 and len(mask) not in (1, len(image)):
        raise ValueError(f"There are {len(image)} images and {len(mask)} masks. Give one mask, or one for each image.")
    return mask
