"""A MODEL as the trainer's backbone, called as in sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...bas_core.guidance import CFGMode, Evaluate, Field, Guidance
from ...training.backbones.base import Backbone, Within
from ..models.identity import Identity, identity_of
from ..models.parameterization import AnySigma, flow_time, parameterization_of
from ..models.sit_model import find_sit_config
from ..sampling.callback_sampler import CallbackSampler, Prepared
from ..sampling.field import WHOLE_RANGE
from ..sampling.guider import sidenet_guidance
from ..sampling.model_caller import ModelCaller
from .prompts import PromptsGuider, class_labels, digest_of, each_alone


@dataclass(frozen=True)
class ComfyBackbone(Backbone):
    """A MODEL with its prompts. Its velocities are those of the guider, with everything that is on the MODEL.

    Attributes:
        guider: over all prompts.
        weights: fingerprints of the MODEL.
        on_samples: is given the number of samples of each model call.
        prepared: ComfyUI's model function; empty while ComfyUI does not sample.
    """

    guider: Any = None
    weights: Identity = dataclasses.field(default_factory=lambda: Identity(""))
    on_samples: Callable[[int], None] = lambda samples: None
    prepared: list[Prepared] = dataclasses.field(default_factory=list)

    def field(
        self,
        conditions: Tensor,
        scale: float,
        interval: tuple[float, float] = WHOLE_RANGE,
        cfg_mode: CFGMode = "combined",
    ) -> Field:
        """The field of some prompts [B], by number; with its two branches, where CFG is ComfyUI's own.

        Raises:
            ValueError: a CFG interval, which is not recorded in ComfyUI.
        """
        if tuple(interval) != WHOLE_RANGE:
            raise ValueError(f"ComfyUI's guider guides at all times; the interval {interval} is not possible here.")
        labels = conditions if self.num_classes else None
        caller = self._caller(())
        if caller.cfg != 1 and caller.can_split:
            branches = self._by_prompt(conditions, ModelCaller.branches)
            return Field(branches, (labels, None), Guidance(caller.cfg), combined=True, scale=scale)
        combined = self._by_prompt(conditions, lambda caller, x, t, count: caller.combined(x, t)[None])
        return Field(combined, (labels,), scale=scale)

    def _caller(self, shape: Sequence[int]) -> ModelCaller:
        """Calls the model with states of a shape.

        Raises:
            RuntimeError: ComfyUI is not sampling.
        """
        if not self.prepared:
            raise RuntimeError("The model can be called within `within` only.")
        model, extra_args, *_ = self.prepared[-1]
        sigmas = AnySigma(parameterization_of(model.inner_model.inner_model.model_sampling))
        samples = shape[0] if shape else 0
        return ModelCaller(model, extra_args, sigmas, torch.Size(shape), lambda: self.on_samples(samples))

    def _by_prompt(self, conditions: Tensor, call: Callable[[ModelCaller, Tensor, Tensor, int], Tensor]) -> Evaluate:
        """Calls the model for each prompt with its samples, and puts their velocities [K, B, C, *spatial] together."""

        def evaluate(x: Tensor, t: Tensor, count: int) -> Tensor:
            found = x.new_empty(count, *x.shape)
            for prompt in conditions.unique().tolist():
                rows = (conditions == prompt).nonzero()[:, 0].to(x.device)
                self.guider.conds = self.guider.prepared[prompt]
                found[:, rows] = call(self._caller(x[rows].shape), x[rows], t[rows], count)
            return found

        return evaluate

    def sidenet_guidance(self) -> float:
        """The guidance that SideNets for this model are made for; see `guider.sidenet_guidance`."""
        self.guider.conds = self.guider.prepared[0]
        return sidenet_guidance(self.guider)

    @property
    def identity(self) -> dict[str, str]:
        return {**super().identity, "weights": self.weights.weights, "patches": self.weights.patches}


def default_shift(model_sampling: Any) -> float:
    """The time shift that a flow model is sampled with, read off the middle of its times; 1 for diffusion models."""
    if parameterization_of(model_sampling).exploding:
        return 1.0
    middle = float(model_sampling.percent_to_sigma(0.5))
    return middle / (1 - middle)


def open_model(
    model: Any,
    positives: Sequence[Any],
    negative: Any,
    cfg: float,
    latent: Tensor,
    on_samples: Callable[[int], None],
    batch: int = 1,
) -> ComfyBackbone:
    """A MODEL as a backbone.

    Args:
        model: a MODEL.
        positives, negative, cfg: its guidance.
        latent: [B, C, *spatial] in the model's channels; its size is taken.
        on_samples: is given the number of samples of each model call.
        batch: of the largest model call, for which ComfyUI keeps memory free.

    Raises:
        ValueError: a CFG scale without a negative, or a model that is neither a flow nor a diffusion model.
    """
    alone = each_alone(positives)
    guider = PromptsGuider(model, alone, negative, cfg)
    model_sampling = model.get_model_object("model_sampling")
    parameterization = parameterization_of(model_sampling)
    labels, sit = class_labels(alone), find_sit_config(model)
    classes = sit.num_classes if sit else 0
    every_class = labels is not None and labels == list(range(classes))
    opened: list[Prepared] = []
    weights = identity_of(model)

    return ComfyBackbone(
        name=type(model.model).__name__,
        kind=type(model.model).__name__.lower(),
        fingerprint=weights.whole,
        shape=tuple(latent.shape[1:]),
        velocity=_no_velocity,
        conditions=len(alone),
        num_classes=classes if every_class else 0,
        embedded_guidance=True,
        patch_size=sit.patch_size if sit else Backbone.patch_size,
        shift=default_shift(model_sampling),
        start=flow_time(model_sampling, model_sampling.sigma_max) if parameterization.exploding else 1.0,
        device=comfy.model_management.get_torch_device(),
        conditions_digest=digest_of([*alone, *([negative] if "negative" in guider.original_conds else [])]),
        within=_within(guider, opened, (batch, *latent.shape[1:])),
        make_room=make_room,
        guider=guider,
        weights=weights,
        on_samples=on_samples,
        prepared=opened,
    )


def _within(guider: PromptsGuider, opened: list[Prepared], shape: Sequence[int]) -> Within:
    """Does work in the midst of ComfyUI's sampling of states [B, C, *spatial]; `opened` holds the model meanwhile."""

    def within(work: Callable[[], Any], gradients: bool = False) -> Any:
        if gradients:
            raise RuntimeError("ComfyUI's models are called without gradients.")
        if opened:
            return work()
        results: list[Any] = []

        def run(prepared: Prepared) -> Tensor:
            opened.append(prepared)
            results.append(work())
            return prepared.model.noise

        sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "simple", 20)
        noise = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            try:
                guider.sample(noise, torch.zeros_like(noise), CallbackSampler(run), sigmas, disable_pbar=True, seed=0)
            finally:
                opened.clear()
        return results[0]

    return within


def make_room() -> int:
    """Unload ComfyUI's models, for a training that does not call them; returns the device's free bytes."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    return int(comfy.model_management.get_free_memory(comfy.model_management.get_torch_device()))


def _no_velocity(*_: Any) -> Tensor:
    raise RuntimeError("A MODEL is called through its guider: use `field`.")
