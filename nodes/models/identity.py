"""Fingerprints of a MODEL: of its weights, and of the patches on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIT_RECORD = "ba_solver_sit"
# Numbers of each tensor that are hashed: models of 20 GB are told apart in a second.
SAMPLED = 16
# A sketch has so many numbers of so many matrices, each over the root mean square of those of its matrix, in STEP-ths.
MATRICES, NUMBERS, STEP = 24, 8, 1 / 32
# Sketches of one model at two precisions correlate by more: measured .999 for float8, .99 for 4-bit integers; those of
# two models by some hundredths.
ALIKE = 0.9
# In a fingerprint of weights that a loader does not let be read.
UNREAD = "?"


@dataclass(frozen=True)
class Identity:
    """Fingerprints of a MODEL.

    Attributes:
        weights: of the model's own weights as they are stored; ends in UNREAD where some cannot be read.
        patches: of weight patches (LoRA and the like); empty without any.
        precision: what the weights are stored as.
        sketch: some weights as numbers, which other precisions share but for rounding; empty where they are unknown.
    """

    weights: str
    patches: str = ""
    precision: str = ""
    sketch: str = ""

    @property
    def whole(self) -> str:
        """Weights and patches in one."""
        return f"{self.weights}+{self.patches}" if self.patches else self.weights

    def relation(self, stored: Mapping[str, str]) -> str:
        """What the model of a SideNet's card is to this one, by its weights.

        Returns:
            "same", "precision" (as far as can be told the same at another precision), "unknown", or "other".
        """
        before = stored.get("fingerprint", "").partition("+")[0]
        if not before or UNREAD in before + self.weights:
            return "unknown"
        if before == self.weights:
            return "same"
        if stored.get("precision", self.precision) == self.precision:
            return "other"
        alike = _alike(stored.get("sketch", ""), self.sketch)
        return "unknown" if alike is None else "precision" if alike > ALIKE else "other"


def identity_of(model: Any) -> Identity:
    """Fingerprints of a MODEL; a SiT's weights have that of its file, over all numbers."""
    tensors = dict(_stored_tensors(model))
    precision, sketch = _sketch(tensors)
    return Identity(model.get_attachment(SIT_RECORD) or _weights(tensors), _patches(model), precision, sketch)


def _stored_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The network's tensors by name as their loader holds them, in order, without what ComfyUI has patched in."""
    network = model.model.diffusion_model
    # GGUF loaders show empty tensors in the dictionary, and keep the quantised bytes in the parameters themselves.
    known = {name: value for name, value in network.state_dict().items() if not value.is_meta}
    known |= dict(network.named_parameters())
    for name, value in sorted(known.items()):
        # Where a LoRA has been added to a weight on its way to the GPU, ComfyUI keeps the weight itself here.
        backup = model.backup.get(f"diffusion_model.{name}")
        # A network that is compiled has another name while it is.
        yield name.replace("_orig_mod.", ""), value if backup is None else backup.weight


def _weights(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    read = [_add_tensor(digest, name, value) for name, value in tensors.items()]
    return digest.hexdigest()[:16] + ("" if all(read) else UNREAD)


def _sketch(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """How the weights are stored, and the sketch: for each matrix a mark of its name and its numbers, in hex."""
    found, stored = [], set()
    matrices = [name for name, value in tensors.items() if len(value.shape) > 1 and name.endswith("weight")]
    for mark, name in sorted((hashlib.sha256(name.encode()).hexdigest()[:8], name) for name in matrices)[:MATRICES]:
        value = tensors[name]
        kind = "" if type(value) in (Tensor, torch.nn.Parameter) else f"{type(value).__name__} "
        stored.add(f"{kind}{str(value.dtype).removeprefix('torch.')}")
        numbers = _numbers(value, NUMBERS)
        if numbers is None or numbers.dtype == torch.uint8:  # packed: bytes say nothing of the numbers
            found.append("")
            continue
        scaled = numbers.double() / numbers.double().square().mean().sqrt().clamp_min(1e-30) / STEP
        found.append(mark + scaled.round().clamp(-128, 127).to(torch.int8).numpy().tobytes().hex())
    return ", ".join(sorted(stored)), "" if "" in found else "".join(found)


def _alike(sketch: str, other: str) -> float | None:
    """The correlation of two sketches; None where too few matrices are in both."""
    size = 8 + 2 * NUMBERS
    one, two = (
        {text[i : i + 8]: bytes.fromhex(text[i + 8 : i + size]) for i in range(0, len(text), size)}
        for text in (sketch, other)
    )
    common = sorted(one.keys() & two.keys())
    if 2 * len(common) < max(len(one), len(two), 1):
        return None
    pair = torch.stack(
        [torch.frombuffer(bytearray(b"".join(part[mark] for mark in common)), dtype=torch.int8) for part in (one, two)]
    )
    return float(torch.corrcoef(pair.double())[0, 1])


def _numbers(value: Tensor, count: int) -> Tensor | None:
    """Some numbers of a tensor, on the CPU; None for a loader's own kind that does not let them be picked."""
    for plain in (lambda: value.detach().as_subclass(Tensor), lambda: value.detach().dequantize()):
        try:
            flat = plain().flatten()
            places = torch.linspace(0, flat.numel() - 1, min(count, flat.numel()), dtype=torch.float64).long()
            picked = flat[places.to(flat.device)].cpu()
            return picked.as_subclass(Tensor).contiguous() if picked.numel() else picked
        except (RuntimeError, TypeError, NotImplementedError, AttributeError):
            continue
    return None


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


def _add_tensor(digest: Any, name: str, value: Any) -> bool:
    """Add a tensor's name, shape, dtype and some of its numbers; returns whether these could be read."""
    digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
    numbers = _numbers(value, SAMPLED)
    if numbers is not None:
        digest.update(numbers.view(torch.uint8).numpy().tobytes())
    return numbers is not None
