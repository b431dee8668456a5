"""How far a sampler ends from the exact end of the same path: rivals, converged reference, grid search."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..bas_core.baselines import BASELINES, run_baseline
from ..bas_core.checkpoint import SideNetCard
from ..bas_core.grids import grid_of_calls, starts_short, time_grid
from ..bas_core.guidance import Field
from ..bas_core.sidenet import SideNet
from ..bas_core.solver import Predictor, solve

Run = Callable[[Field, Tensor, Tensor], Tensor]
GridShape = tuple[float, float]
UNIFORM: GridShape = (1.0, 0.0)


@dataclass(frozen=True)
class Sampler:
    """A competitor.

    Attributes:
        name, label: for files and for people.
        run: (field, noise [B, ...], times) to the end state.
        calls_per_step: backbone calls a step. Where it is 2, one or two Euler steps at the end spend the budget
            exactly and keep off t = 0, where a network's velocity means little (as EDM's Heun sampler does).
        start: the time that the model's noise is at; grids are scaled by it.
        grids: times by number of calls, used instead of the family's.
        skip_first: whether it saves the first call where the first interval is short; it then takes one more.
    """

    name: str
    label: str
    run: Run
    calls_per_step: int = 1
    start: float = 1.0
    grids: Mapping[int, Sequence[float]] | None = None
    skip_first: bool = False

    def times(self, calls: int, shape: GridShape = UNIFORM) -> Tensor:
        """The grid of the family (shift, cosine) that spends exactly `calls` backbone calls."""
        if self.grids is not None:
            return torch.tensor(self.grids[calls])
        intervals = calls if self.calls_per_step == 1 else calls // 2 + 1
        return grid_of_calls(lambda n: time_grid(n, *shape), intervals, self.skip_first)

    def sample(self, field: Field, noise: Tensor, calls: int, shape: GridShape = UNIFORM) -> Tensor:
        """Run on `calls` backbone calls."""
        times = self.times(calls, shape) * self.start
        if self.calls_per_step == 1:
            return self.run(field, noise, times)
        steps = (calls - 1) // 2
        x = self.run(field, noise, times[: steps + 1]) if steps else noise
        return run_baseline("euler", field, x, times[steps:])


def baseline_sampler(name: str, start: float = 1.0) -> Sampler:
    """A training-free solver of `bas_core.baselines` as a competitor."""
    solver = BASELINES[name]
    return Sampler(
        name, solver.label, lambda field, x, t: run_baseline(solver, field, x, t), solver.calls_per_step, start
    )


def sidenet_sampler(
    sidenet: Predictor,
    name: str = "ba_solver",
    label: str = "BA-solver",
    start: float = 1.0,
    card: SideNetCard | None = None,
    **options: Any,
) -> Sampler:
    """The bi-anchor solver with a SideNet as a competitor, with the step weights and half calls of its card where they
    suit the grid; `options` go to `solve`."""
    skips = start == 1 and bool(getattr(getattr(sidenet, "config", None), "mean_size", 0))

    def run(field: Field, x: Tensor, times: Tensor) -> Tensor:
        weights, halves = (None, None) if card is None else (card.weights_for(times), card.half_calls_for(times))
        return solve(field, sidenet, x, times, skip_first=skips, correct=weights, half_calls=halves, **options)

    return Sampler(name, label, run, start=start, skip_first=skips)


@dataclass
class Opened:
    """A field whose velocity at t = 1 is what a SideNet knows of it: other solvers notice nothing, and save a call."""

    field: Field
    first_velocity: Callable[[Tensor, Tensor], Tensor | None]

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, C, *spatial] states at one time."""
        known = self.first_velocity(x, t) if float(t) == 1 else None
        return self.field.velocity(x, t) if known is None else known


def with_first_call_saved(sampler: Sampler, sidenet: SideNet) -> Sampler:
    """A solver without a SideNet that is told the mean of the data all the same, and so saves its first call too."""

    def run(field: Field, x: Tensor, times: Tensor) -> Tensor:
        opened: Any = Opened(field, sidenet.first_velocity) if starts_short(times) else field
        return sampler.run(opened, x, times)

    return replace(
        sampler, name=f"{sampler.name}_mean", label=f"{sampler.label}, told the mean", run=run, skip_first=True
    )


def unipc(field: Field, x: Tensor, times: Tensor) -> Tensor:
    """UniPC (Zhao et al. 2023) as `diffusers` has it, order 2, bh2, on flow sigmas."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    scheduler.set_timesteps(sigmas=times[:-1].double().numpy(), device=x.device)
    for sigma, step in zip(times[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(field.velocity(x, sigma), step, x, return_dict=False)[0]
    return x


def rivals(start: float = 1.0) -> list[Sampler]:
    """The training-free solvers that BA-solver is measured against."""
    return [
        baseline_sampler("euler", start),
        baseline_sampler("heun", start),
        baseline_sampler("adams_bashforth2", start),
        baseline_sampler("dpmpp_2m", start),
        Sampler("unipc", "UniPC", unipc, start=start),
        baseline_sampler("predictor_corrector", start),
    ]


def line_up(samplers: Sequence[Sampler], calls: Sequence[int]) -> list[tuple[Sampler, int, str]]:
    """What a table compares: every sampler at every number of calls on both grids, and Euler with 100 calls."""
    jobs = [(sampler, n, grid) for n in calls for sampler in samplers for grid in ("uniform", "best")]
    return [*jobs, (baseline_sampler("euler", samplers[0].start), 100, "uniform")]


def converged_reference(field: Field, noise: Tensor, tolerance: float = 1e-5) -> Tensor:
    """The end of the path by adaptive Dormand-Prince 5 of `torchdiffeq`, relative and absolute tolerance alike."""
    from torchdiffeq import odeint

    ends = torch.tensor([1.0, 0.0], device=noise.device)
    return odeint(lambda t, x: field.velocity(x, t), noise, ends, rtol=tolerance, atol=tolerance, method="dopri5")[-1]


def endpoint_errors(x: Tensor, reference: Tensor) -> Tensor:
    """[B] root-mean-square differences."""
    return (x - reference).square().flatten(1).mean(1).sqrt()


@dataclass(frozen=True)
class Measurement:
    """One line of a table.

    Attributes:
        sampler, label: which.
        grid: "uniform" or "best".
        shape: (shift, cosine) of the grid.
        calls: backbone calls, counted, half ones as half.
        error: mean over the noises of the end-point RMSE.
        spread: standard error of that mean.
        seconds: per image.
    """

    sampler: str
    label: str
    grid: str
    shape: GridShape
    calls: int
    error: float
    spread: float
    seconds: float


def measure(
    sampler: Sampler, field: Field, noise: Tensor, reference: Tensor, calls: int, shape: GridShape, grid: str
) -> tuple[Measurement, Tensor]:
    """Sample, compare with the reference, and time it.

    Returns:
        The table's line, and the samples [B, C, *spatial].
    """
    before = field.cost
    start = time.perf_counter()
    x = sampler.sample(field, noise, calls, shape)
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / len(noise)
    errors = endpoint_errors(x, reference)
    spread = (errors.std() / len(noise) ** 0.5).item() if len(noise) > 1 else 0.0
    line = Measurement(
        sampler.name, sampler.label, grid, shape, round(field.cost - before), errors.mean().item(), spread, seconds
    )
    return line, x


SEARCH_SHIFTS = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
SEARCH_COSINES = (-0.2, 0.15, 0.5)
SEARCH_REFINEMENTS = 3


def search_grid(
    sampler: Sampler, field: Field, noise: Tensor, reference: Tensor, calls: int, start: GridShape | None = None
) -> GridShape:
    """The (shift, cosine) of least end-point error: a pattern search of halving step from `start`, or else from the
    best of a coarse lattice."""
    known: dict[GridShape, float] = {}

    def error(shape: GridShape) -> float:
        if shape not in known:
            known[shape] = endpoint_errors(sampler.sample(field, noise, calls, shape), reference).mean().item()
        return known[shape]

    best = start or min(itertools.product(SEARCH_SHIFTS, SEARCH_COSINES), key=error)
    ratio, step = 1.17, 0.17
    for _ in range(SEARCH_REFINEMENTS):
        shift, cosine = best
        near: Sequence[GridShape] = [
            best,
            (round(shift * ratio, 4), cosine),
            (round(shift / ratio, 4), cosine),
            (shift, round(min(1.0, cosine + step), 4)),
            (shift, round(max(-1.0, cosine - step), 4)),
        ]
        best = min(near, key=error)
        if best == (shift, cosine):
            ratio, step = ratio**0.5, step / 2
    return best
