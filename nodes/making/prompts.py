"""A guider over many prompts: ComfyUI prepares each as it does for a sampling of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..models.labels import KEY, conditioning_of
from ..sampling.callback_sampler import CallbackSampler, Prepared
from ..sampling.guider import set_prompts

Conditions = dict[str, list[dict[str, Any]]]


class PromptsGuider(comfy.samplers.CFGGuider):
    """ComfyUI's guider with several positives in turn.

    While it samples, `prepared` holds for each prompt the conditions that ComfyUI made of it. Set as `conds`, they
    guide the next model call. Areas, masks and ControlNets of one prompt do not reach another.

    Args:
        model: a MODEL.
        positives: CONDITIONINGs.
        negative: a CONDITIONING, or None.
        cfg: scale.

    Raises:
        ValueError: a CFG scale other than 1 without a negative.
    """

    conds: Conditions

    def __init__(self, model: Any, positives: Sequence[Any], negative: Any, cfg: float) -> None:
        super().__init__(model)
        self.names = [f"positive {number}" for number in range(len(positives))]
        set_prompts(self, dict(zip(self.names, positives, strict=True)), negative, cfg)
        self.prepared: list[Conditions] = []

    def inner_sample(
        self, noise: Tensor, latent: Tensor, device: Any, sampler: CallbackSampler, *rest: Any, **more: Any
    ) -> Tensor:
        """Have every prompt prepared, then run the sampler."""
        every: Conditions = self.conds
        self.prepared = []

        def run(prepared: Prepared) -> Tensor:
            self.prepared.append(self.conds)
            return sampler.run(prepared) if len(self.prepared) == len(self.names) else prepared.model.noise

        try:
            for name in self.names:
                alone = {"positive": every[name], **{side: every[side] for side in ("negative",) if side in every}}
                self.conds = {side: [one.copy() for one in conditions] for side, conditions in alone.items()}
                end = super().inner_sample(noise, latent, device, CallbackSampler(run), *rest, **more)
            return end
        finally:
            self.conds = every  # so that ComfyUI cleans up after all of them
            self.prepared = []


def each_alone(positives: Sequence[Any]) -> list[Any]:
    """The CONDITIONINGs; one that names a class for each image of a batch becomes one for each class."""
    found = []
    for positive in positives:
        labels = positive[0][1].get(KEY) if len(positive) == 1 else None
        found += [conditioning_of(label[None]) for label in labels] if labels is not None else [positive]
    return found


def class_labels(positives: Sequence[Any]) -> list[int] | None:
    """The class that each CONDITIONING names; None where one names none."""
    found = [positive[0][1].get(KEY) for positive in positives]
    return None if any(label is None for label in found) else [int(label[0]) for label in found]


def digest_of(conditionings: Sequence[Any]) -> str:
    """Tells one list of CONDITIONINGs from another, by their tensors and plain values."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                add(part)
        else:  # objects, such as a ControlNet, count by their class alone
            plain = isinstance(value, str | int | float | bool | None)
            digest.update((repr(value) if plain else type(value).__name__).encode())

    for conditioning in conditionings:
        add(conditioning)
    return digest.hexdigest()[:16]
