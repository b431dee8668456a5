"""What inversion and editing do to images whose truth is known: the demo's shapes, on the demo model.

    python -m ba_solver.lab.editing --out runs/editing            # about a quarter of an hour on one core
    python -m ba_solver.lab.editing --out runs/editing --search   # first search every solver's grids

Two kinds of table. *Round trips*: an image is inverted to noise and sampled back with the same number of model calls
each way, by each solver on its own best grid, and the noise is compared with a converged solution's. *Edits*: an image
of one class is sampled again as another. The same drawing with the other class is known, so that what should have
stayed can be measured: the ground, the shape's colour and its place.

Grids and settings are searched on other images than the reported ones; they are in `weights/demo_editing.json`. Each
finished part is written, and `--parts` measures the others.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bas_core.editing import FADE, NO_CONTROL, T_MIN, Control, edit, editing_grid, invert, straight_trajectory
from ..bas_core.files import write_text
from ..bas_core.flow import interpolate
from ..bas_core.grids import time_grid
from ..bas_core.guidance import Field
from ..bas_core.solver import solve
from ..training.baselines import BASELINES, Baseline, History, Velocity, run_baseline
from ..training.demo.assets import CLASSIFIER_FILE, DEMO_CFG, WEIGHTS, Demo, load_demo
from ..training.progress import progress, say
from ..training.schedules.solvers import GridShape, endpoint_errors
from .benchmark import spread
from .classifier import load_classifier
from .shapes import CLASS_NAMES, ShapeBatch, draw_shapes

SETTINGS_FILE = WEIGHTS / "demo_editing.json"
SEARCH_SEED, REPORT_SEED = 12_000_000, 14_000_000
Rows = list[dict[str, float]]


@dataclass(frozen=True)
class EditingSettings:
    """What is measured.

    Attributes:
        out: folder for `editing.json` and `editing.md`.
        search: find the best grids and edit settings anew, and write them to `weights/demo_editing.json`.
        parts: "edits", and round trips of `CASES`; the other parts stay as they are in `out`.
        images: of each seed's round trips.
        seeds: independent sets of images that are reported.
        search_images: on which grids are searched.
        edit_nfe: model calls of an edit, both ways together.
        edits_a_pair: images of each seed for each of the 90 ordered pairs of classes.
    """

    out: Path = Path("runs/editing")
    search: bool = False
    parts: tuple[str, ...] = ("clean", "edits", "noised", "guided")
    images: int = 22
    seeds: int = 3
    search_images: int = 6
    edit_nfe: tuple[int, ...] = (10, 20)
    edits_a_pair: int = 1


def drawn(seed: int, labels: Tensor) -> ShapeBatch:
    """Shapes of given classes; the same seed with other classes draws the same scenes with other shapes."""
    return draw_shapes(torch.Generator().manual_seed(seed), len(labels), labels)


def noise_for(images: Tensor, seed: int) -> Tensor:
    """Noise of the images' shape from a seed."""
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(seed + 1)).to(images)


# --- round trips -----------------------------------------------------------------------------------------------------

# For every solver and number of model calls: the best of these shifts, and then of these blends with it.
SEARCH_SHIFTS = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
SEARCH_COSINES = (0.15, 0.3, 0.5)
# RK4 steps of the converged solution, on a grid of shift 0.5: twice as many move it by 0.0001 at most.
REFERENCE_STEPS = 30


@dataclass(frozen=True)
class Case:
    """How round trips are made.

    Attributes:
        title: of the tables.
        cfg: CFG scale, both ways.
        noised: whether a little noise is mixed in first, as BA Invert does (see `invert`).
        nfe: numbers of model calls each way.
    """

    title: str
    cfg: float
    noised: bool
    nfe: tuple[int, ...] = (5, 7, 10, 20)

    def problem(self, demo: Demo, seed: int, count: int) -> tuple[ShapeBatch, Tensor, Field]:
        """Drawings, their states at `T_MIN`, and the model's field for them."""
        batch = drawn(seed, torch.arange(count) % len(CLASS_NAMES))
        states = interpolate(batch.images, noise_for(batch.images, seed), T_MIN) if self.noised else batch.images
        return batch, states, demo.field(batch.labels, self.cfg)


CASES = {
    "clean": Case("the image itself, CFG 1", 1.0, False),
    "noised": Case("5 % of noise mixed in, CFG 1", 1.0, True),
    "guided": Case(f"5 % of noise mixed in, CFG {DEMO_CFG:g}", DEMO_CFG, True, (5, 10)),
}


def fireflow(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
    """FireFlow's step (Deng et al. 2024, arXiv 2412.07517), order 2: the midpoint, found with the last step's velocity.

    One model call a step, and one more at the start.
    """
    half = (t1 - t0) / 2
    guess = history[-1][1] if history else velocity(x, t0)
    v = velocity(x + half * guess, t0 + half)
    return x + (t1 - t0) * v, ((t0, v),)


@dataclass(frozen=True)
class RoundTrip:
    """An inversion to noise, and a sampling back, by one solver over one grid.

    Attributes:
        name, label: in files and for people.
        integrate: (field, state, times) to the state at the last time, up or down.
        nfe_per_step: model calls a step.
        first_nfe: model calls before the first step, beside its own.
    """

    name: str
    label: str
    integrate: Callable[[Field, Tensor, Tensor], Tensor]
    nfe_per_step: int = 1
    first_nfe: int = 0

    def times(self, nfe: int, shape: GridShape) -> Tensor:
        """[N + 1] from noise to `T_MIN`."""
        intervals = math.ceil((nfe - self.first_nfe) / self.nfe_per_step)
        return T_MIN + (1 - T_MIN) * time_grid(intervals, *shape)

    def one_way(self, field: Field, x: Tensor, nfe: int, times: Tensor) -> Tensor:
        """Integrate over a grid in exactly `nfe` model calls.

        Where a step takes two and the number is odd, Euler takes the interval at the image, both ways.
        """
        if (nfe - self.first_nfe) % self.nfe_per_step == 0:
            return self.integrate(field, x, times)
        up = bool(times[0] < times[1])
        parts = [(times[:2], up), (times[1:], False)] if up else [(times[:-1], False), (times[-2:], True)]
        for part, by_euler in parts:
            if len(part) > 1:
                x = run_baseline("euler", field, x, part) if by_euler else self.integrate(field, x, part)
        return x

    def both_ways(self, field: Field, states: Tensor, nfe: int, shape: GridShape) -> tuple[Tensor, Tensor]:
        """The images' noise, and the images that it gives."""
        times = self.times(nfe, shape)
        noise = self.one_way(field, states, nfe, times.flip(0))
        return noise, self.one_way(field, noise, nfe, times)


def _by_baseline(baseline: Baseline, label: str, name: str = "", first_nfe: int = 0) -> RoundTrip:
    run: Callable[[Field, Tensor, Tensor], Tensor] = lambda field, x, t: run_baseline(baseline, field, x, t)  # noqa: E731
    return RoundTrip(name or baseline.name, label, run, baseline.calls_per_step, first_nfe)


def round_trips(demo: Demo) -> list[RoundTrip]:
    """The solvers that are compared.

    RF-Solver's second-order Taylor step (Wang et al. 2024, arXiv 2411.04746) takes the velocity's slope from half a
    step on, which makes it the explicit midpoint.
    """
    return [
        _by_baseline(BASELINES["euler"], "Euler"),
        _by_baseline(BASELINES["heun"], "Heun"),
        _by_baseline(BASELINES["midpoint"], "RF-Solver's step", "rf_solver"),
        _by_baseline(Baseline("fireflow", "FireFlow", 2, 1, fireflow), "FireFlow's step", first_nfe=1),
        _by_baseline(BASELINES["predictor_corrector"], "BA-solver without its SideNet"),
        RoundTrip("ba_solver", "BA-solver", lambda field, x, times: solve(field, demo.sidenet, x, times)),
    ]


def decibels(x: Tensor, reference: Tensor) -> Tensor:
    """[B] peak signal-to-noise ratios of images in [-1, 1]."""
    return 10 * torch.log10(4 / (x - reference).square().flatten(1).mean(1))


def search_round_trips(demo: Demo, case: Case, count: int) -> dict[str, dict[int, GridShape]]:
    """Every solver's best grid for every number of model calls."""
    _, states, field = case.problem(demo, SEARCH_SEED, count)

    def error(trip: RoundTrip, nfe: int, shape: GridShape) -> float:
        return endpoint_errors(trip.both_ways(field, states, nfe, shape)[1], states).mean().item()

    grids: dict[str, dict[int, GridShape]] = {}
    jobs = [(trip, nfe) for trip in round_trips(demo) for nfe in case.nfe]
    for trip, nfe in progress(jobs, f"grids, {case.title}"):
        errors: dict[GridShape, float] = {(s, 0.0): error(trip, nfe, (s, 0.0)) for s in SEARCH_SHIFTS}
        shift, _ = min(errors, key=errors.__getitem__)
        errors |= {(shift, c): error(trip, nfe, (shift, c)) for c in SEARCH_COSINES}
        grids.setdefault(trip.name, {})[nfe] = min(errors, key=errors.__getitem__)
    return grids


def measure_round_trips(
    settings: EditingSettings, demo: Demo, case: Case, grids: dict[str, dict[int, GridShape]]
) -> dict[str, dict[int, Rows]]:
    """A row a seed, by solver and number of model calls: mean PSNR of the images, and mean RMSE of the noise.

    "BA-solver with its residuals" has the worst image's PSNR.
    """
    found: dict[str, dict[int, Rows]] = {}
    times = T_MIN + (1 - T_MIN) * time_grid(REFERENCE_STEPS, 0.5)
    for seed in progress(range(settings.seeds), f"round trips, {case.title}"):
        batch, states, field = case.problem(demo, REPORT_SEED + seed, settings.images)
        truth = run_baseline("rk4", field, states, times.flip(0))
        for trip, nfe in itertools.product(round_trips(demo), case.nfe):
            before = field.calls
            noise, images = trip.both_ways(field, states, nfe, grids[trip.name][nfe])
            if field.calls - before != 2 * nfe:
                raise RuntimeError(f"{trip.label} spent {field.calls - before} model calls instead of {2 * nfe}.")
            psnr, error = decibels(images, states).mean().item(), endpoint_errors(noise, truth).mean().item()
            row = {"psnr": psnr, "noise": error}
            found.setdefault(trip.label, {}).setdefault(nfe, []).append(row)
        mixed = noise_for(batch.images, REPORT_SEED + seed) if case.noised else None
        for nfe in case.nfe:
            grid = editing_grid(time_grid(nfe - 1, *grids["ba_solver"][nfe]))
            source = invert(field, demo.sidenet, batch.images, grid, mixed)
            exact = decibels(edit(field, demo.sidenet, source), batch.images).min().item()
            found.setdefault("BA-solver with its residuals", {}).setdefault(nfe, []).append({"psnr": exact})
    return found


# --- edits -----------------------------------------------------------------------------------------------------------

# Gentler than sampling grids: at 5 model calls each way (2, 0) to (2.8, 0) cost a sixth in what should stay.
EDIT_SHAPE: GridShape = (1.4, 0.0)
# Searched: the best start at the first CFG scale, then the other scales with it.
EDIT_STARTS, CFG_SCALES = (0.7, 0.8, 0.9, 1.0), (3.5, DEMO_CFG, 5.0)
# How far a pixel must be from the ground, in any channel, to be the shape's. Shapes differ by 1 from their ground.
SHAPE_THRESHOLD = 0.4


@dataclass(frozen=True)
class Task:
    """Images to edit, and the truth about what should come out.

    Attributes:
        before, after: the drawing with the source class, and the same with the target class.
        noise: of the images' shape.
        source, target: the fields of both classes; the source's unguided.
    """

    before: ShapeBatch
    after: ShapeBatch
    noise: Tensor
    source: Field
    target: Field


def pairs(repeats: int) -> tuple[Tensor, Tensor]:
    """All ordered pairs of different classes, `repeats` times; with 0, every third of them, for searches."""
    ordered = list(itertools.permutations(range(len(CLASS_NAMES)), 2))
    # Nine pairs a source: the plain every third would be the same targets for each.
    ordered = ordered * repeats if repeats else [p for i, p in enumerate(ordered) if (i + i // 9) % 3 == 0]
    source, target = torch.tensor(ordered).unbind(1)
    return source, target


def tasks(demo: Demo, seed: int, repeats: int, cfg: float) -> Iterator[Task]:
    """Every pair of classes, each image with a scene of its own."""
    source, target = pairs(repeats)
    for index, (a, b) in enumerate(zip(source.split(45), target.split(45), strict=True)):
        before, after = drawn(seed + 1000 * index, a), drawn(seed + 1000 * index, b)
        noise = noise_for(before.images, seed + 1000 * index)
        yield Task(before, after, noise, demo.field(a, 1.0), demo.field(b, cfg))


Edit = Callable[[Demo, Task, int, float], Tensor]


def edit_grid(intervals: int, start: float) -> Tensor:
    """A grid from `start` down."""
    return start * time_grid(intervals, *EDIT_SHAPE)


def by_inversion(demo: Demo, task: Task, nfe: int, start: float) -> Tensor:
    """BA Edit: half of the model calls up, half down, with the residuals."""
    times = editing_grid(edit_grid(nfe // 2 - 1, start))
    source = invert(task.source, demo.sidenet, task.before.images, times, task.noise)
    return edit(task.target, demo.sidenet, source, Control(fade=FADE))


def inversion_free(demo: Demo, task: Task, nfe: int, start: float) -> Tensor:
    """BA Edit on the straight path: half of the model calls for the source, half for the target."""
    times = edit_grid(nfe // 2, start)
    source = straight_trajectory(task.source, demo.sidenet, task.before.images, task.noise, times)
    return edit(task.target, demo.sidenet, source, NO_CONTROL)


def flowedit(demo: Demo, task: Task, nfe: int, start: float) -> Tensor:
    """FlowEdit (Kulikov et al. 2024, algorithm 1, n_avg = 1, n_min = 0): Euler, with fresh noise at each step."""
    image, generator = task.before.images, torch.Generator().manual_seed(int(task.noise.abs().sum() * 1000))
    edited = image
    for t0, t1 in itertools.pairwise(start * time_grid(nfe // 2)):
        noised = interpolate(image, torch.randn(image.shape, generator=generator).to(image), t0)
        difference = task.target.velocity(edited + noised - image, t0) - task.source.velocity(noised, t0)
        edited = edited + (t1 - t0) * difference
    return edited


def renoising(demo: Demo, task: Task, nfe: int, start: float) -> Tensor:
    """Noise mixed in up to `start`, and all model calls on the way back, as in image to image (SDEdit)."""
    noised = interpolate(task.before.images, task.noise, start)
    return solve(task.target, demo.sidenet, noised, edit_grid(nfe, start))


EDITS: dict[str, tuple[str, Edit]] = {
    "inversion": ("BA Edit, inversion", by_inversion),
    "inversion_free": ("BA Edit, inversion-free", inversion_free),
    "flowedit": ("FlowEdit", flowedit),
    "renoising": ("re-noising", renoising),
}


def seen_shape(images: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """The mean colour [B, 3] and the centroid [B, 2] (x, y), in pixels, of what differs from the ground."""
    inside = ((images - ground).abs().amax(1) > SHAPE_THRESHOLD).float()
    weight = inside / inside.sum((1, 2)).clamp_min(1)[:, None, None]
    rows, columns = (torch.arange(images.shape[-1], dtype=images.dtype) for _ in range(2))
    centre = torch.stack([(weight.sum(1) * columns).sum(1), (weight.sum(2) * rows).sum(1)], 1)
    return (images * weight[:, None]).sum((2, 3)), centre


def faults(images: Tensor, task: Task) -> dict[str, Tensor]:
    """[B] each: how far an edit is from the drawing with the other class.

    `ground`: RMSE where the ground is in both drawings; `colour`: RMSE of the shape's mean colour; `place`: distance
    of the centroids in pixels.
    """
    images, ground = images.clamp(-1, 1), task.before.ground
    common = ((task.before.images == ground) & (task.after.images == ground)).all(1, keepdim=True).expand_as(images)
    squared = (images - ground).square() * common
    (colour, centre), (true_colour, true_centre) = seen_shape(images, ground), seen_shape(task.after.images, ground)
    return {
        "ground": (squared.flatten(1).sum(1) / common.flatten(1).sum(1)).sqrt(),
        "colour": (colour - true_colour).square().mean(1).sqrt(),
        "place": (centre - true_centre).square().sum(1).sqrt(),
    }


def judge(demo: Demo, method: Edit, nfe: int, start: float, cfg: float, seed: int, repeats: int) -> dict[str, float]:
    """Mean faults, and the share of edits that the classifier takes for the target class."""
    classifier = load_classifier(CLASSIFIER_FILE)
    values: dict[str, list[Tensor]] = {}
    for task in tasks(demo, seed, repeats, cfg):
        images = method(demo, task, nfe, start)
        right = classifier(images.clamp(-1, 1)).argmax(1) == task.after.labels
        for name, value in {"success": right.float(), **faults(images, task)}.items():
            values.setdefault(name, []).append(value)
    return {name: torch.cat(parts).mean().item() for name, parts in values.items()}


def search_edits(demo: Demo, nfe: int) -> dict[str, tuple[float, float]]:
    """Every method's best (start, CFG scale): least of what should have stayed, once nine in ten edits succeed."""
    found: dict[str, tuple[float, float]] = {}
    for name in progress(EDITS, f"settings of edits, {nfe} model calls"):

        def fault(start: float, cfg: float, method: Edit = EDITS[name][1]) -> float:
            row = judge(demo, method, nfe, start, cfg, SEARCH_SEED, 0)
            return 10 * max(0.0, 0.92 - row["success"]) + row["ground"] + row["colour"] + row["place"] / 10

        known = {(start, CFG_SCALES[0]): fault(start, CFG_SCALES[0]) for start in EDIT_STARTS}
        start, _ = min(known, key=known.__getitem__)
        known |= {(start, cfg): fault(start, cfg) for cfg in CFG_SCALES[1:]}
        found[name] = min(known, key=known.__getitem__)
    return found


def measure_edits(
    settings: EditingSettings, demo: Demo, nfe: int, chosen: dict[str, tuple[float, float]]
) -> dict[str, Rows]:
    """For every method, at its chosen settings, a row of means a seed."""
    found: dict[str, Rows] = {}
    for seed, name in progress(list(itertools.product(range(settings.seeds), EDITS)), f"edits, {nfe} model calls"):
        row = judge(demo, EDITS[name][1], nfe, *chosen[name], REPORT_SEED + 100_000 * seed, settings.edits_a_pair)
        found.setdefault(name, []).append(row)
    return found


# --- the report ------------------------------------------------------------------------------------------------------


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = [f"\n### {title}\n", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def markdown(result: dict[str, Any], settings_found: dict[str, Any]) -> str:
    """The tables as Markdown; those that there are."""
    lines: list[str] = []
    for case, by_solver in result["round_trips"].items():
        nfe = [f"{n} calls" for n in next(iter(by_solver.values()))]
        for key, title, digits in (("psnr", "Returned image, PSNR in dB", 1), ("noise", "Noise, RMSE", 3)):
            rows = [
                [label, *(spread([row[key] for row in rows], digits) for rows in by.values())]
                for label, by in by_solver.items()
                if key in next(iter(by.values()))[0]
            ]
            lines += table(f"{title}: {CASES[case].title}", ["solver", *nfe], rows)
    for nfe, by_name in result["edits"].items():
        cells = [
            [
                EDITS[name][0],
                ", ".join(f"{value:g}" for value in settings_found["edits"][nfe][name]),
                spread([100 * row["success"] for row in rows], 1) + " %",
                *(spread([row[key] for row in rows], 2 + (key != "place")) for key in ("ground", "colour", "place")),
            ]
            for name, rows in by_name.items()
        ]
        header = ["method", "start, CFG", "target class", "ground", "colour", "place, pixels"]
        lines += table(f"Edits, all 90 pairs of classes, {nfe} model calls", header, cells)
    return "\n".join(lines) + "\n"


def load_json(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    """A JSON file whose keys that are numbers become numbers; `default` where there is none."""

    def numbers(pairs: list[tuple[str, Any]]) -> dict[Any, Any]:
        return {int(key) if key.isdigit() else key: value for key, value in pairs}

    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=numbers) if path.exists() else default


def run_editing(settings: EditingSettings) -> dict[str, Any]:
    """Measure everything, and write it as JSON and Markdown after each part."""
    demo = load_demo()
    found = load_json(SETTINGS_FILE, {"grids": {}, "edits": {}})
    result = load_json(settings.out / "editing.json", {"round_trips": {}, "edits": {}})
    jobs = [(part, n) for part in settings.parts for n in (settings.edit_nfe if part == "edits" else (0,))]
    for part, nfe in jobs:
        with torch.inference_mode():
            if part == "edits":
                if settings.search:
                    found["edits"][nfe] = search_edits(demo, nfe)
                result["edits"][nfe] = measure_edits(settings, demo, nfe, found["edits"][nfe])
            else:
                case = CASES[part]
                if settings.search:
                    found["grids"][part] = search_round_trips(demo, case, settings.search_images)
                result["round_trips"][part] = measure_round_trips(settings, demo, case, found["grids"][part])
        if settings.search:
            write_text(SETTINGS_FILE, json.dumps(found, indent=1))
        write_text(settings.out / "editing.json", json.dumps(result, indent=1))
        write_text(settings.out / "editing.md", markdown(result, found))
    say(markdown(result, found))
    return result


if __name__ == "__main__":
    import tyro

    run_editing(tyro.cli(EditingSettings))
