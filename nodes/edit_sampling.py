"""Inversion and editing on a ComfyUI MODEL: `bas_core.editing` on the velocities that ComfyUI gives.

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
from tqdm.auto import tqdm

from ..bas_core import editing
from ..bas_core.editing import START, Control, SourcePath
from ..bas_core.guidance import Field
from ..bas_core.solver import Predictor, Step
from .adapter import (
    Backbone,
    Options,
    _field,
    _predictor,
    _sidenet_for,
    _step_callback,
    check_latent,
    sidenet_chunk,
)
from .attach import applied_sidenet
from .fit import facts_of
from .paths import Path, Schedule, path_of
from .schedule import stretched_sigmas

METHODS = ("inversion", "inversion-free")


class Way(NamedTuple):
    """One side of an edit: what the MODEL is told, and how strongly.

    Attributes:
        model: the MODEL.
        positive: CONDITIONING.
        negative: CONDITIONING, or None where the scale is 1.
        scale: of CFG.
    """

    model: Any
    positive: Any
    negative: Any
    scale: float

    def guider(self) -> Any:
        """ComfyUI's guider for it.

        Raises:
            ValueError: guidance without a negative.
        """
        guider = comfy.samplers.CFGGuider(self.model)
        if self.scale == 1:
            guider.inner_set_conds({"positive": self.positive})
        elif self.negative is None:
            raise ValueError(
                f"A guidance of {self.scale:g} needs a negative conditioning, and none is connected. Connect "
                "'negative', or set the guidance to 1."
            )
        else:
            guider.set_conds(self.positive, self.negative)
        guider.set_cfg(self.scale)
        return guider


class Run(NamedTuple):
    """What the core's editing functions are called with, in ComfyUI's sampling."""

    field: Field
    predictor: Predictor | None
    image: Tensor
    noise: Tensor
    schedule: Schedule
    callback: Callable[[Step], None]
    chunk: int | None


class PathSampler(comfy.samplers.Sampler):
    """A SAMPLER that leaves ComfyUI's noise scaling out: it is given the image and does with it what `work` does.

    Args:
        work: from a `Run` to a flow state [B, C, *spatial], which becomes the guider's result, and its time.
        schedule: of the run.
    """

    def __init__(self, work: Callable[[Run], tuple[Tensor, float]], schedule: Schedule) -> None:
        self.work = work
        self.schedule = schedule

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
        options = options_for(model_wrap.model_patcher)
        sidenet = _sidenet_for(options, model_wrap)
        if sidenet is not None:
            check_latent(sidenet, noise)
        steps = len(schedule.times) - 1

        def told(values: dict[str, Any]) -> None:
            if callback is not None:
                callback(values["i"], values["denoised"], values["x"], steps)

        with tqdm(total=steps, disable=disable_pbar, desc="backbone calls") as progress:
            backbone = Backbone(model, {**extra_args, "denoise_mask": None}, schedule, noise.shape, progress.update)
            scale = getattr(model_wrap.inner_model.model_sampling, "noise_scale", 1.0)
            state, time = self.work(
                Run(
                    field=_field(backbone, sidenet, options, noise),
                    predictor=_predictor(backbone, sidenet),
                    image=latent_image,
                    noise=scale * noise,
                    schedule=schedule,
                    callback=_step_callback(schedule, noise.shape, told),
                    chunk=None if sidenet is None else sidenet_chunk(sidenet, noise),
                )
            )
        return schedule.path.from_flow(state, schedule.sigma_at(time).to(state))


def options_for(model: Any) -> Options:
    """The solver with the MODEL's SideNet, or the multistep method where it has none."""
    return Options() if applied_sidenet(model) is not None else Options("multistep")


# --- the grid -----------------------------------------------------------------------------------------------------


def editing_schedule(model: Any, calls: int, strength: float) -> Schedule:
    """The sigmas of an edit: a number of calls each way, from as far up as the strength says.

    Args:
        model: the MODEL; its SideNet's grid is used where it has one.
        calls: N, at least 2; the last step, from the inversion's start to the image, is one of them.
        strength: in (0, 1]; 1 = up to pure noise, as `denoise` elsewhere.

    Raises:
        ValueError: the MODEL is neither a flow nor a diffusion model, or the strength is too small for any step.
    """
    sampling = model.get_model_object("model_sampling")
    path = path_of(sampling)
    sidenet = applied_sidenet(model)
    sigmas = stretched_sigmas(sampling, calls - 1, strength, sidenet.card.time_grids if sidenet else {})
    # Diffusion models know no noise level below their smallest.
    lowest = float(path.times(torch.as_tensor(float(sampling.sigma_min), dtype=torch.float64)))
    start = max(START, lowest)
    times = path.times(sigmas.double())
    if times[0] <= start:
        raise ValueError(f"A strength of {strength:g} leaves nothing to edit. Set it higher; 0.6 to 1 is usual.")
    times = editing.editing_grid(times, start).float()
    return Schedule(path, path.sigmas(times.double()).float(), times)


# --- what a source path link carries ------------------------------------------------------------------------------


class HeldPath(NamedTuple):
    """A source path between nodes, with what it was made of.

    Attributes:
        source: on the CPU.
        latent: [B, C, *spatial] the image as it was given.
        schedule: its grid.
        kind, fingerprint: of the MODEL (`fit.ModelFacts`).
        sidenet: name and strength; None for the multistep method.
        way: the source's side, for the reconstruction.
        straight: whether it is the straight line of inversion-free editing.
    """

    source: SourcePath
    latent: Tensor
    schedule: Schedule
    kind: str
    fingerprint: str
    sidenet: tuple[str, float] | None
    way: Way
    straight: bool


def _moved(source: SourcePath, device: torch.device | str) -> SourcePath:
    return replace(
        source,
        states=tuple(state.to(device) for state in source.states),
        residuals={key: residual.to(device) for key, residual in source.residuals.items()},
    )


def _solver_of(model: Any) -> tuple[str, float] | None:
    sidenet = applied_sidenet(model)
    return None if sidenet is None else (sidenet.name, sidenet.strength)


def check_path(held: HeldPath, model: Any, latent: Tensor) -> None:
    """Refuse a source path that does not belong to a MODEL and an image.

    Raises:
        ValueError: it was made with another model, size, batch, image or SideNet.
    """
    facts, shape = facts_of(model), tuple(held.source.image.shape)
    if held.kind != facts.kind or held.fingerprint != facts.fingerprint:
        raise ValueError(
            f"The source path was made with another model (kind {held.kind!r}); this MODEL is of kind {facts.kind!r}"
            f"{'' if held.kind != facts.kind else ' with other weights'}. Use the MODEL that BA Invert used."
        )
    if shape != tuple(latent.shape):
        raise ValueError(
            f"The source path belongs to latents of {shape}; this image's are {tuple(latent.shape)}. Give BA Edit the "
            "latent that BA Invert was given."
        )
    # An image that was encoded again may differ by rounding.
    if not torch.allclose(held.latent, latent.to(held.latent), atol=0.01):
        raise ValueError(
            "The source path belongs to another image of this size. Give BA Edit the latent that BA Invert was given."
        )
    if held.sidenet != _solver_of(model):
        raise ValueError(
            f"The source path was made with {_named(held.sidenet)}, and this MODEL has {_named(_solver_of(model))}. "
            "An exact return needs the same on both."
        )


def _named(sidenet: tuple[str, float] | None) -> str:
    return "no SideNet" if sidenet is None else f"the SideNet {sidenet[0]!r} at strength {sidenet[1]:g}"


# --- the work -----------------------------------------------------------------------------------------------------


def sampled(
    way: Way, latent: Tensor, noise: Tensor, schedule: Schedule, work: Callable[[Run], tuple[Tensor, float]]
) -> Tensor:
    """Run `work` in ComfyUI's sampling; returns the latent that the state it ends in stands for."""
    steps = len(schedule.times) - 1
    out = way.guider().sample(
        noise,
        latent,
        PathSampler(work, schedule),
        schedule.sigmas,
        callback=latent_preview.prepare_callback(way.model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    )
    return out.to(comfy.model_management.intermediate_device())


def make_path(way: Way, latent: Tensor, schedule: Schedule, seed: int, method: str) -> tuple[HeldPath, Tensor]:
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
        more: dict[str, Any] = {"callback": run.callback, "chunk": run.chunk}
        arguments = (run.field, run.predictor, run.image)
        if straight:
            source = editing.straight_path(*arguments, run.noise, run.schedule.times, **more)
        else:
            source = editing.invert(*arguments, run.schedule.times, run.noise, **more)
        found.append(_moved(source, "cpu"))
        return source.noise, float(source.times[0])

    out = sampled(way, latent, comfy.sample.prepare_noise(latent, seed), schedule, work)
    facts = facts_of(way.model)
    solver = _solver_of(way.model)
    return HeldPath(found[0], latent.cpu(), schedule, facts.kind, facts.fingerprint, solver, way, straight), out


def edited(held: HeldPath, way: Way, latent: Tensor, control: Control, mask: Tensor | None) -> Tensor:
    """The image of a source path under the target's conditioning, as a latent; N calls."""

    def work(run: Run) -> tuple[Tensor, float]:
        source = _moved(held.source, run.noise.device)
        here = None if mask is None else _resized(mask, run.image)
        return (
            editing.edit(run.field, run.predictor, source, control, here, callback=run.callback, chunk=run.chunk),
            0.0,
        )

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


def reconstructed(held: HeldPath, latent: Tensor) -> Tensor:
    """What a path's inversion gives back without its residuals, as a latent; N calls, none for a straight path."""
    if held.straight:
        return latent

    def work(run: Run) -> tuple[Tensor, float]:
        source = _moved(held.source, run.noise.device)
        return editing.reconstruct(run.field, run.predictor, source, callback=run.callback, chunk=run.chunk), 0.0

    return sampled(held.way, latent, torch.zeros_like(latent), held.schedule, work)


class InvertedNoise:
    """A NOISE for stock samplers: what they scale into the image so that they start where its inversion ended.

    Args:
        model: the MODEL.
        held: an inversion's path.
    """

    seed = 0

    def __init__(self, model: Any, held: HeldPath) -> None:
        sampling = model.get_model_object("model_sampling")
        path: Path = held.schedule.path
        sigma = held.schedule.sigmas[0]
        state = path.from_flow(held.source.noise, sigma)
        top = bool(sigma >= float(sampling.sigma_max) * (1 - 1e-5))

        def scaled(noise: Tensor, image: Tensor) -> Tensor:
            return sampling.noise_scaling(sigma.reshape(1), noise, image, top).cpu()

        zeros = torch.zeros_like(state)
        factor = scaled(torch.ones_like(state), zeros)
        self.noise = (state - scaled(zeros, held.source.image)) / factor

    def generate_noise(self, input_latent: dict[str, Any]) -> Tensor:
        """The noise [B, C, *spatial] for a latent of the image's size.

        Raises:
            ValueError: it has another size.
        """
        shape = tuple(input_latent["samples"].shape)
        if shape != tuple(self.noise.shape):
            raise ValueError(
                f"The inverted noise belongs to latents of {tuple(self.noise.shape)}; the sampler was given {shape}. "
                "Connect the latent that was inverted."
            )
        return self.noise.clone()
