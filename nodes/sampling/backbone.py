"""One backbone call: ComfyUI's model function as a velocity of the core.

The backbone is a black box: it is called through whatever ComfyUI put around it (guider, wrappers, hooks, ControlNet,
LoRA, inpaint mask).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from ...bas_core.flow import x0_to_velocity
from ..models.paths import AnyTime, SigmaSchedule


@dataclass
class Backbone:
    """Calls ComfyUI's model function and reads velocities off what it returns.

    Attributes:
        model: see `sample_ba_solver`.
        extra_args: ditto.
        schedule: the run's sigmas and times, or their path alone.
        shape: of ComfyUI's state; the solver's may have one more axis.
        called: told 1 at each call.
    """

    model: Any
    extra_args: dict[str, Any]
    schedule: SigmaSchedule | AnyTime
    shape: torch.Size
    called: Callable[[int], Any]

    @property
    def guider(self) -> Any:
        return self.model.inner_model

    @property
    def options(self) -> dict[str, Any]:
        return self.extra_args.get("model_options", {})

    @property
    def scale(self) -> float:
        """See `cfg_of`."""
        return cfg_of(self.guider)

    @property
    def told_scale(self) -> float:
        """See `guidance_of`."""
        return guidance_of(self.guider)

    @property
    def plain(self) -> bool:
        """Whether the guider is ComfyUI's own CFG (CFGGuider, BasicGuider, KSampler) over at most two branches."""
        own, kind = comfy.samplers.CFGGuider, type(self.guider)
        return all(getattr(kind, name) is getattr(own, name) for name in ("predict_noise", "outer_predict_noise"))

    @property
    def rescaled(self) -> bool:
        """Whether a node such as RescaleCFG or PAG changes how the branches are combined."""
        return any(self.options.get(key) for key in ("sampler_cfg_function", "sampler_post_cfg_function"))

    @property
    def sees_both(self) -> bool:
        """Whether something on the MODEL may need both branches in every call.

        That is what acts between the branches' evaluation and CFG (APG, which keeps a running mean too), what
        evaluates them in its own way (skip-layer guidance, EasyCache), and patches that ask which branches there are.
        """
        return _acts_before_cfg(self.options) or any(map(_asks_for_branches, _patches(self.options)))

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """One backbone call: the guided velocity at a flow state [B, C, *spatial] and time [B]."""
        return self._call(x, time, self.options)

    @property
    def separable(self) -> bool:
        """Whether a call may leave the negative out without anything on the MODEL noticing."""
        return self.plain and not self.rescaled and not self.sees_both

    def branches(self, x: Tensor, time: Tensor, acted: bool = True) -> list[Tensor]:
        """One backbone call, the branches apart: as they are about to be combined, or before nodes have acted on them.

        Everything that belongs to the evaluation of a branch (areas, hooks, context windows) has acted either way.
        """
        found: list[Tensor] = []
        known = self.options.get("sampler_pre_cfg_function", [])
        hooks = [*known, _note(found)] if acted else [_note(found), *known]
        self._call(x, time, {**self.options, "sampler_pre_cfg_function": hooks})
        sigma = self.schedule.sigma_at(float(time[0])).to(x)
        kept = [self.keep_unmasked(image, sigma) for image in found]
        return [x0_to_velocity(x, image.to(x.dtype).reshape(x.shape), time) for image in kept]

    def positive(self, x: Tensor, time: Tensor) -> Tensor:
        """One backbone call without CFG: the positive's velocity, and the negative is left out.

        Where something sees both branches, it is given both, and what it makes of the positive is left out instead.
        """
        both_needed = self.scale != 1 and self.sees_both
        with self._at_scale(1.0):
            if not both_needed:
                return self(x, time)
            found: list[Tensor] = []

            def restore(arguments: dict[str, Any]) -> list[Tensor]:
                return [found[0], *arguments["conds_out"][1:]]

            hooks = [_note(found), *self.options.get("sampler_pre_cfg_function", []), restore]
            both = {"sampler_pre_cfg_function": hooks, "disable_cfg1_optimization": True}
            return self._call(x, time, {**self.options, **both})

    def _call(self, x: Tensor, time: Tensor, options: dict[str, Any]) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma = self.schedule.sigma_at(float(time[0])).to(x)
        state = self.schedule.path.from_flow(x, sigma).reshape(self.shape)
        denoised = self.model(state, sigma.expand(self.shape[0]), **{**self.extra_args, "model_options": options})
        self.called(1)
        return x0_to_velocity(x, denoised.to(x.dtype).reshape(x.shape), time)

    # --- the inpaint mask

    def mask(self, sigma: Tensor) -> Tensor | None:
        """The inpaint mask at sigma (0-d), 1 = drawn, as ComfyUI uses it there; None without one."""
        mask = self.extra_args.get("denoise_mask")
        change = self.options.get("denoise_mask_function")
        if mask is None or change is None:
            return mask
        extra = {"model": self.guider, "sigmas": self.model.sigmas}
        return change(sigma.expand(self.shape[0]), mask, extra_options=extra)

    def keep_unmasked(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        """A branch's image with the masked-out part replaced, as ComfyUI does to the guided one."""
        mask = self.mask(sigma)
        return denoised if mask is None else torch.lerp(self.model.latent_image.to(denoised), denoised, mask)

    @contextmanager
    def _at_scale(self, scale: float) -> Iterator[None]:
        """The guider's CFG scale set for one call; at 1 it leaves out the negative."""
        before = self.guider.cfg
        self.guider.cfg = scale
        try:
            yield
        finally:
            self.guider.cfg = before


def _note(found: list[Tensor]) -> Callable[[dict[str, Any]], list[Tensor]]:
    """A pre-CFG hook that notes the branches that were evaluated."""

    def note(arguments: dict[str, Any]) -> list[Tensor]:
        outs, conds = arguments["conds_out"], arguments["conds"]
        found[:] = [out for out, cond in zip(outs, conds, strict=False) if cond is not None]
        return outs

    return note


def _acts_before_cfg(options: dict[str, Any]) -> bool:
    """Whether nodes or a guider's wrappers stand between the evaluation of the branches and CFG."""
    if any(options.get(key) for key in ("sampler_pre_cfg_function", "sampler_calc_cond_batch_function")):
        return True
    kinds = comfy.patcher_extension.WrappersMP
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    return any(any(wrappers.get(kind, {}).values()) for kind in (kinds.PREDICT_NOISE, kinds.CALC_COND_BATCH))


def _patches(options: dict[str, Any]) -> Iterator[Any]:
    """The functions that nodes have put into the model: around it, and into its blocks."""
    inside = options.get("transformer_options", {})
    yield options.get("model_function_wrapper")
    for listed in inside.get("patches", {}).values():
        yield from listed
    for replaced in inside.get("patches_replace", {}).values():
        yield from replaced.values()


def _asks_for_branches(patch: Any) -> bool:
    """Whether a function's code has the name under which ComfyUI tells which branches a batch holds."""
    called = patch if hasattr(patch, "__code__") else getattr(type(patch), "__call__", None)  # noqa: B004, its code
    code = getattr(called, "__code__", None)
    return code is not None and _mentions(code, "cond_or_uncond")


def _mentions(code: CodeType, word: str) -> bool:
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return word in code.co_consts or any(_mentions(part, word) for part in inner)


def cfg_of(guider: Any) -> float:
    """The CFG scale; 1 for guiders without one."""
    scale = float(getattr(guider, "cfg", 1.0))
    return 1.0 if math.isclose(scale, 1.0) else scale  # as ComfyUI decides whether to skip the negative


def guidance_of(guider: Any) -> float:
    """The guidance that a SideNet is made for, and told if it has such an input: the model's own where it takes one."""
    embedded = embedded_guidance(guider)
    return cfg_of(guider) if embedded is None else embedded


def embedded_guidance(guider: Any) -> float | None:
    """The guidance that the model is given as an input (FluxGuidance, or the model's own default); None for others.

    Read where ComfyUI puts it once sampling has begun. Several positive conditions count as the first.
    """
    network = getattr(guider.model_patcher.model, "diffusion_model", None)
    if not getattr(getattr(network, "params", None), "guidance_embed", False):
        return None
    given = [c["model_conds"].get("guidance") for c in guider.conds.get("positive", ()) if "model_conds" in c]
    return float(given[0].cond.flatten()[0]) if given and given[0] is not None else None
