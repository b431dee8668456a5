"""A ComfyUI model function as a velocity field of the core, and the sampler function that ComfyUI calls.

The backbone is a black box: it is called through whatever ComfyUI put around it (guider, wrappers, hooks, ControlNet,
LoRA, inpaint mask), once a step. Only the steps in between are ours, and they are `bas_core.solve`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..bas_core.checkpoint import SideNetCard
from ..bas_core.flow import x0_to_velocity
from ..bas_core.grids import calls_of
from ..bas_core.guidance import NO_GUIDANCE, Evaluate, Field, Guidance
from ..bas_core.solver import Predictor, Step, solve
from ..bas_core.weighting import WeightedSideNet, with_strength
from .attach import LoadedSideNet, applied_sidenet
from .labels import labels_of
from .paths import Path, Schedule, path_of
from .say import warn

WITHOUT_SIDENET = ("multistep",)
METHODS = ("bi_anchor", "single_anchor", *WITHOUT_SIDENET)
WHOLE_RANGE = (0.0, 1.0)


@dataclass(frozen=True)
class Options:
    """What the sampler node sets.

    Attributes:
        method: one of METHODS.
        rule: name of a quadrature rule; None = the method's own.
        interval: (lo, hi), the flow times between which CFG applies.
        skip_first: a SideNet that knows the mean of the model's data may save the first call.
    """

    method: str = "bi_anchor"
    rule: str | None = None
    interval: tuple[float, float] = WHOLE_RANGE
    skip_first: bool = True

    def __post_init__(self) -> None:
        Guidance(1.0, self.interval)  # checks the interval


def sample_ba_solver(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    options: Options | None = None,
) -> Tensor:
    """Sample with BA-solver; the signature is that of ComfyUI's samplers.

    Args:
        model: ComfyUI's `KSamplerX0Inpaint`: `model(x, sigma, **extra_args)` is the denoised state.
        x: [B, C, *spatial] noised state at `sigmas[0]`.
        sigmas: [N + 1], falling. N backbone calls are made, or one fewer (see `bas_core.solve`); the last sigma is
            not evaluated.
        extra_args: passed on to the model.
        callback: sees a dictionary a step.
        disable: no progress bar.
        options: method, rule and CFG interval; None = bi-anchor as published.

    Returns:
        [B, C, *spatial] state at `sigmas[-1]`.

    Raises:
        ValueError: the sigmas, the latent or the SideNet do not fit; the message says what to do.
        NonFiniteError: the model returned NaN or infinity; the message says where.
    """
    options = options or Options()
    guider = model.inner_model
    schedule = Schedule.of(path_of(guider.inner_model.model_sampling), sigmas)
    sidenet = _sidenet_for(options, guider)
    if sidenet is not None:
        check_latent(sidenet, x)
    shape = x.shape if x.ndim > 3 else (*x.shape[:2], 1, x.shape[2])
    fitted = _fitted_card(options, sidenet)
    halves = None if fitted is None else fitted.half_calls_for(schedule.times)
    saves = options.skip_first and sidenet is not None and sidenet.knows_mean
    calls = calls_of(schedule.times, saves)
    with tqdm(total=calls, disable=disable, desc="backbone calls") as progress:
        backbone = Backbone(model, extra_args or {}, schedule, x.shape, progress.update)
        velocity = _field(backbone, sidenet, options, x)
        if halves is not None and velocity.pair is None and backbone.scale != 1:
            warn(
                f"{halves.count} of the {calls} calls could leave the negative out, but the guider, or a node on the "
                "MODEL, combines it with the positive in its own way: both are evaluated at every call."
            )
        end = solve(
            velocity,
            _predictor(backbone, sidenet),
            schedule.path.to_flow(x, sigmas[0].to(x)).reshape(shape),
            schedule.times,
            method="bi_anchor" if options.method in WITHOUT_SIDENET else options.method,
            rule=options.rule,
            callback=None if callback is None else _step_callback(schedule, x.shape, callback),
            chunk=None if sidenet is None else sidenet_chunk(sidenet, x),
            skip_first=options.skip_first,
            correct=None if fitted is None else fitted.weights_for(schedule.times),
            half_calls=halves,
        )
    return schedule.path.from_flow(end.reshape(x.shape), sigmas[-1].to(x))


# --- the backbone -------------------------------------------------------------------------------------------------


@dataclass
class Backbone:
    """Calls ComfyUI's model function and reads velocities off what it returns.

    Attributes:
        model: see `sample_ba_solver`.
        extra_args: ditto.
        schedule: the run's sigmas and times.
        shape: of ComfyUI's state; the solver's may have one more axis.
        called: told 1 at each call.
    """

    model: Any
    extra_args: dict[str, Any]
    schedule: Schedule
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
        """The CFG scale; 1 for guiders without one."""
        scale = float(getattr(self.guider, "cfg", 1.0))
        return 1.0 if math.isclose(scale, 1.0) else scale  # as ComfyUI decides whether to skip the negative

    @property
    def told_scale(self) -> float:
        """The guidance that SideNets with such an input are told: the model's own where it takes one."""
        embedded = embedded_guidance(self.guider)
        return self.scale if embedded is None else embedded

    @property
    def plain(self) -> bool:
        """Whether the guider is ComfyUI's own CFG (CFGGuider, BasicGuider, KSampler) over at most two branches."""
        return type(self.guider).predict_noise is comfy.samplers.CFGGuider.predict_noise

    @property
    def rescaled(self) -> bool:
        """Whether a node such as RescaleCFG or PAG changes how the branches are combined."""
        return any(self.options.get(key) for key in ("sampler_cfg_function", "sampler_post_cfg_function"))

    def __call__(self, x: Tensor, time: Tensor, split: bool = False) -> tuple[Tensor, list[Tensor]]:
        """One backbone call at a flow state [B, C, *spatial] and time [B].

        Returns:
            The guided velocity, and with `split` those of the conditional and (with CFG) unconditional branch.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma = self.schedule.sigma_at(float(time[0])).to(x)
        state = self.schedule.path.from_flow(x, sigma).reshape(self.shape)
        arguments = dict(self.extra_args)
        branches: list[Tensor] = []
        if split:
            arguments["model_options"] = _with_hook(self.options, branches)
        denoised = self.model(state, sigma.expand(self.shape[0]), **arguments)
        self.called(1)

        def velocity(denoised: Tensor) -> Tensor:
            return x0_to_velocity(x, denoised.to(x.dtype).reshape(x.shape), time)

        return velocity(denoised), [velocity(self.keep_unmasked(branch, sigma)) for branch in branches]

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
    def at_scale(self, scale: float) -> Iterator[None]:
        """The guider's CFG scale set for one call; at 1 it leaves out the negative."""
        before = self.guider.cfg
        self.guider.cfg = scale
        try:
            yield
        finally:
            self.guider.cfg = before


def _with_hook(options: dict[str, Any], branches: list[Tensor]) -> dict[str, Any]:
    """Model options with a hook that notes the branches where ComfyUI is about to combine them.

    There, rather than around the model call, everything that acts on the branches (areas, hooks, context windows,
    other nodes' hooks) has acted.
    """

    def note(arguments: dict[str, Any]) -> list[Tensor]:
        known = [out for out, cond in zip(arguments["conds_out"], arguments["conds"], strict=False) if cond is not None]
        branches[:] = known
        return arguments["conds_out"]

    hooks = [*options.get("sampler_pre_cfg_function", []), note]
    return {**options, "sampler_pre_cfg_function": hooks}


# --- the field ----------------------------------------------------------------------------------------------------


def _field(backbone: Backbone, sidenet: LoadedSideNet | None, options: Options, x: Tensor) -> Field:
    """The velocity field, guided by ComfyUI or, for SideNets trained so, branch by branch.

    Raises:
        ValueError: a CFG interval with a guider that has no single CFG scale.
    """
    guidance = Guidance(backbone.scale, options.interval)
    limited = options.interval != WHOLE_RANGE
    if limited and not backbone.plain:
        raise ValueError(
            "A CFG interval works with KSampler, SamplerCustom, CFGGuider and BasicGuider; "
            f"{type(backbone.guider).__name__} combines its branches in its own way. Set the interval to 0 and 1."
        )
    if sidenet is not None and sidenet.card.velocity == "branch" and _can_split(backbone):
        return _branch_field(backbone, sidenet, guidance, x)

    pair = None
    if backbone.plain and not backbone.rescaled:
        pair = Field(_branches_of(backbone), (None,) * (1 + (guidance.scale != 1)), guidance)

    def guided(state: Tensor, t: Tensor, count: int) -> Tensor:
        if limited and not guidance.active(t[0]):
            with backbone.at_scale(1.0):
                return backbone(state, t)[0][None]
        return backbone(state, t)[0][None]

    positive = _labels(backbone, sidenet, "positive", x)
    return Field(guided, (positive,), NO_GUIDANCE, backbone.told_scale, pair)


def _can_split(backbone: Backbone) -> bool:
    if backbone.plain and not backbone.rescaled:
        return True
    if backbone.scale != 1 or not backbone.plain:
        warn(
            "this SideNet was trained on the branches of CFG one by one, but the guider, or a node on the MODEL, "
            "combines them in its own way. It is given the guided velocity instead, for which it is less accurate."
        )
    return False


def _branches_of(backbone: Backbone) -> Evaluate:
    def branches(state: Tensor, t: Tensor, count: int) -> Tensor:
        with backbone.at_scale(backbone.scale if count > 1 else 1.0):
            found = backbone(state, t, split=True)[1]
        return torch.stack(found[:count])

    return branches


def _branch_field(backbone: Backbone, sidenet: LoadedSideNet, guidance: Guidance, x: Tensor) -> Field:
    sides = ("positive", "negative") if guidance.scale != 1 else ("positive",)
    conditions = tuple(_labels(backbone, sidenet, side, x) for side in sides)
    return Field(_branches_of(backbone), conditions, guidance, backbone.scale)


def _labels(backbone: Backbone, sidenet: LoadedSideNet | None, side: str, x: Tensor) -> Tensor | None:
    """What a class-conditional SideNet is told of one side of the conditioning: class indices [B] for states x [B, …].

    Raises:
        ValueError: it names no class, several, or one that the SideNet does not know.
    """
    if sidenet is None or not sidenet.network.config.num_classes:
        return None
    classes = sidenet.network.config.num_classes
    labels = labels_of(backbone.guider.conds.get(side), x.shape[0])
    if labels is None:
        raise ValueError(
            f"The SideNet {sidenet.name!r} takes class labels, and the {side} conditioning has none. Connect Class "
            "Label, or set the method of BA-Solver Sampler to 'multistep'."
        )
    if labels.max() > classes or labels.min() < 0:
        raise ValueError(
            f"The SideNet {sidenet.name!r} knows the classes 0 to {classes - 1} and the null class {classes}; the "
            f"{side} conditioning asks for {labels.tolist()}. Use a SideNet made for this model."
        )
    return labels.to(x.device)


# --- the SideNet --------------------------------------------------------------------------------------------------


def _sidenet_for(options: Options, guider: Any) -> LoadedSideNet | None:
    """The SideNet to use; None for the multistep baseline.

    Raises:
        ValueError: the method needs one and the MODEL has none.
    """
    if options.method in WITHOUT_SIDENET:
        return None
    sidenet = applied_sidenet(guider.model_patcher)
    if sidenet is None:
        raise ValueError(
            "BA-solver needs a SideNet on the MODEL, and there is none. Add the nodes Load SideNet and Apply SideNet "
            "between the model loader and the sampler, or use BA-Solver Sampler with the method 'multistep', which "
            "does without."
        )
    if sidenet.strength == 0:
        return None
    for doubt in guidance_doubts(sidenet, guider):
        warn(doubt)
    return sidenet


def guidance_doubts(sidenet: LoadedSideNet, guider: Any) -> list[str]:
    """Where the run's guidance leaves what the SideNet was trained for.

    A model that takes its guidance as an input (FLUX.1-dev) was recorded with that and without CFG.
    """
    cfg, embedded = float(getattr(guider, "cfg", 1.0)), embedded_guidance(guider)
    trained = sidenet.card.guidance_range
    wanted = [("CFG", cfg, trained)]
    if embedded is not None:
        wanted = [("guidance", embedded, trained), ("CFG", cfg, (1.0, 1.0))]
    return [
        f"the SideNet {sidenet.name!r} was trained for {what} {low:g}{'' if low == high else f' to {high:g}'}; at "
        f"{scale:g} it is less accurate."
        for what, scale, (low, high) in wanted
        if not low - 1e-3 <= scale <= high + 1e-3
    ]


def embedded_guidance(guider: Any) -> float | None:
    """The guidance that the model is given as an input (FluxGuidance, or the model's own default); None for others.

    Read where ComfyUI puts it once sampling has begun. Several positive conditions count as the first.
    """
    network = getattr(guider.model_patcher.model, "diffusion_model", None)
    if not getattr(getattr(network, "params", None), "guidance_embed", False):
        return None
    given = [c["model_conds"].get("guidance") for c in guider.conds.get("positive", ()) if "model_conds" in c]
    return float(given[0].cond.flatten()[0]) if given and given[0] is not None else None


def check_latent(sidenet: LoadedSideNet, x: Tensor) -> None:
    """Refuse latents that the SideNet cannot take, before the first backbone call.

    Raises:
        ValueError: packed audio and video, one-dimensional, or of other channels.
    """
    if x.ndim not in (4, 5):
        raise ValueError(
            f"A SideNet takes images and videos; this latent is audio, or audio and video packed into one "
            f"{tuple(x.shape)}. Set the method of BA-Solver Sampler to 'multistep', which works without a SideNet."
        )
    channels = sidenet.network.config.in_channels
    if x.shape[1] != channels:
        raise ValueError(
            f"The SideNet {sidenet.name!r} takes latents of {channels} channels; this one has {x.shape[1]} "
            f"{tuple(x.shape)}. Use a SideNet made for this model, and an empty latent of the model's own kind."
        )


def _predictor(backbone: Backbone, sidenet: LoadedSideNet | None) -> Predictor | None:
    """The SideNet with its strength, held back where an inpaint mask keeps the image as it is.

    There the velocity points from the noise straight to the kept image and does not change along the path, which is
    what the straight line through two anchors says. Where another node lets the mask change with sigma, the one that
    ComfyUI used at the anchor holds, as it does for a step of other samplers.
    """
    if sidenet is None:
        return None
    if backbone.extra_args.get("denoise_mask") is None:
        return with_strength(sidenet.network, sidenet.strength)
    path: Path = backbone.schedule.path

    def weight(times: Tensor) -> Tensor:
        batch = backbone.shape[0]
        sigmas = path.sigmas(times)[::batch]  # queries are stacked whole batches, each at one time
        masks = [torch.as_tensor(backbone.mask(sigma)).expand(backbone.shape) for sigma in sigmas]
        return sidenet.strength * torch.cat(masks)

    return WeightedSideNet(sidenet.network, weight)


def _fitted_card(options: Options, sidenet: LoadedSideNet | None) -> SideNetCard | None:
    """The SideNet's card where the run is as its weights were fitted: with the defaults."""
    usual = Options(skip_first=options.skip_first)
    return None if sidenet is None or sidenet.strength != 1 or options != usual else sidenet.card


def sidenet_chunk(sidenet: LoadedSideNet, x: Tensor) -> int | None:
    """How many samples of x one SideNet call may take: whole batches, within half of the free memory.

    ComfyUI makes room for the SideNet's weights but not for its activations.
    """
    config = sidenet.network.config
    positions = math.prod(x.shape[2:]) / config.patch_size**2
    # The widest point, attention, holds the feature, its norm, q, k, v and their product; with as much again in use.
    each = 16 * config.base_channels * positions * sidenet.network.input_conv.weight.element_size()
    samples = int(comfy.model_management.get_free_memory(x.device) / 2 / each)
    batch = x.shape[0]
    return max(1, samples // batch) * batch


# --- what the user sees -------------------------------------------------------------------------------------------


def _step_callback(
    schedule: Schedule, shape: torch.Size, callback: Callable[[dict[str, Any]], None]
) -> Callable[[Step], None]:
    """The core's callback to ComfyUI's, with the dictionary of k-diffusion's samplers."""

    def told(step: Step) -> None:
        sigma = schedule.sigma_at(step.time)
        callback(
            {
                "i": step.index,
                "x": schedule.path.from_flow(step.x, sigma.to(step.x)).reshape(shape),
                "denoised": step.denoised.reshape(shape),
                "sigma": sigma,
                "sigma_hat": sigma,
            }
        )

    return told
