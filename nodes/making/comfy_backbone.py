"""A MODEL as the trainer's backbone, called as in sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...bas_core.guidance import CFGMode, Evaluate, Field, Guidance
from ...training.backbones.base import Backbone, Within
from ..models.identity import Identity, identity_of
from ..models.parameterization import AnySigma, Parameterization, flow_time, parameterization_of
from ..models.sit_model import find_sit_config
from ..sampling.callback_sampler import CallbackSampler, Prepared
from ..sampling.field import WHOLE_RANGE
from ..sampling.guider import sidenet_guidance
from ..sampling.model_caller import ModelCaller
from ..sampling.rewind import Rewind
from ..sampling.sampler import with_sample_sigmas
from ..sampling.start import Latent, holds_image, noise_in, noised
from .prompts import PromptsGuider, class_labels, digest_of, each_alone


@dataclass(frozen=True)
class ComfyBackbone(Backbone):
    """A MODEL with its prompts. Its velocities are those of the guider, with everything that is on the MODEL.

    Attributes:
        guider: over all prompts.
        weights: fingerprints of the MODEL.
        on_samples: is given the number of samples of each model call.
        batch: how many samples go through the model at once at most.
        latent: what each sampling starts from beside noise: [1, C, *spatial] of an image or zeros, and its mask.
        prepared: ComfyUI's model function, and what takes it back to a sampling's start; empty while ComfyUI does not
            sample.
    """

    guider: Any = None
    weights: Identity = dataclasses.field(default_factory=lambda: Identity(""))
    on_samples: Callable[[int], None] = lambda samples: None
    batch: int = 1
    latent: Latent = dataclasses.field(default_factory=lambda: Latent(torch.zeros(1)))
    prepared: list[tuple[Prepared, Rewind]] = dataclasses.field(default_factory=list)

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
        caller = self._caller()
        if caller.cfg != 1 and caller.can_split:
            branches = self._by_prompt(conditions, ModelCaller.branches)
            return Field(branches, (labels, None), Guidance(caller.cfg), combined=True, scale=scale)
        combined = self._by_prompt(conditions, lambda caller, x, t, count: caller.combined(x, t)[None])
        return Field(combined, (labels,), scale=scale)

    def _caller(self, shape: Sequence[int] = (0,), sigma: float = 0.0, noise: Tensor | None = None) -> ModelCaller:
        """Calls the model with states of a shape.

        Args:
            shape: [B, C, *spatial].
            sigma: of the call.
            noise: that the states come from; a mask's kept part is drawn with it.

        Raises:
            RuntimeError: ComfyUI is not sampling.
        """
        if not self.prepared:
            raise RuntimeError("The model can be called within `within` only.")
        (model, extra_args, *_), rewind = self.prepared[-1]
        if noise is not None:
            model.noise, model.latent_image = noise, model.latent_image[:1]
            extra_args = {**extra_args, "denoise_mask": extra_args["denoise_mask"][:1]}
        sampled = extra_args["model_options"]["transformer_options"]["sample_sigmas"]
        extra_args = with_sample_sigmas(extra_args, with_sigma(sampled, sigma))
        sigmas, shape = AnySigma(self._parameterization), torch.Size(shape)
        return ModelCaller(model, extra_args, sigmas, shape, lambda: self.on_samples(shape[0]), rewind)

    @property
    def _model_sampling(self) -> Any:
        return self.guider.model_patcher.get_model_object("model_sampling")

    @property
    def _parameterization(self) -> Parameterization:
        return parameterization_of(self._model_sampling)

    @property
    def _top(self) -> Tensor:
        """The sigma that samplings start at."""
        return torch.as_tensor(float(self._model_sampling.sigma_max) if self._parameterization.exploding else 1.0)

    def noise(self, gaussian: Tensor) -> Tensor:
        """The flow state in which ComfyUI's samplers start from unit normal noise: with the model's own scale of
        noise, and with the image, which a finite noise level leaves in it."""
        image = self.latent.samples
        if torch.count_nonzero(image):
            image = self.guider.model_patcher.model.process_latent_in(image)
        return self._parameterization.to_flow(noised(self._model_sampling, self._top, gaussian, image, True), self._top)

    def _noise_of(self, x: Tensor, sigma: float) -> Tensor:
        """The unit normal noise of a sampling's first state x, a flow state."""
        at = torch.as_tensor(sigma)
        state = self._parameterization.from_flow(x, at.to(x))
        image = self.prepared[-1][0].model.latent_image[:1].expand(x.shape)
        return noise_in(self._model_sampling, at, state, image, sigma >= float(self._top) * (1 - 1e-5))

    def _by_prompt(self, conditions: Tensor, call: Callable[[ModelCaller, Tensor, Tensor, int], Tensor]) -> Evaluate:
        """Calls the model for each prompt with its samples, and puts their velocities [K, B, C, *spatial] together."""
        noises: list[Tensor] = []  # where a mask keeps a part, of all samplings of these samples

        def evaluate(x: Tensor, t: Tensor, count: int) -> Tensor:
            found = x.new_empty(count, *x.shape)
            sigma = float(self._parameterization.sigmas(t[:1].double().cpu()))
            if self.latent.mask is not None and not noises:
                noises.append(self._noise_of(x, sigma))
            for prompt in conditions.unique().tolist():
                self.guider.conds = self.guider.prepared[prompt]
                for rows in (conditions == prompt).nonzero()[:, 0].to(x.device).split(self.batch):
                    caller = self._caller(x[rows].shape, sigma, noises[0][rows] if noises else None)
                    found[:, rows] = call(caller, x[rows], t[rows], count)
            return found

        return evaluate

    def sidenet_guidance(self) -> float:
        """The guidance that SideNets for this model are made for; see `guider.sidenet_guidance`."""
        self.guider.conds = self.guider.prepared[0]
        return sidenet_guidance(self.guider)

    def has_general_mean(self) -> bool:
        """Whether the mean of what is recorded holds for other prompts: several are, and no image is given to begin
        with."""
        prepared = self.guider.prepared
        shown = self.latent.mask is not None or any(holds_image(conds["positive"]) for conds in prepared)
        return len(prepared) > 1 and not shown

    @property
    def identity(self) -> dict[str, str]:
        own = {name: getattr(self.weights, name) for name in ("weights", "patches", "precision", "sketch")}
        return {**super().identity, **own}


def with_sigma(sampled: Tensor, sigma: float) -> Tensor:
    """The sigmas [N] of a sampling, with one more among them: nodes look up which step a call belongs to."""
    one = sampled.new_tensor([sigma])
    return torch.cat([sampled[sampled > sigma * (1 + 1e-4)], one, sampled[sampled < sigma * (1 - 1e-4)]])


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
    latent: Latent,
    on_samples: Callable[[int], None],
    batch: int = 1,
    **more: Any,
) -> ComfyBackbone:
    """A MODEL as a backbone.

    Args:
        model: a MODEL.
        positives, negative, cfg: its guidance.
        latent: what a sampling starts from beside noise, in the model's channels; the first of its batch.
        on_samples: is given the number of samples of each model call.
        batch: of the largest model call, for which ComfyUI keeps memory free.
        more: other attributes of the backbone, such as its part of the path.

    Raises:
        ValueError: a CFG scale without a negative, or a model that is neither a flow nor a diffusion model.
    """
    alone = each_alone(positives)
    guider = PromptsGuider(model, alone, negative, cfg)
    model_sampling = model.get_model_object("model_sampling")
    parameterization = parameterization_of(model_sampling)
    labels, sit = class_labels(alone), find_sit_config(model)
    classes = sit.num_classes if sit and labels == list(range(sit.num_classes)) else 0
    opened: list[tuple[Prepared, Rewind]] = []
    weights = identity_of(model)
    first = latent._replace(samples=latent.samples[:1])
    given = [first.samples] if torch.count_nonzero(first.samples) else []
    given += [] if first.mask is None else [first.mask]

    return ComfyBackbone(
        name=type(model.model).__name__,
        kind=type(model.model).__name__.lower(),
        fingerprint=weights.whole,
        shape=tuple(first.samples.shape[1:]),
        velocity=_no_velocity,
        conditions=len(alone),
        num_classes=classes,
        embedded_guidance=True,
        parameters=sum(p.numel() for p in model.model.diffusion_model.parameters()),
        patch_size=sit.patch_size if sit else Backbone.patch_size,
        shift=default_shift(model_sampling),
        start=flow_time(model_sampling, model_sampling.sigma_max) if parameterization.exploding else 1.0,
        device=model.load_device,
        conditions_digest=digest_of([*alone, *([negative] if "negative" in guider.original_conds else []), *given]),
        within=_within(guider, opened, first, batch),
        make_room=make_room,
        guider=guider,
        weights=weights,
        on_samples=on_samples,
        batch=batch,
        latent=first,
        prepared=opened,
        **more,
    )


def _within(guider: PromptsGuider, opened: list[tuple[Prepared, Rewind]], latent: Latent, batch: int) -> Within:
    """Does work in the midst of ComfyUI's sampling of a batch; `opened` holds the model meanwhile."""

    def within(work: Callable[[], Any]) -> Any:
        if opened:
            return work()
        results: list[Any] = []

        def run(prepared: Prepared) -> Tensor:
            opened.append((prepared, Rewind(guider, lambda: guider.prepared)))
            results.append(work())
            return prepared.model.noise

        sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "simple", 20)
        image = comfy.utils.repeat_to_batch_size(latent.samples, batch)
        noise = comfy.sample.prepare_noise(image, 0)
        with torch.inference_mode():
            try:
                guider.sample(noise, image, CallbackSampler(run), sigmas, latent.mask, disable_pbar=True, seed=0)
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
