"""Inputs that several nodes have, declared once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import comfy.sample
from comfy_api.v0_0_2 import io

from .sampling.start import Latent

SEEDS = {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF}
RARE = {"optional": True, "advanced": True}  # an input that few people change


def model_with_sidenet() -> Any:
    return io.Model.Input("model", tooltip="The model. If it has a SideNet, connect the output of Apply SideNet.")


def image_latent() -> Any:
    return io.Latent.Input("latent_image", tooltip="The image, from VAE Encode. Batches and videos work too.")


def steps(default: int, least: int, tooltip: str) -> Any:
    return io.Int.Input("steps", default=default, min=least, max=1000, tooltip=tooltip)


def share(name: str, default: float, tooltip: str, least: float = 0.0, **more: Any) -> Any:
    """A number up to 1, such as a share of the sampling."""
    return io.Float.Input(name, default=default, min=least, max=1.0, step=0.01, tooltip=tooltip, **more)


def cfg(tooltip: str, name: str = "cfg", default: float = 1.0, **more: Any) -> Any:
    """A CFG scale."""
    return io.Float.Input(name, default=default, min=0.0, max=100.0, step=0.1, tooltip=tooltip, **more)


def choice(name: str, options: Iterable[str], default: str, tooltip: str) -> Any:
    """A choice that few people change."""
    return io.Combo.Input(name, options=list(options), default=default, tooltip=tooltip, **RARE)


def sampling_cfg() -> Any:
    return cfg("The CFG scale, as in KSampler. Models with their own guidance input, such as FLUX, take 1.")


def negative(scale: str = "cfg") -> Any:
    tooltip = f"The negative prompt. It is used when {scale} is not 1."
    return io.Conditioning.Input("negative", optional=True, tooltip=tooltip)


def editing_denoise() -> Any:
    tooltip = "How much of the image may change. At 1 it is taken all the way to noise; lower values keep its layout."
    return share("denoise", 0.8, tooltip, least=0.01)


def source_cfg() -> Any:
    return cfg(
        "The CFG scale on the way from the image to noise. 1 is the safest. Above 1 the inversion is less accurate, "
        "and at much higher values it diverges.",
        name="source_cfg",
        **RARE,
    )


def editing_seed() -> Any:
    return io.Int.Input(
        "seed",
        **SEEDS,
        **RARE,
        # ComfyUI randomises inputs of this name after each run, and every run would invert the image again.
        control_after_generate=False,
        tooltip="The seed of the noise that is mixed into the image. An inversion starts with a little of this noise; "
        "the inversion-free method uses nothing else.",
    )


def latent_of(model: Any, latent: dict[str, Any], node: str) -> Latent:
    """What a LATENT tells a sampling; an empty one in the model's own number of channels.

    Raises:
        ValueError: the latent holds audio, alone or beside video (LTX-2), which the node of this name does not take.
    """
    samples: Any = latent["samples"]
    if samples.is_nested or samples.ndim not in (4, 5):
        raise ValueError(f"{node} takes images and videos; this latent holds audio, alone or beside video.")
    ratio = latent.get("downscale_ratio_spacial")  # set by newer ComfyUI's nodes for latents of any channels
    samples = comfy.sample.fix_empty_latent_channels(model, samples, *([ratio] if ratio else []))
    return Latent(samples, latent.get("noise_mask"), latent.get("batch_index"))
