"""Inversion and editing in ComfyUI's sampling: `bas_core.editing` on the velocities that ComfyUI gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...bas_core import editing
from ...bas_core.editing import Control, SourceTrajectory
from ..models.compatibility import facts_of
from ..models.parameterization import SigmaSchedule
from ..sampling.callback_sampler import CallbackSampler, Prepared
from ..sampling.sampler import Options, SolverInputs, open_solver, step_callback
from ..sampling.start import Latent
from .source_trajectory import InvertedNoise, SourceTrajectoryLink, sidenet_of

METHODS = ("inversion", "inversion-free")

# Takes the solver's inputs, flow states of image and noise [B, C, *spatial], and further arguments of the core's
# functions; returns the state that becomes the result, and its flow time.
Stage = Callable[[SolverInputs, Tensor, Tensor, dict[str, Any]], tuple[Tensor, float]]


def source_trajectory(
    guider: Any, latent: Latent, sigmas: SigmaSchedule, seed: int, method: str
) -> tuple[SourceTrajectoryLink, Tensor]:
    """The source trajectory of an image; N model calls.

    Args:
        guider: of the source prompt, from `guider_for`.
        latent: as ComfyUI's nodes hand it on.
        sigmas: from `editing_schedule`.
        seed: of the noise that the image is mixed with: a little where it is inverted, wholly on a straight trajectory.
        method: one of METHODS.

    Returns:
        The trajectory, and the latent of its noisy end.
    """
    found: list[SourceTrajectory] = []
    straight = method == METHODS[1]

    def stage(solver: SolverInputs, image: Tensor, noise: Tensor, more: dict[str, Any]) -> tuple[Tensor, float]:
        if straight:
            source = editing.straight_trajectory(solver.field, solver.predictor, image, noise, sigmas.times, **more)
        else:
            source = editing.invert(solver.field, solver.predictor, image, sigmas.times, noise, **more)
        found.append(_on_device(source, "cpu"))
        return source.noise, float(source.times[0])

    end = _sample(guider, latent, latent.noise(seed), sigmas, stage, _warns_for_source(guider))
    model = guider.model_patcher
    facts = facts_of(model)
    solver_used = sidenet_of(model)
    return SourceTrajectoryLink(
        found[0],
        latent.samples.cpu(),
        latent.mask,
        sigmas,
        facts.kind,
        facts.fingerprint,
        solver_used,
        guider,
        straight,
    ), end


def edit(
    trajectory: SourceTrajectoryLink, guider: Any, latent: Tensor, control: Control, mask: Tensor | None
) -> Tensor:
    """The image of a source trajectory under the target's prompt, as a latent; N model calls."""

    def stage(solver: SolverInputs, image: Tensor, noise: Tensor, more: dict[str, Any]) -> tuple[Tensor, float]:
        source = _on_device(trajectory.source, noise.device)
        resized = None if mask is None else _resized(mask, image)
        return editing.edit(solver.field, solver.predictor, source, control, resized, **more), 0.0

    noise = InvertedNoise(guider.model_patcher, trajectory).noise
    return _sample(guider, Latent(latent, trajectory.mask), noise, trajectory.schedule, stage)


def reconstruct(trajectory: SourceTrajectoryLink) -> Tensor:
    """What an inversion gives back without its residuals, as a latent; N model calls, none if it is straight."""
    latent = trajectory.latent
    if trajectory.straight:
        return latent

    def stage(solver: SolverInputs, image: Tensor, noise: Tensor, more: dict[str, Any]) -> tuple[Tensor, float]:
        source = _on_device(trajectory.source, noise.device)
        return editing.reconstruct(solver.field, solver.predictor, source, **more), 0.0

    guider = trajectory.guider
    noise = InvertedNoise(guider.model_patcher, trajectory).noise
    start = Latent(latent, trajectory.mask)
    return _sample(guider, start, noise, trajectory.schedule, stage, _warns_for_source(guider))


def _warns_for_source(guider: Any) -> bool:
    # At CFG 1 an edit's way to noise is right whatever scale the SideNet was made for: the residuals return its errors.
    return bool(guider.cfg != 1)


def _sample(
    guider: Any, latent: Latent, noise: Tensor, sigmas: SigmaSchedule, stage: Stage, warns: bool = True
) -> Tensor:
    """Run a stage in ComfyUI's sampling; returns the latent of the state that it ends in."""
    steps = len(sigmas.times) - 1

    def run(prepared: Prepared) -> Tensor:
        model, callback = prepared.model, prepared.callback

        def preview(values: dict[str, Any]) -> None:
            if callback is not None:
                callback(values["i"], values["denoised"], values["x"], steps)

        scale = getattr(model.inner_model.inner_model.model_sampling, "noise_scale", 1.0)
        extra_args, disable = prepared.extra_args, prepared.disable
        with open_solver(model, extra_args, sigmas, model.noise, Options(), disable, rewinds=True) as solver:
            if warns:
                solver.warn()
            more = {"callback": step_callback(sigmas, model.noise.shape, preview, steps), "chunk": solver.chunk}
            state, time = stage(solver, model.latent_image, scale * model.noise, more)
        return sigmas.parameterization.from_flow(state, sigmas.sigma_at(time).to(state))

    out = guider.sample(
        noise,
        latent.samples,
        CallbackSampler(run),
        sigmas.sigmas,
        latent.mask,
        callback=latent_preview.prepare_callback(guider.model_patcher, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    )
    return out.to(comfy.model_management.intermediate_device())


def _on_device(source: SourceTrajectory, device: torch.device | str) -> SourceTrajectory:
    return replace(
        source,
        states=tuple(state.to(device) for state in source.states),
        residuals={key: residual.to(device) for key, residual in source.residuals.items()},
    )


def _resized(mask: Tensor, image: Tensor) -> Tensor:
    """The mask at the latent's size, as ComfyUI resizes masks.

    Raises:
        ValueError: nothing of it is left at that size.
    """
    resized = comfy.utils.reshape_mask(mask.float(), image.shape).clamp(0, 1).to(image.device)
    if not torch.count_nonzero(resized):
        size = "x".join(str(side) for side in reversed(image.shape[2:]))
        raise ValueError(
            f"What the mask shows is lost where it is made as small as the latent, {size}. Paint a larger place."
        )
    return resized
