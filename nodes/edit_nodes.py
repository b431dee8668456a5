"""The nodes BA Invert and BA Edit."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.v0_0_2 import io

from ..bas_core.editing import FADE, Control
from . import inputs
from .editing.edit import METHODS, edit, reconstruct, source_trajectory
from .editing.given import as_many_images_as_prompts, image_of, mask_of
from .editing.held import HeldPath, InvertedNoise, check_path
from .editing.schedule import editing_schedule
from .sampling.guider import guider_for

SourcePathLink = io.Custom("BA_SOURCE_PATH")


class BAInvert(io.ComfyNode):
    """An image's latent to the noise that it comes from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverInvert",
            display_name="BA Invert",
            category="BA-Solver/Editing",
            description="Find the noise that a model would have drawn an image from. With the path of the way there, "
            "BA Edit changes the image as often as you like without inverting it again. Works with or without a "
            "SideNet on the MODEL.",
            search_aliases=["inversion", "unsample", "unsampler", "RF inversion", "reverse sampling", "image to noise"],
            inputs=[
                inputs.model_to_edit(),
                io.Conditioning.Input("source", tooltip="What the image shows."),
                inputs.image_latent(),
                inputs.calls(10, "How often the model is called. 5 to 10 is what BA-solver is for.", least=2),
                inputs.strength(),
                inputs.source_guidance(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Only for a source_guidance other than 1.",
                ),
                inputs.seed(),
            ],
            outputs=[
                io.Latent.Output("inverted", tooltip="The noisy end of the path, to look at or to work with."),
                io.Noise.Output(
                    "noise",
                    tooltip="For SamplerCustomAdvanced: with the same latent and sigmas of the same strength "
                    "(BA-Solver Scheduler's denoise), any sampler starts where the inversion ended.",
                ),
                SourcePathLink.Output("path", tooltip="For BA Edit: an exact return, and no second inversion."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        source: Any,
        latent: dict[str, Any],
        calls: int,
        strength: float = 0.8,
        source_guidance: float = 1.0,
        negative: Any = None,
        seed: int = 0,
    ) -> io.NodeOutput:
        image = as_many_images_as_prompts(image_of(model, latent), source)
        way = guider_for(model, source, negative, source_guidance)
        held, noisy = source_trajectory(way, image, editing_schedule(model, calls, strength), seed, METHODS[0])
        return io.NodeOutput({**latent, "samples": noisy}, InvertedNoise(model, held), held)


def _pull_back() -> list[Any]:
    """How strongly, and when, an edit is held to the source image's path."""
    return [
        inputs.fraction(
            "eta",
            0.0,
            "How strongly each step is pulled back to the source image's path: 0 = not at all, 1 = the "
            "image does not change. For more of the source than strength alone keeps.",
        ),
        inputs.fraction(
            "eta_from",
            0.0,
            "eta acts where the flow time t is at least this. t = 1 is noise (layout), t = 0 the image (detail).",
        ),
        inputs.fraction(
            "eta_until",
            1.0,
            "eta acts where the flow time t is at most this.",
        ),
    ]


class BAEdit(io.ComfyNode):
    """An image regenerated as something else."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverEdit",
            display_name="BA Edit",
            category="BA-Solver/Editing",
            description="Regenerate an image under another prompt, keeping what the two prompts share. The second "
            "output shows what the inversion alone would have lost. Works with or without a SideNet on the MODEL.",
            search_aliases=["edit image", "inversion", "FlowEdit", "RF edit", "prompt to prompt", "change object"],
            inputs=[
                inputs.model_to_edit(),
                inputs.image_latent(),
                io.Conditioning.Input("source", tooltip="What the image shows now."),
                io.Conditioning.Input("positive", tooltip="What it is to show."),
                io.Conditioning.Input("negative", tooltip="What it is not to show. Not used where guidance is 1."),
                inputs.calls(
                    10,
                    "Model calls on the way to the source path, and again on the way to the edited image (and once "
                    "more for the reconstruction). 5 to 10 is what BA-solver is for.",
                    least=2,
                ),
                inputs.strength(),
                io.Float.Input(
                    "guidance",
                    default=2.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="CFG toward the positive. Models with a guidance of their own, such as FLUX, take 1 here.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="inversion: along the path that the image takes to noise. inversion-free: along the "
                    "difference between the two prompts' velocities, from random noise (as FlowEdit); leaves less "
                    "grain at few calls.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the image may change; soft edges work. Of any size."
                ),
                SourcePathLink.Input(
                    "path",
                    optional=True,
                    tooltip="From BA Invert, for the same MODEL and latent. Then calls, strength, source, "
                    "source_guidance, method and seed are those of the path.",
                ),
                inputs.source_guidance(),
                *_pull_back(),
                inputs.seed(),
            ],
            outputs=[
                io.Latent.Output("edited", tooltip="The image as the positive says."),
                io.Latent.Output(
                    "reconstruction",
                    tooltip="The image, inverted and brought back under the source's own prompt without correction: "
                    "what an inversion with these calls loses. The edit does not lose it.",
                ),
            ],
        )

    @classmethod
    def execute(  # noqa: PLR0913, one argument an input
        cls,
        model: Any,
        latent: dict[str, Any],
        source: Any,
        positive: Any,
        negative: Any,
        calls: int,
        strength: float = 0.8,
        guidance: float = 2.0,
        method: str = METHODS[0],
        mask: torch.Tensor | None = None,
        path: HeldPath | None = None,
        source_guidance: float = 1.0,
        eta: float = 0.0,
        eta_from: float = 0.0,
        eta_until: float = 1.0,
        seed: int = 0,
    ) -> io.NodeOutput:
        if eta_from > eta_until:
            raise ValueError(f"eta_from ({eta_from:g}) must not be above eta_until ({eta_until:g}); t = 1 is noise.")
        prompts = (source, positive, *([] if guidance == 1 else [negative]))
        image = as_many_images_as_prompts(image_of(model, latent), *prompts)
        where = mask_of(mask, latent, image)
        if path is None:
            way = guider_for(model, source, negative, source_guidance)
            path, _ = source_trajectory(way, image, editing_schedule(model, calls, strength), seed, method)
        check_path(path, model, image)
        control = Control(eta, (eta_from, eta_until), None if path.straight else FADE)
        out = edit(path, guider_for(model, positive, negative, guidance), image, control, where)
        return io.NodeOutput({**latent, "samples": out}, {**latent, "samples": reconstruct(path, image)})
