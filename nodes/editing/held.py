"""What a source path link carries between nodes, and whether it belongs where it is connected."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...bas_core.editing import SourcePath
from ..models.attach import applied_sidenet
from ..models.compatibility import facts_of
from ..models.parameterization import Parameterization, SigmaSchedule


class HeldPath(NamedTuple):
    """A source path between nodes, with what it was made of.

    Attributes:
        source: on the CPU.
        latent: [B, C, *spatial] the image as it was given.
        schedule: its grid.
        kind, fingerprint: of the MODEL (`fit.ModelFacts`).
        sidenet: name and strength; None for the multistep method.
        guider: of the source prompt, for the reconstruction.
        straight: whether it is the straight line of inversion-free editing.
    """

    source: SourcePath
    latent: Tensor
    schedule: SigmaSchedule
    kind: str
    fingerprint: str
    sidenet: tuple[str, float] | None
    guider: Any
    straight: bool


def solver_of(model: Any) -> tuple[str, float] | None:
    """Name and strength of a MODEL's SideNet: whether two MODELs are sampled the same way."""
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
    if held.sidenet != solver_of(model):
        raise ValueError(
            f"The source path was made with {_named(held.sidenet)}, and this MODEL has {_named(solver_of(model))}. "
            "An exact return needs the same on both."
        )


def _named(sidenet: tuple[str, float] | None) -> str:
    return "no SideNet" if sidenet is None else f"the SideNet {sidenet[0]!r} at strength {sidenet[1]:g}"


class InvertedNoise:
    """A NOISE for stock samplers: what they scale into the image so that they start where its inversion ended.

    Args:
        model: the MODEL.
        held: an inversion's path.
    """

    seed = 0

    def __init__(self, model: Any, held: HeldPath) -> None:
        sampling = model.get_model_object("model_sampling")
        path: Parameterization = held.schedule.parameterization
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
