"""ComfyUI's CFG guider over a prompt or several, and the guidance that a guider stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import comfy.patcher_extension
import comfy.samplers

# A node that compiles the model wraps its call, and changes nothing of what it computes (comfy_api.torch_helpers).
COMPILE_KEY = "torch.compile"
# What nodes may replace or add in the options of a MODEL, where a model call is made and where CFG is computed.
HOOKS = (
    "sampler_cfg_function",
    "sampler_post_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_calc_cond_batch_function",
    "model_function_wrapper",
)


def guider_for(model: Any, positive: Any, negative: Any, cfg: float) -> Any:
    """ComfyUI's guider for a MODEL, CONDITIONINGs and a CFG scale; see `set_prompts` for errors."""
    guider = comfy.samplers.CFGGuider(model)
    set_prompts(guider, {"positive": positive}, negative, cfg)
    return guider


def set_prompts(guider: Any, positives: Mapping[str, Any], negative: Any, cfg: float) -> None:
    """Give a CFG guider its CONDITIONINGs by name, and the negative where it is used.

    Raises:
        ValueError: a CFG scale other than 1 without a negative.
    """
    if cfg != 1 and negative is None:
        raise ValueError(f"A CFG of {cfg:g} needs a negative conditioning. Connect 'negative', or set cfg to 1.")
    uses_negative = negative is not None and takes_negative(guider.model_options, cfg)
    guider.inner_set_conds({**positives, "negative": negative} if uses_negative else dict(positives))
    guider.set_cfg(cfg)


def takes_negative(model_options: Mapping[str, Any], cfg: float) -> bool:
    """Whether ComfyUI evaluates the negative: where CFG is not 1, or a node such as NAG uses it at 1 too."""
    return cfg != 1 or bool(model_options.get("disable_cfg1_optimization"))


def cfg_of(guider: Any) -> float:
    """The CFG scale; 1 for guiders without one."""
    cfg = float(getattr(guider, "cfg", 1.0))
    return 1.0 if math.isclose(cfg, 1.0) else cfg  # as ComfyUI decides whether to skip the negative


def takes_guidance(model: Any) -> bool:
    """Whether a MODEL takes its guidance as an input (FLUX.1-dev), and needs no CFG. ComfyUI tells no more than this of
    the CFG scale that a model needs."""
    network = getattr(model.model, "diffusion_model", None)
    return bool(getattr(getattr(network, "params", None), "guidance_embed", False))


def distilled_guidance(guider: Any) -> float | None:
    """The guidance that a guidance-distilled model (FLUX.1-dev) takes as an input; None for other models.

    Read where ComfyUI puts it once sampling has begun. Of several positive conditions the first counts.
    """
    if not takes_guidance(guider.model_patcher):
        return None
    given = [c["model_conds"].get("guidance") for c in guider.conds.get("positive", ()) if "model_conds" in c]
    return float(given[0].cond.flatten()[0]) if given and given[0] is not None else None


def sidenet_guidance(guider: Any) -> float:
    """The guidance that SideNets are made for and take as an input: distilled where the model has that, else CFG."""
    distilled = distilled_guidance(guider)
    return cfg_of(guider) if distilled is None else distilled


def known_guidance(guider: Any) -> float | None:
    """`sidenet_guidance`, or None for a guider that combines its branches in its own way and has no single scale."""
    known = is_comfyui_cfg(guider) or distilled_guidance(guider) is not None
    return sidenet_guidance(guider) if known else None


def is_comfyui_cfg(guider: Any) -> bool:
    """Whether CFG is ComfyUI's own (KSampler, SamplerCustom, CFGGuider, BasicGuider): at most two branches."""
    own, kind = comfy.samplers.CFGGuider, type(guider)
    return all(getattr(kind, name) is getattr(own, name) for name in ("predict_noise", "outer_predict_noise"))


def is_plain_cfg(guider: Any, model_options: dict[str, Any]) -> bool:
    """Whether CFG is ComfyUI's own and nothing is hooked into it or into the model.

    Only there the branches may be taken apart, and the negative left out of a call. LoRAs and ControlNets are no
    hooks: they change weights and conditioning.
    """
    inside = model_options.get("transformer_options", {})
    kinds = comfy.patcher_extension.WrappersMP
    wrappers = [
        wrapper
        for kind in (kinds.PREDICT_NOISE, kinds.CALC_COND_BATCH, kinds.APPLY_MODEL, kinds.DIFFUSION_MODEL)
        for key, added in inside.get("wrappers", {}).get(kind, {}).items()
        for wrapper in added
        if key != COMPILE_KEY
    ]
    patched = any(any(inside.get(key, {}).values()) for key in ("patches", "patches_replace"))
    hooked = wrappers or patched or any(model_options.get(key) for key in HOOKS)
    return is_comfyui_cfg(guider) and is_comfyui_sampling() and not hooked


def is_comfyui_sampling() -> bool:
    """Whether CFG is computed by ComfyUI's own function, and not by one that a pack put in its place, as AnimateDiff
    does: such functions may never call the hooks."""
    code = getattr(comfy.samplers.sampling_function, "__code__", None)
    return code is not None and code.co_filename == comfy.samplers.CFGGuider.predict_noise.__code__.co_filename


def may_split(model: Any, extra_args: Mapping[str, Any]) -> bool:
    """Whether the branches of CFG may be taken apart in a sampling: CFG is plain, and an inpaint mask can be applied to
    each of them, which a function around ComfyUI's model, such as Detail Daemon's, may not allow.

    Args:
        model: ComfyUI's `KSamplerX0Inpaint`, or a function around it.
        extra_args: of the sampler.
    """
    unmasked = extra_args.get("denoise_mask") is None or hasattr(model, "latent_image")
    return unmasked and is_plain_cfg(model.inner_model, extra_args.get("model_options", {}))
