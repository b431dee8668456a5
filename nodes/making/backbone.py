"""A MODEL as the trainer's backbone: the same one way into ComfyUI that sampling takes."""

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
from ...bas_core.sit import SiTConfig
from ...training.backbones.base import Backbone
from ..models.identity import Identity, identity_of
from ..models.paths import AnyTime, path_of
from ..models.sit_model import sit_config
from ..sampling.backbone import Backbone as Calls
from .prompts import Prompts, class_labels, digest_of, each_alone

WHOLE = (0.0, 1.0)


@dataclass
class Sampling:
    """What is there while ComfyUI samples.

    Attributes:
        model: ComfyUI's model function over the guider.
        extra_args: what it is called with.
    """

    model: Any
    extra_args: dict[str, Any]


class Working(comfy.samplers.Sampler):
    """A SAMPLER that does the trainer's work in the midst of ComfyUI's sampling.

    Args:
        begin: told what is there.
        work: called next.
    """

    def __init__(self, begin: Callable[[Sampling], None], work: Callable[[], Any]) -> None:
        self.begin, self.work, self.result = begin, work, None

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Called by ComfyUI's guiders; the arguments are theirs."""
        model = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        model.latent_image, model.noise = latent_image, noise
        self.begin(Sampling(model, {**extra_args, "denoise_mask": None}))
        with torch.inference_mode():
            self.result = self.work()
        return noise


@dataclass(frozen=True)
class ComfyBackbone(Backbone):
    """A MODEL with its prompts. Its velocities are those that the guider gives, with all that rides on the MODEL.

    Attributes:
        guider: over all prompts.
        weights: which model it is.
        called: told how many samples each model call takes.
        on: what is there while ComfyUI samples; empty else.
    """

    guider: Any = None
    weights: Identity = dataclasses.field(default_factory=lambda: Identity(""))
    called: Callable[[int], None] = lambda samples: None
    on: list[Sampling] = dataclasses.field(default_factory=list)

    def field(
        self, conditions: Tensor, scale: float, interval: tuple[float, float] = WHOLE, mode: CFGMode = "combined"
    ) -> Field:
        """The field of some prompts [B], by number; in two branches too, where nothing else on the MODEL sees both.

        Raises:
            ValueError: a CFG interval, which is not ComfyUI's.
        """
        if tuple(interval) != WHOLE:
            raise ValueError(f"ComfyUI's guider guides at all times; the interval {interval} is not possible here.")
        labels = conditions if self.num_classes else None
        calls = self._calls(())
        if calls.scale != 1 and calls.separable:
            guidance = Guidance(calls.scale)
            return Field(self._branches(conditions), (labels, None), guidance, combined=True, scale=scale)
        return Field(self._guided(conditions), (labels,), scale=scale)

    def _branches(self, conditions: Tensor) -> Evaluate:
        def branches(x: Tensor, t: Tensor, count: int) -> Tensor:
            def call(on: Calls, some: Tensor) -> Tensor:
                time = t[: len(some)]
                return torch.stack(on.branches(some, time)) if count == 2 else on.positive(some, time)[None]

            return self._by_prompt(conditions, x, call)

        return branches

    def _guided(self, conditions: Tensor) -> Callable[[Tensor, Tensor, int], Tensor]:
        return lambda x, t, count: self._by_prompt(conditions, x, lambda on, some: on(some, t[: len(some)])[None])

    def _calls(self, shape: Sequence[int]) -> Calls:
        """A way to call the model with states of a shape.

        Raises:
            RuntimeError: ComfyUI is not sampling.
        """
        if not self.on:
            raise RuntimeError("The model can be called within `within` only.")
        model, extra_args = self.on[-1].model, self.on[-1].extra_args
        schedule = AnyTime(path_of(model.inner_model.inner_model.model_sampling))
        samples = shape[0] if shape else 0
        return Calls(model, extra_args, schedule, torch.Size(shape), lambda one: self.called(samples))

    def _by_prompt(self, conditions: Tensor, x: Tensor, call: Callable[[Calls, Tensor], Tensor]) -> Tensor:
        """Call the model for each prompt with the samples that are of it: [K, B, C, *spatial]."""
        found: list[Tensor] = [torch.empty(0)] * len(x)
        for prompt in conditions.unique().tolist():
            rows = (conditions == prompt).nonzero()[:, 0].tolist()
            self.guider.conds = self.guider.prepared[prompt]
            some = x[rows]
            velocities = call(self._calls(some.shape), some)
            for place, row in enumerate(rows):
                found[row] = velocities[:, place]
        return torch.stack(found, 1)

    def told_scale(self) -> float:
        """The guidance that a SideNet is for: the model's own where it takes one, and else the CFG scale."""
        self.guider.conds = self.guider.prepared[0]
        return self._calls(()).told_scale

    @property
    def identity(self) -> dict[str, str]:
        return {**super().identity, "weights": self.weights.weights, "patches": self.weights.patches}


def usual_shift(sampling: Any) -> float:
    """The time shift that a flow model is sampled with, read off the middle of its times; 1 for diffusion models."""
    if path_of(sampling).exploding:
        return 1.0
    middle = float(sampling.percent_to_sigma(0.5))
    return middle / (1 - middle)


def open_model(
    model: Any, positives: Sequence[Any], negative: Any, cfg: float, latent: Tensor, called: Callable[[int], None]
) -> ComfyBackbone:
    """A MODEL as a backbone.

    Args:
        model: it.
        positives, negative, cfg: what it is guided by.
        latent: [B, C, *spatial] in the model's channels; its size is taken.
        called: told how many samples each model call takes.

    Raises:
        ValueError: a CFG scale without a negative, or a model of another kind than flow and diffusion.
    """
    alone = each_alone(positives)
    guider = Prompts(model, alone, negative, cfg)
    sampling = model.get_model_object("model_sampling")
    path = path_of(sampling)
    weights = identity_of(model)
    highest = torch.as_tensor(float(sampling.sigma_max), dtype=torch.float64)
    labels, sit = class_labels(alone), _sit_config(model)
    known = sit.num_classes if sit else 0
    told = labels is not None and labels == list(range(known))
    on: list[Sampling] = []

    def within(work: Callable[[], Any], gradients: bool = False) -> Any:
        if on:
            return work()
        working = Working(on.append, work)
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 20)
        noise = torch.randn(1, *latent.shape[1:], generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            try:
                guider.sample(noise, torch.zeros_like(noise), working, sigmas, disable_pbar=True, seed=0)
            finally:
                on.clear()
        return working.result

    return ComfyBackbone(
        name=type(model.model).__name__,
        kind=type(model.model).__name__.lower(),
        fingerprint=weights.whole,
        shape=tuple(latent.shape[1:]),
        velocity=guider_only,
        conditions=len(alone),
        num_classes=known if told else 0,
        embedded_guidance=True,
        patch_size=sit.patch_size if sit else Backbone.patch_size,
        shift=usual_shift(sampling),
        start=float(path.times(highest)) if path.exploding else 1.0,
        device=comfy.model_management.get_torch_device(),
        conditions_digest=digest_of([*alone, *([negative] if cfg != 1 else [])]),
        within=within,
        make_room=make_room,
        guider=guider,
        weights=weights,
        called=called,
        on=on,
    )


def make_room() -> int:
    """Unload ComfyUI's models, for a training that does not call them; bytes that are free on the device then."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    return int(comfy.model_management.get_free_memory(comfy.model_management.get_torch_device()))


def guider_only(*_: Any) -> Tensor:
    """A MODEL is called through its guider."""
    raise RuntimeError("A MODEL is called through its guider: use `field`.")


def _sit_config(model: Any) -> SiTConfig | None:
    try:
        return sit_config(model)
    except ValueError:
        return None
