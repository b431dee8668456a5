"""Which model a MODEL is: a fingerprint of the weights as ComfyUI holds them, and of what was patched onto them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIT_RECORD = "ba_solver_sit"
# Numbers of each tensor that are looked at: models of 20 GB are told apart in a second.
LOOKED_AT = 16


@dataclass(frozen=True)
class Identity:
    """What is known of a MODEL's weights.

    Attributes:
        weights: fingerprint of the model's own weights.
        patches: of what lies on them (LoRA and the like); empty where nothing does.
    """

    weights: str
    patches: str = ""

    @property
    def whole(self) -> str:
        """Both in one."""
        return f"{self.weights}+{self.patches}" if self.patches else self.weights


def identity_of(model: Any) -> Identity:
    """Look at a MODEL's weights and patches. Those of a SiT are known from its file, all numbers of it."""
    known = model.get_attachment(SIT_RECORD)
    return Identity(known or _weights(model), _patches(model))


def _weights(model: Any) -> str:
    digest = hashlib.sha256()
    prefix = "diffusion_model."
    for name, value in sorted(model.model.diffusion_model.state_dict().items()):
        # Where a LoRA has been added to a weight on its way to the GPU, the weight itself is kept here.
        kept = model.backup.get(prefix + name)
        _look_at(digest, name, value if kept is None else kept.weight)
    return digest.hexdigest()[:16]


def _patches(model: Any) -> str:
    if not model.patches:
        return ""
    digest = hashlib.sha256()
    for key in sorted(model.patches, key=str):
        for strength, patch, kept, *_ in model.patches[key]:
            digest.update(f"{key} {strength} {kept}".encode())
            for tensor in _tensors(patch):
                _look_at(digest, "", tensor)
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


def _look_at(digest: Any, name: str, value: Any) -> None:
    """A tensor's name, sizes and some of its numbers; of a loader's own kind of tensor, what it tells."""
    digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
    try:
        plain = value.detach().as_subclass(Tensor).flatten()
        places = torch.linspace(0, plain.numel() - 1, min(LOOKED_AT, plain.numel())).long()
        digest.update(plain[places.to(plain.device)].cpu().view(torch.uint8).numpy().tobytes())
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return  # a tensor of a loader's own that does not let its numbers be picked: name, sizes and kind must do
