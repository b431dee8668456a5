"""The sampler function that ComfyUI calls: a run is opened on the model, and `bas_core.solve` makes its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...bas_core.grids import same_grid
from ...bas_core.guidance import Field
from ...bas_core.runs import FittedRun, run_over
from ...bas_core.solver import Step, solve
from ...bas_core.steps import Predictor
from ..models.attach import LoadedSideNet
from ..models.paths import Schedule, flow_interval, path_of
from ..say import warn
from .backbone import Backbone, guidance_of
from .field import field_of
from .sidenet import check_latent, guidance_doubts, predictor_of, sidenet_chunk, sidenet_for

WITHOUT_SIDENET = ("multistep",)
METHODS = ("bi_anchor", "single_anchor", *WITHOUT_SIDENET)


@dataclass(frozen=True)
class Options:
    """What the sampler node sets.

    Attributes:
        method: one of METHODS.
        rule: name of a quadrature rule; None = the method's own.
        start_percent, end_percent: shares of the sampling between which CFG applies; 0 is its first step, 1 its end.
        analytic_first_step: a SideNet that knows the mean of the model's data may compute the first step without the
            backbone.

    Raises:
        ValueError: the shares are not in order.
    """

    method: str = "bi_anchor"
    rule: str | None = None
    start_percent: float = 0.0
    end_percent: float = 1.0
    analytic_first_step: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.start_percent <= self.end_percent <= 1:
            raise ValueError(
                f"start_percent ({self.start_percent:g}) must not be above end_percent ({self.end_percent:g})."
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
    asked = Schedule.of(path_of(guider.inner_model.model_sampling), sigmas)
    run = run_for(options, sidenet_of(options, guider), asked.times, guidance_of(guider))
    schedule = asked.over(run.grid)
    with opened(model, extra_args or {}, schedule, x, options, disable) as on:
        on.say_doubts()
        on.progress.reset(run.calls)
        if run.halves and on.backbone.scale != 1 and not on.backbone.separable:
            warn(
                f"{run.halves} of the {run.calls} calls could leave the negative out, but the guider, or a node on the "
                "MODEL, works on both branches in its own way: both are evaluated at every call."
            )
            run = replace(run, half_calls=())
        shape = x.shape if x.ndim > 3 else (*x.shape[:2], 1, x.shape[2])  # the core knows no audio [B, C, L]
        end = solve(
            on.field,
            on.predictor,
            schedule.path.to_flow(x, sigmas[0].to(x)).reshape(shape),
            run,
            method="bi_anchor" if options.method in WITHOUT_SIDENET else options.method,
            rule=options.rule,
            callback=None if callback is None else step_callback(schedule, x.shape, callback),
            chunk=on.chunk,
        )
    return schedule.path.from_flow(end.reshape(x.shape), sigmas[-1].to(x))


class Opened(NamedTuple):
    """What the functions of the core are called with, once ComfyUI is sampling.

    Attributes:
        backbone: makes the calls.
        field: made of them.
        sidenet: None for the multistep baseline.
        predictor: the SideNet as the solver takes it.
        chunk: how many samples one SideNet call may take.
        progress: a bar that counts backbone calls; how many there will be is for the caller to say.
    """

    backbone: Backbone
    field: Field
    sidenet: LoadedSideNet | None
    predictor: Predictor | None
    chunk: int | None
    progress: Any

    def say_doubts(self) -> None:
        """Tell the user where the SideNet is less accurate than it should be."""
        for doubt in guidance_doubts(self.sidenet, self.backbone.guider) if self.sidenet else ():
            warn(doubt)


@contextmanager
def opened(
    model: Any, extra_args: dict[str, Any], schedule: Schedule, x: Tensor, options: Options, disable: bool | None
) -> Iterator[Opened]:
    """Open a run on a MODEL: the one way from ComfyUI's sampling into the core.

    Args:
        model, extra_args, x, disable: see `sample_ba_solver`; of x, shape and device are used.
        schedule: of the run.
        options: of the solver.

    Raises:
        ValueError: see `sample_ba_solver`.
    """
    sidenet = sidenet_of(options, model.inner_model)
    if sidenet is not None:
        check_latent(sidenet, x)
    with tqdm(total=len(schedule.times) - 1, disable=disable, desc="backbone calls") as progress:
        backbone = Backbone(model, extra_args, schedule, x.shape, progress.update)
        sampling = backbone.guider.inner_model.model_sampling
        interval = flow_interval(sampling, options.start_percent, options.end_percent)
        field = field_of(backbone, sidenet, interval, x)
        chunk = None if sidenet is None else sidenet_chunk(sidenet, x)
        yield Opened(backbone, field, sidenet, predictor_of(backbone, sidenet), chunk, progress)


def sidenet_of(options: Options, guider: Any) -> LoadedSideNet | None:
    """The SideNet on a guider's MODEL, if the method uses one; see `sidenet_for`."""
    return None if options.method in WITHOUT_SIDENET else sidenet_for(guider)


def run_for(options: Options, sidenet: LoadedSideNet | None, times: Tensor, scale: float) -> FittedRun:
    """The run over a schedule's times: one of the SideNet's own where it is as they were fitted, with the defaults.

    The times of a run of its own ask for as many calls. A scheduler knows no CFG scale, and so, where the file holds
    a run of as many for a scale that is nearer to this one, that is taken, with its times.
    """
    if sidenet is None:
        return FittedRun(times)
    card = sidenet.card
    usual = sidenet.strength == 1 and options == Options(analytic_first_step=options.analytic_first_step)
    run = run_over(times, card.runs if usual else {}, sidenet.knows_mean)
    if run.fitted:
        nearer = card.runs_at(scale).get(round(run.cost))
        if nearer is not None and not same_grid(times, nearer.times):
            run = nearer.scaled(float(times[0]))
    return run if options.analytic_first_step else replace(run, skip_first=False)


def step_callback(
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
