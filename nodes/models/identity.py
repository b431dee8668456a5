"""Fingerprints of a MODEL: of its weights, and of the patches on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIT_RECORD = "ba_solver_sit"
# Numbers of each tensor that are hashed: models of 20 GB are told apart in a second.
SAMPLED = 16


@dataclass(frozen=True)
class Identity:
    """Fingerprints of a MODEL.

    Attributes:
        weights: of the model's own weights.
        patches: of weight patches (LoRA and the like); empty without any.
    """

    weights: str
    patches: str = ""

    @property
    def whole(self) -> str:
        """Both in one."""
        return f"{self.weights}+{self.patches}" if self.patches else self.weights


def identity_of(model: Any) -> Identity:
    """Fingerprints of a MODEL; a SiT's weights have that of its file, over all numbers."""
    from_file = model.get_attachment(SIT_RECORD)
    return Identity(from_file or _weights(model), _patches(model))


def _weights(model: Any) -> str:
    digest = hashlib.sha256()
    prefix = "diffusion_model."
    network = model.model.diffusion_model
    parameters = dict(network.named_parameters())
    for name, value in sorted(network.state_dict().items()):
        # GGUF loaders show empty tensors here, and keep the quantised bytes in the parameters themselves.
        value = parameters.get(name, value) if value.is_meta else value
        # Where a LoRA has been added to a weight on its way to the GPU, ComfyUI keeps the weight itself here.
        backup = model.backup.get(prefix + name)
        _add_tensor(digest, name, value if backup is None else backup.weight)
    return digest.hexdigest()[:16]


def _patches(model: Any) -> str:
    if not model.patches:
        return ""
    digest = hashlib.sha256()
    for key in sorted(model.patches, key=str):
        for strength, patch, strength_model, *_ in model.patches[key]:
            digest.update(f"{key} {strength} {strength_model}".encode())
            for tensor in _tensors(patch):
                _add_tensor(digest, "", tensor)
    return digest.hexdigest()[:8]


def _tensors(patch: Any) -> Iterator[Tensor]:
    """The tensors of a weight patch, which is a tensor, a tuple, or one of ComfyUI's adapters."""
    if isinstance(patch, Tensor):
        yield patch
    elif isinstance(patch, tuple | list):
        for part in patch:
            yield from _tensors(part)
    else:
        yield from _tensors(getattr(patch, "weights", ()))


def _add_tensor(digest: Any, name: str, value: Any) -> None:
    """Add a tensor's name, shape, dtype and some of its numbers."""
    digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
    try:
        plain = value.detach().as_subclass(Tensor).flatten()
        places = torch.linspace(0, plain.numel() - 1, min(SAMPLED, plain.numel()), dtype=torch.float64).long()
        digest.update(plain[places.to(plain.device)].cpu().view(torch.uint8).numpy().tobytes())
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return  # a loader's own kind of tensor that does not let its numbers be picked
