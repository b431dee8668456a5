"""Inputs that several nodes have, declared once, and what several inputs have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import comfy.sample
from comfy_api.v0_0_2 import io
from torch import Tensor

IMAGE_LATENT = "The image, from VAE Encode. A batch, or a video, works too."


def calls(default: int, tooltip: str, least: int = 1) -> Any:
    """How often the model may be called."""
    return io.Int.Input("calls", default=default, min=least, max=1000, tooltip=tooltip)


def fraction(name: str, default: float, tooltip: str, advanced: bool = True) -> Any:
    """A number from 0 to 1, such as a flow time or a share."""
    more = {"optional": True, "advanced": True} if advanced else {}
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip, **more)


def choice(name: str, options: Iterable[str], default: str, tooltip: str) -> Any:
    """A choice that few people change."""
    listed = list(options)
    return io.Combo.Input(name, options=listed, default=default, optional=True, advanced=True, tooltip=tooltip)


def model_to_edit() -> Any:
    return io.Model.Input("model", tooltip="The model, with its SideNet if it has one (Apply SideNet).")


def image_latent() -> Any:
    return io.Latent.Input("latent", tooltip=IMAGE_LATENT)


def strength() -> Any:
    """How much of the way to noise an edit takes."""
    return io.Float.Input(
        "strength",
        default=0.8,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip="How far toward noise the image is taken, and so how much of it may change. 1 = to pure noise; less "
        "keeps the layout more.",
    )


def source_guidance() -> Any:
    """CFG of an inversion."""
    return io.Float.Input(
        "source_guidance",
        default=1.0,
        min=0.0,
        max=30.0,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="CFG on the way to noise. 1 is the safest: at more the inversion is less accurate, and at much more it "
        "diverges.",
    )


def seed() -> Any:
    """Of an edit's noise."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        optional=True,
        advanced=True,
        tooltip="Of the noise that the image is mixed with: very little of it where an inversion starts, all of it "
        "with the method inversion-free.",
    )


def cfg() -> Any:
    return io.Float.Input(
        "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="As in KSampler; FLUX takes 1 here."
    )


def numbers_of_calls(tooltip: str) -> Any:
    return io.String.Input("calls", default="5, 7, 10", tooltip=tooltip)


def negative() -> Any:
    return io.Conditioning.Input("negative", optional=True, tooltip="Only for a cfg other than 1.")


def empty_latent(model: Any, given: dict[str, Any], what: str) -> Tensor:
    """The tensor of an empty LATENT, [B, C, *spatial] as the model takes it.

    Raises:
        ValueError: it is for audio, which `what` does not take.
    """
    told = given.get("downscale_ratio_spacial")  # by what the VAE of the node's mind shrinks pictures
    latent: Any = comfy.sample.fix_empty_latent_channels(model, given["samples"], *([told] if told else []))
    if latent.is_nested or latent.ndim not in (4, 5):
        raise ValueError(f"{what} takes images and videos; this latent holds audio.")
    return latent
