"""A guider over many prompts: ComfyUI prepares each as it does for a sampling of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..models.labels import KEY, conditioning_of
from ..sampling.guider import set_prompts

Conditions = dict[str, list[dict[str, Any]]]


class _Noting(comfy.samplers.Sampler):
    """A SAMPLER that samples nothing, and tells that ComfyUI is ready for it."""

    def __init__(self, ready: Callable[..., None]) -> None:
        self.ready = ready

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *rest: Any
    ) -> Tensor:
        """Called by ComfyUI's guiders; the arguments are theirs."""
        self.ready(model_wrap, sigmas, extra_args, noise, *rest)
        return noise


class Prompts(comfy.samplers.CFGGuider):
    """ComfyUI's guider with several positives in turn.

    While it samples, `prepared` holds for each prompt the conditions that ComfyUI made of it: set as `conds`, they are
    what the next model call is guided by. Areas, masks and ControlNets of one prompt do not reach another.

    Args:
        model: a MODEL.
        positives: CONDITIONINGs.
        negative: a CONDITIONING, or None.
        cfg: scale.

    Raises:
        ValueError: a CFG scale without a negative.
    """

    conds: Conditions

    def __init__(self, model: Any, positives: Sequence[Any], negative: Any, cfg: float) -> None:
        super().__init__(model)
        self.names = [f"positive {number}" for number in range(len(positives))]
        set_prompts(self, dict(zip(self.names, positives, strict=True)), negative, cfg)
        self.prepared: list[Conditions] = []

    def inner_sample(self, noise: Tensor, latent: Tensor, device: Any, sampler: Any, *rest: Any, **more: Any) -> Tensor:
        """Have every prompt prepared, then sample."""
        given: Conditions = self.conds
        negative = {"negative": given["negative"]} if "negative" in given else {}
        self.prepared = []

        def prepared(*_: Any) -> None:
            self.prepared.append(self.conds)

        def last(*arguments: Any) -> None:
            prepared()
            sampler.sample(*arguments)

        try:
            for name in self.names:
                alone = {"positive": given[name], **negative}
                self.conds = {side: [one.copy() for one in conditions] for side, conditions in alone.items()}
                on = _Noting(last if name == self.names[-1] else prepared)
                end = super().inner_sample(noise, latent, device, on, *rest, **more)
            return end
        finally:
            self.conds = given  # all of them, so that ComfyUI cleans up after all of them
            self.prepared = []


def each_alone(positives: Sequence[Any]) -> list[Any]:
    """The CONDITIONINGs, those that name a class for each image of a batch taken apart."""
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
        else:  # what rides on it, such as a ControlNet, is known by its kind alone
            plain = isinstance(value, str | int | float | bool | None)
            digest.update((repr(value) if plain else type(value).__name__).encode())

    for conditioning in conditionings:
        add(conditioning)
    return digest.hexdigest()[:16]
