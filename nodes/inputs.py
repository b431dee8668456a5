"""Inputs that several nodes have, declared once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import comfy.sample
from comfy_api.v0_0_2 import io
from torch import Tensor

SEEDS = {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF}


def model_with_sidenet() -> Any:
    return io.Model.Input("model", tooltip="The model. If it has a SideNet, connect the output of Apply SideNet.")


def image_latent() -> Any:
    return io.Latent.Input(
        "latent_image", tooltip="The image to start from, out of VAE Encode. Batches and videos work too."
    )


def steps(default: int, tooltip: str, least: int = 1) -> Any:
    return io.Int.Input("steps", default=default, min=least, max=1000, tooltip=tooltip)


def percent(name: str, default: float, tooltip: str) -> Any:
    """A share of the sampling or a strength, from 0 to 1, that few people change."""
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, optional=True, advanced=True, tooltip=tooltip
    )


def choice(name: str, options: Iterable[str], default: str, tooltip: str) -> Any:
    """A choice that few people change."""
    return io.Combo.Input(name, options=list(options), default=default, optional=True, advanced=True, tooltip=tooltip)


def editing_denoise() -> Any:
    return io.Float.Input(
        "denoise",
        default=0.8,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip="How much of the image may change. At 1 the image is taken all the way to noise; lower values keep "
        "more of its layout.",
    )


def source_cfg() -> Any:
    return io.Float.Input(
        "source_cfg",
        default=1.0,
        min=0.0,
        max=30.0,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="The CFG scale on the way from the image to noise. 1 is the safest. The inversion is less accurate "
        "above 1, and much higher values make it diverge.",
    )


def editing_seed() -> Any:
    return io.Int.Input(
        "seed",
        **SEEDS,
        # ComfyUI randomises inputs of this name after each run, and every run would invert the image again.
        control_after_generate=False,
        optional=True,
        advanced=True,
        tooltip="The seed of the noise that is mixed into the image. An inversion starts with a little of this noise; "
        "the inversion-free method uses nothing else.",
    )


def cfg() -> Any:
    return io.Float.Input(
        "cfg",
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip="The CFG scale, as in KSampler. Models with a guidance input of their own, such as FLUX, take 1.",
    )


def negative(scale: str = "cfg") -> Any:
    return io.Conditioning.Input(
        "negative", optional=True, tooltip=f"The negative prompt. It is used when {scale} is not 1."
    )


def empty_latent(model: Any, latent: dict[str, Any], node: str) -> Tensor:
    """The tensor of an empty LATENT, [B, C, *spatial] in the model's own number of channels.

    Raises:
        ValueError: the latent holds audio, which the node of this name does not take.
    """
    ratio = latent.get("downscale_ratio_spacial")  # set by newer ComfyUI's nodes for latents of any channels
    samples: Any = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *([ratio] if ratio else []))
    if samples.is_nested or samples.ndim not in (4, 5):
        raise ValueError(f"{node} takes images and videos; this latent holds audio.")
    return samples
