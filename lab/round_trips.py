"""Images taken to noise and back, by every solver: which returns them best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as attribute

import torch
from torch import Tensor

from ..bas_core.baselines import BASELINES, Baseline, run_baseline
from ..bas_core.editing import START, edit, editing_grid, invert
from ..bas_core.flow import interpolate
from ..bas_core.grids import time_grid
from ..bas_core.guidance import Field
from ..bas_core.runs import Inversion
from ..bas_core.solver import solve
from ..training.demo.assets import DEMO_CFG, Demo
from ..training.progress import progress
from ..training.runs.samplers import GridShape, Run, Sampler, endpoint_errors
from .editing_data import REPORT_SEED, SEARCH_SEED, EditingSettings, drawn, noise_for
from .shapes import CLASS_NAMES, ShapeBatch

# The reconstructions' grids, each trial two runs: the best of these shifts, and then of these blends with it.
SEARCH_SHIFTS = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)

SEARCH_COSINES = (0.15, 0.3, 0.5)

# The converged solution's steps, of four calls, on a grid of shift 0.5: twice as many move it by 0.0001 at most.
REFERENCE_STEPS = 30


@dataclass(frozen=True)
class Case:
    """What is taken to noise and back.

    Attributes:
        title: of its tables.
        cfg: guidance, both ways.
        noised: whether a little noise is mixed in first, as BA Invert does (see `invert`).
        calls: calls per direction.
    """

    title: str
    cfg: float
    noised: bool
    calls: tuple[int, ...] = (5, 7, 10, 20)

    def starts(self, batch: ShapeBatch, seed: int) -> Tensor:
        """The states at `START` of a batch's images."""
        return interpolate(batch.images, noise_for(batch.images, seed), START) if self.noised else batch.images


CASES = {
    "clean": Case("the image itself, CFG 1", 1.0, False),
    "noised": Case("5 % of noise mixed in, CFG 1", 1.0, True),
    # Two branches a call: as dear as the others together.
    "guided": Case(f"5 % of noise mixed in, CFG {DEMO_CFG:g}", DEMO_CFG, True, (5, 10)),
}


@dataclass(frozen=True)
class RoundTrip(Sampler):
    """An image taken to noise and back, as a `Sampler` whose result is to be the image itself.

    Attributes:
        first_calls: see `Baseline`.
    """

    first_calls: int = 0

    def times(self, calls: int, shape: GridShape = (1.0, 0.0)) -> Tensor:
        """[N + 1] from noise to `START`, the same grid both ways."""
        intervals = math.ceil((calls - self.first_calls) / self.calls_per_step)
        return START + (1 - START) * time_grid(intervals, *shape)

    def one_way(self, field: Field, x: Tensor, calls: int, times: Tensor) -> Tensor:
        """Integrate over a grid in exactly `calls` calls.

        Where a step takes two and the number is odd, the interval at the image is left to Euler, both ways.
        """
        if (calls - self.first_calls) % self.calls_per_step == 0:
            return self.run(field, x, times)
        rest = len(times) > 2
        if times[0] < times[1]:
            x = run_baseline("euler", field, x, times[:2])
            return self.run(field, x, times[1:]) if rest else x
        x = self.run(field, x, times[:-1]) if rest else x
        return run_baseline("euler", field, x, times[-2:])

    def there(self, field: Field, images: Tensor, calls: int, shape: GridShape = (1.0, 0.0)) -> Tensor:
        """The images' noise."""
        return self.one_way(field, images, calls, self.times(calls, shape).flip(0))

    def back(self, field: Field, noise: Tensor, calls: int, shape: GridShape = (1.0, 0.0)) -> Tensor:
        """The noise's images."""
        return self.one_way(field, noise, calls, self.times(calls, shape))

    def sample(self, field: Field, noise: Tensor, calls: int, shape: GridShape = (1.0, 0.0)) -> Tensor:
        """There and back again from images (in the place of a sampler's noise), `calls` calls each way."""
        return self.back(field, self.there(field, noise, calls, shape), calls, shape)


@dataclass(frozen=True)
class FittedTrip(RoundTrip):
    """One that the SideNet's file holds runs for; for other numbers of calls it is the solver without them.

    Attributes:
        inversions: by calls each way.
    """

    inversions: Mapping[int, Inversion] = attribute(default_factory=dict)

    def one_way(self, field: Field, x: Tensor, calls: int, times: Tensor) -> Tensor:
        """Up or down, as the times go."""
        fitted = self.inversions.get(calls)
        if fitted is None:
            return super().one_way(field, x, calls, times)
        return self.run(field, x, fitted.up if times[0] < times[1] else fitted.down)


def round_trip(baseline: Baseline) -> RoundTrip:
    """A training-free solver's."""
    run: Run = lambda field, x, t: run_baseline(baseline, field, x, t)  # noqa: E731
    return RoundTrip(baseline.name, baseline.label, run, baseline.calls_per_step, first_calls=baseline.first_calls)


def round_trips(demo: Demo) -> list[RoundTrip]:
    """Those that are compared."""
    ours: Run = lambda field, x, t: solve(field, demo.sidenet, x, t)  # noqa: E731
    rivals = ("euler", "heun", "rf_solver", "fireflow", "predictor_corrector")
    return [*(round_trip(BASELINES[name]) for name in rivals), RoundTrip("ba_solver", "BA-solver", ours)]


def all_round_trips(demo: Demo) -> list[RoundTrip]:
    """The same, and ours by the runs in its SideNet's file, which need no search for a grid."""
    trips = round_trips(demo)
    return [
        *trips,
        FittedTrip("ba_solver", "BA-solver, fitted both ways", trips[-1].run, inversions=demo.card.inversions),
    ]


def decibels(x: Tensor, reference: Tensor) -> Tensor:
    """[B] peak signal-to-noise ratios of images in [-1, 1]."""
    return 10 * torch.log10(4 / (x - reference).square().flatten(1).mean(1))


def search_round_trips(settings: EditingSettings, demo: Demo, case: Case) -> dict[str, dict[int, GridShape]]:
    """Every solver's best grid for every number of calls."""
    batch = drawn(SEARCH_SEED, torch.arange(settings.search_images) % len(CLASS_NAMES))
    starts = case.starts(batch, SEARCH_SEED).to(settings.device)
    field = demo.field(batch.labels.to(settings.device), case.cfg)

    def error(trip: RoundTrip, calls: int, shape: GridShape) -> float:
        return endpoint_errors(trip.sample(field, starts, calls, shape), starts).mean().item()

    grids: dict[str, dict[int, GridShape]] = {}
    with torch.inference_mode():
        jobs = [(trip, calls) for trip in round_trips(demo) for calls in case.calls]
        for trip, calls in progress(jobs, f"grids, {case.title}"):
            errors: dict[GridShape, float] = {(s, 0.0): error(trip, calls, (s, 0.0)) for s in SEARCH_SHIFTS}
            shift, _ = min(errors, key=errors.__getitem__)
            errors |= {(shift, c): error(trip, calls, (shift, c)) for c in SEARCH_COSINES}
            grids.setdefault(trip.name, {})[calls] = min(errors, key=errors.__getitem__)
    return grids


def converged_noise(field: Field, starts: Tensor) -> Tensor:
    """What the images' noise would be without any error of integration."""
    times = START + (1 - START) * time_grid(REFERENCE_STEPS, 0.5)
    return run_baseline("rk4", field, starts, times.flip(0))


def reconstructions(
    settings: EditingSettings, demo: Demo, case: Case, grids: dict[str, dict[int, GridShape]]
) -> Iterator[dict[str, dict[int, list[dict[str, float]]]]]:
    """After every seed, for every solver and number of calls a row a seed: mean PSNR, and mean RMSE of the noise.

    "exact return" is ours with the residuals added back; of its images it has the worst one's PSNR.
    """
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for seed in range(settings.seeds):
        batch = drawn(REPORT_SEED + seed, torch.arange(settings.images) % len(CLASS_NAMES))
        starts = case.starts(batch, REPORT_SEED + seed).to(settings.device)
        field = demo.field(batch.labels.to(settings.device), case.cfg)
        with torch.inference_mode():
            truth = converged_noise(field, starts)
            jobs = [(trip, calls) for trip in all_round_trips(demo) for calls in case.calls]
            for trip, calls in progress(jobs, f"reconstruct, {case.title}, seed {seed}"):
                before, shape = field.calls, grids[trip.name][calls]
                noise = trip.there(field, starts, calls, shape)
                back = trip.back(field, noise, calls, shape)
                spent = field.calls - before
                if spent != 2 * calls:
                    raise RuntimeError(f"{trip.label} spent {spent} calls instead of {2 * calls}.")
                row = {
                    "psnr": decibels(back, starts).mean().item(),
                    "noise": endpoint_errors(noise, truth).mean().item(),
                }
                found.setdefault(trip.label, {}).setdefault(calls, []).append(row)
            images = batch.images.to(settings.device)
            noise = noise_for(batch.images, REPORT_SEED + seed).to(settings.device) if case.noised else None
            for calls in case.calls:
                times = editing_grid(time_grid(calls - 1, *grids["ba_solver"][calls]))
                source = invert(field, demo.sidenet, images, times, noise)
                exact = decibels(edit(field, demo.sidenet, source), images)
                found.setdefault("exact return", {}).setdefault(calls, []).append({"psnr": exact.min().item()})
        yield found
