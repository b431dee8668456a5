"""The sampler function that ComfyUI calls: the MODEL becomes a velocity field, and `bas_core.solve` makes the steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.patcher_extension
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...bas_core.guidance import Field
from ...bas_core.prediction import SideNetProtocol
from ...bas_core.schedule import Schedule
from ...bas_core.solver import Step, solve
from ..models.attach import KEY, LoadedSideNet, applied_sidenet
from ..models.parameterization import SigmaSchedule, flow_interval, flow_time, parameterization_of
from ..notify import log, warn
from .field import field_of
from .guider import cfg_of, is_comfyui_cfg, known_guidance, may_split
from .model_caller import ModelCaller
from .rewind import Rewind
from .schedule import Circumstances, place_of, schedule_for
from .sidenet import check_latent, guidance_warnings, predictor_of, sidenet_chunk
from .start import not_random_noise

BEFORE_LOADING = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
MULTISTEP = "multistep"
METHODS = ("bi_anchor", "single_anchor", MULTISTEP)


@dataclass(frozen=True)
class Options:
    """What BA-Solver Sampler sets.

    Attributes:
        method: one of METHODS.
        rule: name of a quadrature rule; None = the method's own.
        start_percent, end_percent: shares of the sampling between which CFG applies, 0 to 1, as ComfyUI's
            `percent_to_sigma` means them.
        follow_sigmas: sample at the scheduler's sigmas, whatever the SideNet's file holds.

    Raises:
        ValueError: the shares do not lie between 0 and 1, in this order.
    """

    method: str = METHODS[0]
    rule: str | None = None
    start_percent: float = 0.0
    end_percent: float = 1.0
    follow_sigmas: bool = False

    @property
    def default_solver(self) -> bool:
        """Whether a fitted schedule applies: its coefficients are for this method and its own rule."""
        return self.method == METHODS[0] and self.rule is None

    def __post_init__(self) -> None:
        if not 0 <= self.start_percent <= self.end_percent <= 1:
            raise ValueError(
                "start_percent and end_percent must lie between 0 and 1, and start_percent must not be above "
                f"end_percent; got {self.start_percent:g} and {self.end_percent:g}."
            )


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
    """BA-solver (arXiv 2601.21542), with the signature of k-diffusion's samplers.

    Args:
        model: ComfyUI's `KSamplerX0Inpaint`: `model(x, sigma, **extra_args)` is the denoised state.
        x: [B, C, *spatial] noised state at `sigmas[0]`.
        sigmas: [N + 1], falling. They say from where to where and in how many steps; the SideNet's file says at which
            sigmas the model is called (`schedule_for`), at most N times, a conditional-only call counting one half.
            Fewer than two leave the state as it is, as ComfyUI's samplers do.
        extra_args: passed on to the model.
        callback: called after each step with "x", "i", "sigma", "sigma_hat" and "denoised".
        disable: no progress bar.
        options: of the solver; None = the defaults.

    Returns:
        [B, C, *spatial] state at `sigmas[-1]`.

    Raises:
        ValueError: the sigmas, the latent or the SideNet do not fit; the message says what to do.
        NonFiniteError: the model returned NaN or infinity; the message says where.
    """
    options, extra_args = options or Options(), extra_args or {}
    if len(sigmas) < 2:
        return x
    given = SigmaSchedule.of(parameterization_of(model.inner_model.inner_model.model_sampling), sigmas)
    options = within_part(model.inner_model, given, options)
    schedule, text = choose_schedule(model, extra_args, x, given, options)
    used = given.over(schedule.grid)
    extra_args = with_sample_sigmas(extra_args, used.sigmas.to(sigmas))
    with open_solver(
        model, extra_args, used, x, options, disable, conditional_only=schedule.conditional_only > 0
    ) as solver:
        solver.announce(schedule, text)
        solver.progress.reset(schedule.calls)
        solver.field.finite.before_callbacks = False  # a wait that other samplers have not
        shape = x.shape if x.ndim > 3 else (*x.shape[:2], 1, x.shape[2])  # the core takes no audio [B, C, L]
        end = solve(
            solver.field,
            solver.predictor,
            used.parameterization.to_flow(x, sigmas[0].to(x)).reshape(shape),
            schedule,
            method=METHODS[0] if options.method == MULTISTEP else options.method,
            rule=options.rule,
            callback=None if callback is None else step_callback(used, x.shape, callback, len(sigmas) - 1),
            chunk=solver.chunk,
        )
        end = solver.caller.straight_where_masked(end, used.times[-1]) if schedule.coefficients else end
    return used.parameterization.from_flow(end.reshape(x.shape), sigmas[-1].to(x))


def within_part(guider: Any, given: SigmaSchedule, options: Options) -> Options:
    """The options; with the multistep method where a sampling leaves the part of the path that the SideNet is for, for
    it knows nothing of the rest."""
    sidenet, model_sampling = sidenet_of(options, guider), guider.inner_model.model_sampling
    if sidenet is None:
        return options
    start, end = float(given.times[0]), float(given.times[-1])
    highest = flow_time(model_sampling, model_sampling.sigma_max)
    if place_of(sidenet.card.part, start, end, highest).inside:
        return options
    warn(
        f"the SideNet {sidenet.name!r} was made for a part of the path, {sidenet.card.describe_part()}. It is not used "
        f"from {start:.3g} to {end:.3g}. Set the start and end steps, or the split of the sigmas, to that part."
    )
    return dataclasses.replace(options, method=MULTISTEP)


def sidenet_of(options: Options, guider: Any) -> LoadedSideNet | None:
    """The SideNet on a guider's MODEL, if there is one and the method uses it."""
    return None if options.method == MULTISTEP else applied_sidenet(guider.model_patcher)


def check_before_loading(model: Any) -> None:
    """Have ComfyUI refuse a latent that the SideNet on a MODEL cannot take before it loads either."""

    def check(executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, *rest: Any, **more: Any) -> Tensor:
        if getattr(sampler, "sampler_function", None) is sample_ba_solver:
            sidenet = sidenet_of(sampler.extra_options.get("options", Options()), executor.class_obj)
            if sidenet is not None:
                check_latent(sidenet, latent_image)
        result: Tensor = executor(noise, latent_image, sampler, *rest, **more)
        return result

    model.remove_wrappers_with_key(BEFORE_LOADING, KEY)
    model.add_wrapper_with_key(BEFORE_LOADING, KEY, check)


def choose_schedule(
    model: Any, extra_args: dict[str, Any], x: Tensor, given: SigmaSchedule, options: Options
) -> tuple[Schedule, str]:
    """The schedule of a sampling, and a sentence on it; the arguments are those of `sample_ba_solver`."""
    guider = model.inner_model
    sidenet = sidenet_of(options, guider)
    if options.follow_sigmas or not options.default_solver:
        return Schedule(given.times.tolist()), "the scheduler's times"
    model_sampling = guider.inner_model.model_sampling
    circumstances = Circumstances(
        not_random_noise(model, extra_args, x) if sidenet is not None and sidenet.has_data_mean else "",
        cfg_of(guider) != 1 and may_split(model, extra_args),
        (options.start_percent, options.end_percent) == (0.0, 1.0),
    )
    highest = flow_time(model_sampling, model_sampling.sigma_max)
    return schedule_for(sidenet, given, highest, known_guidance(guider), circumstances)


def with_sample_sigmas(extra_args: dict[str, Any], sigmas: Tensor) -> dict[str, Any]:
    """The sampler's arguments with the sigmas that are really sampled, which context windows and others look up."""
    options = extra_args.get("model_options", {})
    inside = {**options.get("transformer_options", {}), "sample_sigmas": sigmas}
    return {**extra_args, "model_options": {**options, "transformer_options": inside}}


class SolverInputs(NamedTuple):
    """What the core's solvers take, once ComfyUI is sampling.

    Attributes:
        caller: makes the model calls.
        field: of velocities, made of the calls.
        sidenet: None for the multistep method.
        predictor: the SideNet as the solver takes it.
        chunk: how many samples one SideNet call may take; None = all.
        progress: a bar that counts model calls, from 0 to the number of intervals.
    """

    caller: ModelCaller
    field: Field
    sidenet: LoadedSideNet | None
    predictor: SideNetProtocol | None
    chunk: int | None
    progress: Any

    def announce(self, schedule: Schedule, text: str) -> None:
        """Log what is done, in one line, and tell the user where it could be better."""
        if self.sidenet is None:
            solver = "the multistep method, without a SideNet"
        else:
            solver = f"the SideNet {self.sidenet.name!r} at strength {self.sidenet.strength:g}"
        log(f"{schedule.nfe:g} model calls, CFG {self.caller.cfg:g}, {solver}, {text}.")
        self.warn()

    def warn(self) -> None:
        """Tell the user where the SideNet and its schedule are less good than they could be."""
        if self.sidenet is None:
            return
        for text in guidance_warnings(self.sidenet, self.caller.guider):
            warn(text)
        splits = self.sidenet.card.cfg_mode == "per_branch" or any(
            each.conditional_only for each in self.sidenet.card.own_schedules.values()
        )
        own_cfg = self.caller.cfg == 1 and is_comfyui_cfg(self.caller.guider)
        if splits and not self.caller.can_split and not own_cfg:
            warn(
                "the guider, or a node on the MODEL, changes the model's calls or how CFG combines them. Positive and "
                "negative are evaluated at every call, and the SideNet is given the combined velocity, for which it "
                "may be less accurate."
            )


@contextmanager
def open_solver(
    model: Any,
    extra_args: dict[str, Any],
    sigmas: SigmaSchedule,
    x: Tensor,
    options: Options,
    disable: bool | None,
    *,
    conditional_only: bool = False,
    rewinds: bool = False,
) -> Iterator[SolverInputs]:
    """What the solver takes of a MODEL in the midst of ComfyUI's sampling, with a progress bar.

    Args:
        model, extra_args, x, disable: see `sample_ba_solver`; of x, shape and device are used.
        sigmas: at which the model will be called.
        options: of the solver.
        conditional_only: whether some calls may leave out the negative.
        rewinds: whether times may rise from call to call.

    Raises:
        ValueError: see `sample_ba_solver`.
    """
    guider = model.inner_model
    sidenet = sidenet_of(options, guider)
    if sidenet is not None:
        check_latent(sidenet, x)
    interval = flow_interval(guider.inner_model.model_sampling, options.start_percent, options.end_percent)
    with tqdm(total=len(sigmas.times) - 1, disable=disable, desc="model calls") as progress:
        caller = ModelCaller(model, extra_args, sigmas.to(x.device), x.shape, progress.update)
        if rewinds:
            caller.before_call = Rewind(guider, lambda: [guider.conds])
        field = field_of(caller, sidenet, interval, x, conditional_only)
        chunk = None if sidenet is None else sidenet_chunk(sidenet, x)
        yield SolverInputs(caller, field, sidenet, predictor_of(caller, sidenet), chunk, progress)


def step_callback(
    sigmas: SigmaSchedule, shape: torch.Size, callback: Callable[[dict[str, Any]], None], steps: int
) -> Callable[[Step], None]:
    """The core's step callback that calls one of k-diffusion's, with states of a shape.

    A schedule may have a step or two more than the scheduler gave sigmas for; the index runs over these `steps`.
    """

    def after(step: Step) -> None:
        sigma = sigmas.sigma_at(step.time)
        callback(
            {
                "i": step.index * steps // step.total,
                "x": sigmas.parameterization.from_flow(step.x, sigma).reshape(shape),
                "denoised": step.denoised.reshape(shape),
                "sigma": sigma,
                "sigma_hat": sigma,
            }
        )

    return after
