"""The source trajectory as it travels between nodes, and the noise at its end."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...bas_core.editing import SourceTrajectory
from ..models.attach import applied_sidenet
from ..models.compatibility import facts_of
from ..models.parameterization import SigmaSchedule
from ..sampling.start import noise_in


class SourceTrajectoryLink(NamedTuple):
    """A source trajectory between nodes, with the inputs that it was made of.

    Attributes:
        source: on the CPU.
        latent: [B, C, *spatial] the image.
        mask: its noise mask, which the model was told of; None without one.
        schedule: its sigmas and times.
        kind, fingerprint: of the MODEL (`compatibility.ModelFacts`).
        sidenet: name and strength; None for the multistep method.
        guider: of the source prompt, for the reconstruction.
        straight: whether it is the straight line of inversion-free editing.
    """

    source: SourceTrajectory
    latent: Tensor
    mask: Tensor | None
    schedule: SigmaSchedule
    kind: str
    fingerprint: str
    sidenet: tuple[str, float] | None
    guider: Any
    straight: bool


def sidenet_of(model: Any) -> tuple[str, float] | None:
    """Name and strength of a MODEL's SideNet; None without one."""
    sidenet = applied_sidenet(model)
    return None if sidenet is None else (sidenet.name, sidenet.strength)


def check_trajectory(trajectory: SourceTrajectoryLink, model: Any, latent: Tensor) -> None:
    """Refuse a source trajectory that does not belong to a MODEL and an image.

    Raises:
        ValueError: it was made with another model, size, batch, image or SideNet.
    """
    facts, shape = facts_of(model), tuple(trajectory.source.image.shape)
    if trajectory.kind != facts.kind or trajectory.fingerprint != facts.fingerprint:
        weights = " with other weights" if trajectory.kind == facts.kind else ""
        raise ValueError(
            f"The source trajectory was made with another model (kind {trajectory.kind!r}); this MODEL is of kind "
            f"{facts.kind!r}{weights}. Use the MODEL that BA Invert used."
        )
    if shape != tuple(latent.shape):
        raise ValueError(
            f"The source trajectory belongs to latents of {shape}; this image's are {tuple(latent.shape)}. Connect the "
            "latent that BA Invert was given."
        )
    # An image that was encoded again may differ by rounding.
    if not torch.allclose(trajectory.latent, latent.to(trajectory.latent), atol=0.01):
        raise ValueError(
            "The source trajectory belongs to another image of this size. Connect the latent that BA Invert was given."
        )
    if trajectory.sidenet != sidenet_of(model):
        raise ValueError(
            f"The source trajectory was made with {_in_words(trajectory.sidenet)}, and this MODEL has "
            f"{_in_words(sidenet_of(model))}. An exact return needs the same on both."
        )


def _in_words(sidenet: tuple[str, float] | None) -> str:
    return "no SideNet" if sidenet is None else f"the SideNet {sidenet[0]!r} at strength {sidenet[1]:g}"


class InvertedNoise:
    """A NOISE from which stock samplers start where an image's inversion ends.

    Args:
        model: the MODEL.
        trajectory: of the inversion.
    """

    seed = 0

    def __init__(self, model: Any, trajectory: SourceTrajectoryLink) -> None:
        sampling = model.get_model_object("model_sampling")
        sigma = trajectory.schedule.sigmas[0]
        state = trajectory.schedule.parameterization.from_flow(trajectory.source.noise, sigma)
        top = bool(sigma >= float(sampling.sigma_max) * (1 - 1e-5))
        self.noise = noise_in(sampling, sigma, state, trajectory.source.image, top)

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
