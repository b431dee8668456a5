"""Model calls whose times do not only fall: what moves forward with a sampling is taken back.

Keyframes of hooks and of Advanced-ControlNet, and what packs count from call to call, know one direction: from noise to
data, once. Recording samples many times over, and an inversion climbs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

# A keyframe can be held for so many calls, which are made up for just before the time that is called.
HELD = 64


class Rewind:
    """Makes each model call at a higher noise level than the last one the first call of a new sampling.

    Args:
        guider: ComfyUI's, while it samples.
        conds: all conditions that guide its calls, by side: lists of dictionaries.
    """

    def __init__(self, guider: Any, conds: Callable[[], Iterable[dict[str, list[dict[str, Any]]]]]) -> None:
        self.guider, self.conds = guider, conds
        self.last = -1.0

    def __call__(self, sigma: Tensor | float, transformer_options: dict[str, Any]) -> None:
        """To be called before the model is, at sigma."""
        sigma = float(sigma)
        if sigma > self.last:
            self.begin(sigma, transformer_options)
        self.last = sigma

    def begin(self, sigma: float, transformer_options: dict[str, Any]) -> None:
        """Do what ComfyUI does between samplings, but for loading; then let keyframes pass that lie before sigma."""
        patcher, model = self.guider.model_patcher, self.guider.inner_model
        patcher.clean_hooks()
        for moment in (CallbacksMP.ON_CLEANUP, CallbacksMP.ON_PRE_RUN):
            for callback in patcher.get_all_callbacks(moment):
                callback(patcher)
        sides = [side for conds in self.conds() for side in conds.values()]
        keyframes = {id(hook.hook_keyframe): hook.hook_keyframe for side in sides for hook in _hooks(side)}
        for side in sides:
            for hook in _hooks(side):
                hook.initialize_timesteps(model)
            comfy.samplers.pre_run_control(model, side)
        for group in keyframes.values():
            group._curr_t = -1.0  # ComfyUI's `reset` leaves it, and the call at this very time would pass unnoticed
        controls = [control for side in sides for control in _controls(side)]
        sigmas = transformer_options.get("sample_sigmas")
        if sigmas is None or sigma >= float(sigmas.max()) or not (keyframes or controls):
            return
        for earlier in sigma * (1 + 1e-5 * torch.arange(HELD, 0, -1, dtype=torch.float32)):
            for group in keyframes.values():
                group.prepare_current_keyframe(curr_t=earlier, transformer_options=transformer_options)
            for control in controls:
                control.prepare_current_timestep(earlier[None], transformer_options)


def _hooks(side: list[dict[str, Any]]) -> Iterator[Any]:
    for condition in side:
        if condition.get("hooks") is not None:
            yield from condition["hooks"].hooks


def _controls(side: list[dict[str, Any]]) -> Iterator[Any]:
    """The ControlNets that have keyframes: those of Advanced-ControlNet."""
    for condition in side:
        control = condition.get("control")
        while control is not None:
            if hasattr(control, "prepare_current_timestep"):
                yield control
            control = control.previous_controlnet


def refuse_cache(model: Any, node: str) -> None:
    """Refuse ComfyUI's own caches of model calls on a MODEL whose answers count as the truth.

    Those of other packs are found out by their answers (`training.recording.repeatable`).

    Raises:
        ValueError: EasyCache or LazyCache is on it.
    """
    cache = model.model_options.get("transformer_options", {}).get("easycache")
    if cache is not None:
        raise ValueError(
            f"{cache.name} is on the MODEL: it answers some model calls from earlier ones, and {node} needs the "
            f"model's own answers. Bypass {cache.name} here; it can be used for sampling."
        )
