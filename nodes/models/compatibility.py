"""Whether a SideNet and a MODEL belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .attach import LoadedSideNet
from .identity import UNREAD, Identity, identity_of
from .parameterization import parameterization_of

# Kinds that the trainer writes for models outside ComfyUI; ComfyUI calls their classes something else.
OTHER_LIBRARIES = ("diffusers", "python")


@dataclass(frozen=True)
class ModelFacts:
    """What the checks need to know of a MODEL.

    Attributes:
        kind: "sit", or ComfyUI's name of the model class in lower case ("flux", "sd3", "wan21", "sdxl" …).
        channels, dimensions: of its latents; 2 = images, 3 = video, 1 = audio.
        identity: of its weights and patches; None where it is not known.
    """

    kind: str
    channels: int
    dimensions: int
    identity: Identity | None = None

    @property
    def fingerprint(self) -> str:
        """Of the weights without patches; empty where it is not known."""
        return self.identity.weights if self.identity else ""


def facts_of(model: Any) -> ModelFacts:
    """The facts of a MODEL.

    Raises:
        ValueError: the MODEL is neither a flow nor a diffusion model.
    """
    parameterization_of(model.get_model_object("model_sampling"))
    latent = model.get_model_object("latent_format")
    return ModelFacts(
        kind=type(model.model).__name__.lower(),
        channels=latent.latent_channels,
        dimensions=latent.latent_dimensions,
        identity=identity_of(model),
    )


def errors(sidenet: LoadedSideNet, facts: ModelFacts) -> list[str]:
    """Why this SideNet cannot work on this model; empty where it can."""
    name, config, backbone = sidenet.name, sidenet.network.config, sidenet.card.backbone
    found = []
    if facts.dimensions not in (2, 3):
        found.append("SideNets take images and videos, and this MODEL makes audio.")
    if config.in_channels != facts.channels:
        found.append(
            f"{name!r} takes latents of {config.in_channels} channels, and this MODEL's have {facts.channels}."
        )
    kind = backbone.get("kind", "").lower()
    if kind and kind not in OTHER_LIBRARIES and kind != facts.kind:
        found.append(f"{name!r} was made for {backbone.get('name') or kind}, and this MODEL is of kind {facts.kind!r}.")
    return found


def warnings(sidenet: LoadedSideNet, facts: ModelFacts) -> list[str]:
    """Why this SideNet may be less accurate on this model than it should be."""
    backbone = sidenet.card.backbone
    kind, known = backbone.get("kind", "").lower(), backbone.get("fingerprint", "")
    identity = facts.identity
    if identity is not None and known == identity.whole and UNREAD not in known:
        return []
    if not kind:
        return [f"{sidenet.name!r} does not say which model it was made for; its channels fit, and no more is known."]
    if kind in OTHER_LIBRARIES:  # their fingerprints are of weights under other names
        return [
            f"{sidenet.name!r} was made for {backbone.get('name') or 'a model'} outside ComfyUI, and this MODEL is of "
            f"kind {facts.kind!r}; the channels fit, and no more can be compared. See that the two are the same model."
        ]
    if not known or identity is None:
        return []
    made_for = f"{sidenet.name!r} was made for"
    return [
        {
            "same": f"{made_for} this very model, but with other things on it than now (LoRA and the like). It runs, "
            "and is less accurate the more they change.",
            "precision": f"{made_for} this model at another precision ({backbone.get('precision')}; this MODEL is "
            f"{identity.precision}), or for a near relative. It runs, and is about as accurate.",
            "unknown": f"{made_for} {backbone.get('name') or 'a model'}; whether it was this one cannot be told, "
            f"because of how the weights are stored ({backbone.get('precision')}; here {identity.precision}).",
            "other": f"{made_for} {backbone.get('name') or 'other weights'}, and this MODEL has other weights. It "
            "runs, and is less accurate the more they differ.",
        }[identity.relation(backbone)]
    ]
