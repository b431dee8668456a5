"""One model call: ComfyUI's model function as a velocity of the core.

The model is a black box. It is called through whatever ComfyUI has put around it: guider, wrappers, hooks, ControlNet,
LoRA, inpaint mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...bas_core.flow import x0_to_velocity
from ..models.parameterization import AnySigma, SigmaSchedule
from .guider import cfg_of, may_split

# What nodes have hooked into the computation of CFG. It does not act where there is no CFG.
CFG_HOOKS = ("sampler_pre_cfg_function", "sampler_cfg_function")


@dataclass
class ModelCaller:
    """Calls ComfyUI's model function, and turns the denoised states that it returns into velocities.

    Attributes:
        model: ComfyUI's `KSamplerX0Inpaint`; see `sample_ba_solver`.
        extra_args: passed on to the model.
        sigmas: of the times at which the model is called, on its device.
        shape: of ComfyUI's state; the solver's may have one more axis.
        on_call: called after each model call.
        before_call: called before each model call with sigma and the transformer options; see `Rewind`.
        last: flow state, time and velocity of the last call, where a mask keeps a part of the image.
    """

    model: Any
    extra_args: dict[str, Any]
    sigmas: SigmaSchedule | AnySigma
    shape: torch.Size
    on_call: Callable[[], Any]
    before_call: Callable[[Tensor, dict[str, Any]], Any] = lambda sigma, options: None
    last: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def guider(self) -> Any:
        return self.model.inner_model

    @property
    def options(self) -> dict[str, Any]:
        """The MODEL's options: hooks, wrappers and patches."""
        return self.extra_args.get("model_options", {})

    @property
    def cfg(self) -> float:
        """The guider's CFG scale; 1 where it has none."""
        return cfg_of(self.guider)

    @property
    def can_split(self) -> bool:
        """Whether the branches of CFG may be taken apart."""
        return may_split(self.model, self.extra_args)

    def combined(self, x: Tensor, time: Tensor) -> Tensor:
        """The velocity [B, C, *spatial] that the guider gives, at a flow state x of that shape and time [B]."""
        return self._call(x, time, self.options)

    def conditional(self, x: Tensor, time: Tensor) -> Tensor:
        """The velocity without CFG; the negative is not evaluated. For guiders with ComfyUI's own CFG."""
        before = self.guider.cfg
        self.guider.cfg = 1.0
        try:
            return self._call(x, time, {k: v for k, v in self.options.items() if k not in CFG_HOOKS})
        finally:
            self.guider.cfg = before

    def branches(self, x: Tensor, time: Tensor, count: int) -> Tensor:
        """The velocities [K, B, C, *spatial] of the first K = `count` branches, positive first; where `can_split`."""
        if count == 1:
            return self.conditional(x, time)[None]
        branches: list[Tensor] = []

        def take(arguments: dict[str, Any]) -> list[Tensor]:
            branches[:] = arguments["conds_out"]
            return branches

        self._call(x, time, {**self.options, "sampler_pre_cfg_function": [take]})
        sigma = self.sigmas.sigma_at(time[0]).to(x)
        masked = [self.keep_unmasked(denoised, sigma) for denoised in branches]
        return torch.stack([x0_to_velocity(x, denoised.to(x.dtype).reshape(x.shape), time) for denoised in masked])

    def _call(self, x: Tensor, time: Tensor, options: dict[str, Any]) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma = self.sigmas.sigma_at(time[0]).to(x)
        self.before_call(sigma, options.get("transformer_options", {}))
        state = self.sigmas.parameterization.from_flow(x, sigma).reshape(self.shape)
        denoised = self.model(state, sigma.expand(self.shape[0]), **{**self.extra_args, "model_options": options})
        self.on_call()
        velocity = x0_to_velocity(x, denoised.to(x.dtype).reshape(x.shape), time)
        if self.extra_args.get("denoise_mask") is not None:
            self.last = x, time[0], velocity
        return velocity

    def mask(self, sigma: Tensor) -> Tensor | None:
        """The inpaint mask at sigma (0-d), 1 = drawn, as ComfyUI uses it there; None without one."""
        mask = self.extra_args.get("denoise_mask")
        change = self.options.get("denoise_mask_function")
        if mask is None or change is None:
            return mask
        extra = {"model": self.guider, "sigmas": self.model.sigmas}
        return change(sigma.expand(self.shape[0]), mask, extra_options=extra)

    def straight_where_masked(self, end: Tensor, t: Tensor) -> Tensor:
        """An end [B, C, *spatial] at time t (0-d), straight on from the last call where a mask keeps the image.

        The path is straight there, and a schedule's coefficients may leave a straight path (`Schedule.coefficients`).
        """
        if self.last is None:
            return end
        x, time, velocity = self.last
        mask = self.mask(self.sigmas.sigma_at(time).to(x))
        straight = x + (t.to(time) - time).to(x) * velocity
        return end if mask is None else torch.lerp(straight, end, mask.to(x).expand(self.shape).reshape(x.shape))

    def keep_unmasked(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        """A branch's denoised state with the masked-out part replaced, as ComfyUI does to the combined one."""
        mask = self.mask(sigma)
        return denoised if mask is None else torch.lerp(self.model.latent_image.to(denoised), denoised, mask)
