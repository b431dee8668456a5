"""Inversion and editing in ComfyUI's sampling: `bas_core.editing` on the velocities that ComfyUI gives.

ComfyUI's own samplers scale noise into the latent before they start and out of it when they end; on flow models the
second divides by zero at sigma 1, where an inversion ends. `PathSampler` does neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...bas_core import editing
from ...bas_core.editing import Control, SourcePath
from ...bas_core.solver import Step
from ..models.attach import applied_sidenet
from ..models.fit import facts_of
from ..models.paths import Schedule
from ..sampling.sampler import Opened, Options, opened, step_callback
from .source_trajectory import SourceTrajectoryLink, sidenet_of
from .way import Way

METHODS = ("inversion", "inversion-free")


class Run(NamedTuple):
    """What the core's editing functions are called with, in ComfyUI's sampling.

    Attributes:
        on: the run on the MODEL.
        image, noise: [B, C, *spatial], flow states at t = 0 and 1.
        callback: sees every step.
    """

    on: Opened
    image: Tensor
    noise: Tensor
    callback: Callable[[Step], None]

    @property
    def solver(self) -> tuple[Any, Any]:
        """Field and SideNet: the first two arguments of the core's functions."""
        return self.on.field, self.on.predictor

    @property
    def more(self) -> dict[str, Any]:
        """Their last two."""
        return {"callback": self.callback, "chunk": self.on.chunk}


Work = Callable[[Run], tuple[Tensor, float]]


class PathSampler(comfy.samplers.Sampler):
    """A SAMPLER that leaves ComfyUI's noise scaling out: it is given the image and does with it what `work` does.

    Args:
        work: from a `Run` to a flow state [B, C, *spatial], which becomes the guider's result, and its time.
        schedule: of the run.
        doubted: whether to tell the user where the SideNet is less accurate than it should be.
    """

    def __init__(self, work: Work, schedule: Schedule, doubted: bool = True) -> None:
        self.work = work
        self.schedule = schedule
        self.doubted = doubted

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Called by ComfyUI's guiders; the arguments are theirs. Returns the model's state [B, C, *spatial]."""
        model = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        model.latent_image, model.noise = latent_image, noise
        schedule = self.schedule
        steps = len(schedule.times) - 1

        def told(values: dict[str, Any]) -> None:
            if callback is not None:
                callback(values["i"], values["denoised"], values["x"], steps)

        scale = getattr(model_wrap.inner_model.model_sampling, "noise_scale", 1.0)
        options = options_for(model_wrap.model_patcher)
        # The mask is the edit's own affair: around the model call it would hold states back that are to be inverted.
        with opened(model, {**extra_args, "denoise_mask": None}, schedule, noise, options, disable_pbar) as on:
            if self.doubted:
                on.say_doubts()
            run = Run(on, latent_image, scale * noise, step_callback(schedule, noise.shape, told))
            state, time = self.work(run)
        return schedule.path.from_flow(state, schedule.sigma_at(time).to(state))


def options_for(model: Any) -> Options:
    """The solver with the MODEL's SideNet, or the multistep method where it has none."""
    return Options() if applied_sidenet(model) is not None else Options("multistep")


def _moved(source: SourcePath, device: torch.device | str) -> SourcePath:
    return replace(
        source,
        states=tuple(state.to(device) for state in source.states),
        residuals={key: residual.to(device) for key, residual in source.residuals.items()},
    )


def sampled(way: Way, latent: Tensor, noise: Tensor, schedule: Schedule, work: Work, doubted: bool = True) -> Tensor:
    """Run `work` in ComfyUI's sampling; returns the latent that the state it ends in stands for."""
    steps = len(schedule.times) - 1
    out = way.guider().sample(
        noise,
        latent,
        PathSampler(work, schedule, doubted),
        schedule.sigmas,
        callback=latent_preview.prepare_callback(way.model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    )
    return out.to(comfy.model_management.intermediate_device())


def make_path(
    way: Way, latent: Tensor, schedule: Schedule, seed: int, method: str
) -> tuple[SourceTrajectoryLink, Tensor]:
    """The source path of an image; N calls.

    Args:
        way: the source's side.
        latent: [B, C, *spatial] as ComfyUI's nodes hand it on.
        schedule: from `editing_schedule`.
        seed: of the noise that the image is mixed with, a little where it is inverted and wholly on a straight path.
        method: one of METHODS.

    Returns:
        The path, and the latent of its noisy end.
    """
    found: list[SourcePath] = []
    straight = method == METHODS[1]

    def work(run: Run) -> tuple[Tensor, float]:
        if straight:
            source = editing.straight_path(*run.solver, run.image, run.noise, schedule.times, **run.more)
        else:
            source = editing.invert(*run.solver, run.image, schedule.times, run.noise, **run.more)
        found.append(_moved(source, "cpu"))
        return source.noise, float(source.times[0])

    noise = comfy.sample.prepare_noise(latent, seed)
    # At CFG 1 an edit's way to noise is as it should be, whatever scale the SideNet was made for: what it errs comes
    # back with the residuals.
    out = sampled(way, latent, noise, schedule, work, doubted=way.scale != 1)
    facts = facts_of(way.model)
    solver = sidenet_of(way.model)
    return SourceTrajectoryLink(
        found[0], latent.cpu(), schedule, facts.kind, facts.fingerprint, solver, way, straight
    ), out


def edited(held: SourceTrajectoryLink, way: Way, latent: Tensor, control: Control, mask: Tensor | None) -> Tensor:
    """The image of a source path under the target's conditioning, as a latent; N calls."""

    def work(run: Run) -> tuple[Tensor, float]:
        source = _moved(held.source, run.noise.device)
        here = None if mask is None else _resized(mask, run.image)
        return editing.edit(*run.solver, source, control, here, **run.more), 0.0

    return sampled(way, latent, torch.zeros_like(latent), held.schedule, work)


def _resized(mask: Tensor, image: Tensor) -> Tensor:
    """The mask at the latent's size, as ComfyUI resizes them.

    Raises:
        ValueError: what is painted falls between the latent's pixels.
    """
    here = comfy.utils.reshape_mask(mask.float(), image.shape).clamp(0, 1).to(image.device)
    if not torch.count_nonzero(here):
        size = "x".join(str(side) for side in reversed(image.shape[2:]))
        raise ValueError(
            f"What the mask shows is lost where it is made as small as the latent, {size}. Paint a larger place."
        )
    return here


def reconstructed(held: SourceTrajectoryLink, latent: Tensor) -> Tensor:
    """What a path's inversion gives back without its residuals, as a latent; N calls, none for a straight path."""
    if held.straight:
        return latent

    def work(run: Run) -> tuple[Tensor, float]:
        source = _moved(held.source, run.noise.device)
        return editing.reconstruct(*run.solver, source, **run.more), 0.0

    return sampled(held.way, latent, torch.zeros_like(latent), held.schedule, work, doubted=held.way.scale != 1)
