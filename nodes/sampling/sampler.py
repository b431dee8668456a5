"""The sampler function that ComfyUI calls: the MODEL becomes a velocity field, and `bas_core.solve` makes the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...bas_core.grids import same_times
from ...bas_core.guidance import Field
from ...bas_core.prediction import SideNetProtocol
from ...bas_core.schedule import Schedule, match_schedule
from ...bas_core.solver import Step, solve
from ..models.attach import LoadedSideNet
from ..models.parameterization import SigmaSchedule, flow_interval, parameterization_of
from ..notify import warn
from .field import field_of
from .guider import is_comfyui_cfg, sidenet_guidance
from .model_caller import ModelCaller
from .sidenet import check_latent, guidance_warnings, predictor_of, sidenet_chunk, sidenet_for

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
        analytic_first_step: a SideNet that knows the mean of the model's data may take the first model call's place.

    Raises:
        ValueError: the shares do not lie between 0 and 1, in this order.
    """

    method: str = METHODS[0]
    rule: str | None = None
    start_percent: float = 0.0
    end_percent: float = 1.0
    analytic_first_step: bool = True

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
        sigmas: [N + 1], falling. N model calls are made, or one fewer with an analytic first step; the model is not
            called at the last sigma.
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
    options = options or Options()
    guider = model.inner_model
    given = SigmaSchedule.of(parameterization_of(guider.inner_model.model_sampling), sigmas)
    schedule = schedule_for(options, sidenet_of(options, guider), given.times, sidenet_guidance(guider))
    used = given.over(schedule.grid)
    split = schedule.conditional_only > 0
    with open_solver(model, extra_args or {}, used, x, options, disable, split) as solver:
        solver.warn(schedule)
        solver.progress.reset(schedule.calls)
        shape = x.shape if x.ndim > 3 else (*x.shape[:2], 1, x.shape[2])  # the core takes no audio [B, C, L]
        end = solve(
            solver.field,
            solver.predictor,
            used.parameterization.to_flow(x, sigmas[0].to(x)).reshape(shape),
            schedule,
            method=METHODS[0] if options.method == MULTISTEP else options.method,
            rule=options.rule,
            callback=None if callback is None else step_callback(used, x.shape, callback),
            chunk=solver.chunk,
        )
    return used.parameterization.from_flow(end.reshape(x.shape), sigmas[-1].to(x))


def sidenet_of(options: Options, guider: Any) -> LoadedSideNet | None:
    """The SideNet on a guider's MODEL, if the method uses one; see `sidenet_for`."""
    return None if options.method == MULTISTEP else sidenet_for(guider)


def schedule_for(options: Options, sidenet: LoadedSideNet | None, times: Tensor, guidance: float) -> Schedule:
    """The SideNet's own schedule over these times where it has one; else the times alone.

    A scheduler node knows no CFG scale. Where the file holds a schedule of as many model calls for a scale nearer to
    `guidance`, that one is taken, with its times.

    Args:
        options: a schedule is used with the default method, rule and CFG range only.
        sidenet: None = multistep.
        times: [N + 1], falling.
        guidance: see `sidenet_guidance`.
    """
    if sidenet is None:
        return Schedule(times.tolist())
    card = sidenet.card
    default = sidenet.strength == 1 and options == Options(analytic_first_step=options.analytic_first_step)
    schedule = match_schedule(times, card.own_schedules if default else {}, sidenet.has_data_mean)
    if schedule.fitted:
        nearer = card.schedules_for(guidance).get(round(schedule.nfe))
        if nearer is not None and not same_times(times, nearer.times):
            schedule = nearer.scaled(float(times[0]))
    return schedule if options.analytic_first_step else replace(schedule, analytic_first_step=False)


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

    def warn(self, schedule: Schedule | None = None) -> None:
        """Tell the user where the SideNet and its schedule are less good than they could be."""
        if self.sidenet is None:
            return
        for text in guidance_warnings(self.sidenet, self.caller.guider):
            warn(text)
        split = self.sidenet.card.cfg_mode == "per_branch" or (schedule is not None and schedule.conditional_only)
        if split and not self.caller.can_split and (self.caller.cfg != 1 or not is_comfyui_cfg(self.caller.guider)):
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
    conditional_only: bool = False,
) -> Iterator[SolverInputs]:
    """What the solver takes of a MODEL in the midst of ComfyUI's sampling, with a progress bar.

    Args:
        model, extra_args, x, disable: see `sample_ba_solver`; of x, shape and device are used.
        sigmas: at which the model will be called.
        options: of the solver.
        conditional_only: whether some calls may leave out the negative.

    Raises:
        ValueError: see `sample_ba_solver`.
    """
    guider = model.inner_model
    sidenet = sidenet_of(options, guider)
    if sidenet is not None:
        check_latent(sidenet, x)
    interval = flow_interval(guider.inner_model.model_sampling, options.start_percent, options.end_percent)
    with tqdm(total=len(sigmas.times) - 1, disable=disable, desc="model calls") as progress:
        caller = ModelCaller(model, extra_args, sigmas, x.shape, progress.update)
        field = field_of(caller, sidenet, interval, x, conditional_only)
        chunk = None if sidenet is None else sidenet_chunk(sidenet, x)
        yield SolverInputs(caller, field, sidenet, predictor_of(caller, sidenet), chunk, progress)


def step_callback(
    sigmas: SigmaSchedule, shape: torch.Size, callback: Callable[[dict[str, Any]], None]
) -> Callable[[Step], None]:
    """The core's step callback that calls one of k-diffusion's, with states of a shape."""

    def after(step: Step) -> None:
        sigma = sigmas.sigma_at(step.time)
        callback(
            {
                "i": step.index,
                "x": sigmas.parameterization.from_flow(step.x, sigma.to(step.x)).reshape(shape),
                "denoised": step.denoised.reshape(shape),
                "sigma": sigma,
                "sigma_hat": sigma,
            }
        )

    return after
