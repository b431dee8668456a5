"""The nodes BA Invert, BA Edit and BA Reconstruct."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.v0_0_2 import io

from ..bas_core.editing import FADE, Control
from . import inputs
from .editing.edit import METHODS, edit, reconstruct, source_trajectory
from .editing.schedule import editing_schedule
from .editing.source_trajectory import InvertedNoise, SourceTrajectoryLink, check_trajectory
from .editing.validation import check_image, check_mask, repeat_for_prompts
from .models.parameterization import flow_interval
from .sampling.guider import guider_for, takes_guidance
from .sampling.start import Latent

# The CFG scale of an edit where none is given and CFG can be used: changes show, and most models keep their looks.
EDIT_CFG = 2.0

TrajectoryType = io.Custom("BA_SOURCE_TRAJECTORY")


class BAInvert(io.ComfyNode):
    """The noise that an image comes from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverInvert",
            display_name="BA Invert",
            category="BA-Solver/Editing",
            description="Find the noise that a model draws an image from. BA Edit can then change the image as often "
            "as you like without inverting it again. Works with or without a SideNet on the MODEL.",
            search_aliases=["inversion", "unsample", "unsampler", "RF inversion", "reverse sampling", "image to noise"],
            inputs=[
                inputs.model_with_sidenet(),
                io.Conditioning.Input("source", tooltip="The prompt that describes the image."),
                inputs.image_latent(),
                inputs.steps(10, 2, "The number of steps, each of one model call. BA-solver is made for 5 to 10."),
                inputs.editing_denoise(),
                inputs.source_cfg(),
                inputs.negative("source_cfg"),
                inputs.editing_seed(),
            ],
            outputs=[
                io.Latent.Output("inverted", tooltip="The noisy latent that the inversion ends at."),
                io.Noise.Output(
                    "noise",
                    tooltip="The noise for SamplerCustomAdvanced. With the same latent and sigmas of the same denoise, "
                    "any sampler starts where the inversion ends.",
                ),
                TrajectoryType.Output(
                    "trajectory",
                    tooltip="The source trajectory for BA Edit, which then needs no second inversion, and "
                    "for BA Reconstruct.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        source: Any,
        latent_image: dict[str, Any],
        steps: int,
        denoise: float = 0.8,
        source_cfg: float = 1.0,
        negative: Any = None,
        seed: int = 0,
    ) -> io.NodeOutput:
        latent = _image(model, latent_image, "BA Invert", source)
        guider = guider_for(model, source, negative, source_cfg)
        sigmas = editing_schedule(model, steps, denoise)
        trajectory, noisy = source_trajectory(guider, latent, sigmas, seed, METHODS[0])
        return io.NodeOutput({**latent_image, "samples": noisy}, InvertedNoise(model, trajectory), trajectory)


def _image(model: Any, latent: dict[str, Any], node: str, *prompts: Any) -> Latent:
    image = inputs.latent_of(model, latent, node)
    check_image(model, image.samples)
    return image._replace(samples=repeat_for_prompts(image.samples, *prompts))


def _eta_inputs() -> list[Any]:
    where = "The layout is decided near 0, and the details near 1."
    return [
        inputs.share(
            "eta",
            0.0,
            "How strongly each step is pulled back to the source trajectory. 0 does not pull at all, and 1 leaves the "
            "image as it is. Use it to keep more of the image than denoise alone does.",
            **inputs.RARE,
        ),
        inputs.share("eta_start_percent", 0.0, f"eta begins at this share of the sampling. {where}", **inputs.RARE),
        inputs.share("eta_end_percent", 1.0, f"eta ends at this share of the sampling. {where}", **inputs.RARE),
    ]


class BAEdit(io.ComfyNode):
    """An image regenerated under another prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverEdit",
            display_name="BA Edit",
            category="BA-Solver/Editing",
            description="Regenerate an image under another prompt, and keep what the two prompts share. Works with or "
            "without a SideNet on the MODEL.",
            search_aliases=["edit image", "inversion", "FlowEdit", "RF edit", "prompt to prompt", "change object"],
            inputs=[
                inputs.model_with_sidenet(),
                inputs.image_latent(),
                io.Conditioning.Input("source", tooltip="The prompt that describes the image as it is."),
                io.Conditioning.Input("positive", tooltip="The prompt that describes the edited image."),
                inputs.negative(),
                inputs.steps(
                    10,
                    2,
                    "The number of steps from the image to noise, and again from noise to the edited image. Each step "
                    "is one model call. BA-solver is made for 5 to 10.",
                ),
                inputs.editing_denoise(),
                inputs.cfg(
                    f"The CFG scale of the edit. 0 takes what the model needs: 1 without a negative, and for models "
                    f"with a guidance input of their own, such as FLUX; {EDIT_CFG:g} for others.",
                    "cfg",
                    default=0.0,
                    **inputs.RARE,
                ),
                inputs.choice(
                    "method",
                    METHODS,
                    METHODS[0],
                    "inversion: edit along the trajectory that takes the image to noise. inversion-free: edit along "
                    "the difference between the two prompts' velocities, from random noise, as FlowEdit does. It "
                    "leaves less grain in few steps.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the image may change. Soft edges and any size work."
                ),
                TrajectoryType.Input(
                    "trajectory",
                    optional=True,
                    tooltip="The source trajectory from BA Invert, for the same MODEL and latent. It replaces steps, "
                    "denoise, source, source_cfg, method and seed of this node.",
                ),
                inputs.source_cfg(),
                *_eta_inputs(),
                inputs.editing_seed(),
            ],
            outputs=[
                io.Latent.Output("edited", tooltip="The edited image."),
                TrajectoryType.Output(
                    "trajectory",
                    tooltip="The image's source trajectory, for BA Reconstruct and for other edits of this image.",
                ),
            ],
        )

    @classmethod
    def execute(  # noqa: PLR0913, one argument an input
        cls,
        model: Any,
        latent_image: dict[str, Any],
        source: Any,
        positive: Any,
        steps: int,
        negative: Any = None,
        denoise: float = 0.8,
        cfg: float = 0.0,
        method: str = METHODS[0],
        mask: torch.Tensor | None = None,
        trajectory: SourceTrajectoryLink | None = None,
        source_cfg: float = 1.0,
        eta: float = 0.0,
        eta_start_percent: float = 0.0,
        eta_end_percent: float = 1.0,
        seed: int = 0,
    ) -> io.NodeOutput:
        if eta_start_percent > eta_end_percent:
            raise ValueError(
                f"eta_start_percent ({eta_start_percent:g}) must not be above eta_end_percent ({eta_end_percent:g})."
            )
        cfg = cfg or (1.0 if negative is None or takes_guidance(model) else EDIT_CFG)
        prompts = (source, positive, *([] if cfg == 1 or negative is None else [negative]))
        latent = _image(model, latent_image, "BA Edit", *prompts)
        image = latent.samples
        edit_mask = check_mask(mask, latent_image, image)
        if trajectory is None:
            guider = guider_for(model, source, negative, source_cfg)
            trajectory, _ = source_trajectory(guider, latent, editing_schedule(model, steps, denoise), seed, method)
        check_trajectory(trajectory, model, image)
        window = flow_interval(model.get_model_object("model_sampling"), eta_start_percent, eta_end_percent)
        control = Control(eta, window, None if trajectory.straight else FADE)
        edited = edit(trajectory, guider_for(model, positive, negative, cfg), image, control, edit_mask)
        return io.NodeOutput({**latent_image, "samples": edited}, trajectory)


class BAReconstruct(io.ComfyNode):
    """The image that an inversion alone gives back."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverReconstruct",
            display_name="BA Reconstruct",
            category="BA-Solver/Editing",
            description="Sample an inverted image again under its own prompt, without corrections. It shows what an "
            "inversion in these steps loses, and what BA Edit corrects.",
            search_aliases=["reconstruction", "inversion error", "round trip"],
            inputs=[TrajectoryType.Input("trajectory", tooltip="The source trajectory from BA Edit or BA Invert.")],
            outputs=[io.Latent.Output("reconstruction", tooltip="The image as the inversion alone gives it back.")],
        )

    @classmethod
    def execute(cls, trajectory: SourceTrajectoryLink) -> io.NodeOutput:
        return io.NodeOutput({"samples": reconstruct(trajectory)})
