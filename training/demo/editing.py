"""What inversion and editing do to images whose truth is known: the demo's shapes, on the demo model.

    python -m ba_solver.training.demo.editing --out runs/editing            # about a quarter of an hour on one core
    python -m ba_solver.training.demo.editing --out runs/editing --search   # first search every solver's grids

Two tables. *Reconstruction*: an image is taken to noise and back with the same number of calls each way, by each
solver on its own best grid, and the noise is compared with a converged solution's. *Edits*: an image of one class is
regenerated as another. The same drawing with the other class is known, so that what should have stayed can be measured:
the ground, the shape's colour and its place.
Grids and settings are searched on other images than the reported ones; they are kept in `weights/demo_editing.json`.
Every finished seed is on disk: a run that is stopped loses only the one that it was at, and `--parts` runs the rest.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bas_core.baselines import BASELINES, Baseline, run_baseline
from ...bas_core.checkpoint import write_atomically, write_text
from ...bas_core.editing import FADE, FREE, START, Control, edit, editing_grid, invert, straight_path
from ...bas_core.flow import interpolate
from ...bas_core.grids import time_grid
from ...bas_core.guidance import Field
from ...bas_core.solver import solve
from ..evaluate import GridShape, Run, Sampler, endpoint_errors
from ..progress import progress
from .assets import CLASSIFIER_FILE, DEMO_CFG, WEIGHTS, Demo, load_demo
from .classifier import load_classifier
from .shapes import CLASS_NAMES, ShapeBatch, draw_shapes

SETTINGS_FILE = WEIGHTS / "demo_editing.json"
SEARCH_SEED = 12_000_000
REPORT_SEED = 14_000_000
# How far a pixel must be from the ground, in any channel, to be the shape's. Shapes differ by 1 from their ground.
SHAPE_THRESHOLD = 0.4
# Gentler than sampling grids: at 5 calls each way (2, 0) to (2.8, 0) cost a sixth in what should stay.
EDIT_SHAPE: GridShape = (1.4, 0.0)
# The reconstructions' grids, each trial two runs: the best of these shifts, and then of these blends with it.
SEARCH_SHIFTS = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
SEARCH_COSINES = (0.15, 0.3, 0.5)
# The converged solution's steps, of four calls, on a grid of shift 0.5: twice as many move it by 0.0001 at most.
REFERENCE_STEPS = 30


@dataclass(frozen=True)
class EditingSettings:
    """What is measured.

    Attributes:
        out: folder for `editing.json`, `editing.md` and `edits_N.png`, N calls.
        search: search the best grids and edit settings anew and store them with the package.
        parts: what is measured, of `CASES` and "edits"; the other parts stay as they are in `out`.
        images: images a seed of the reconstructions; 66 in all.
        seeds: independent sets of images that are reported.
        search_images: images that grids are searched on.
        edit_calls: calls of an edit in all.
        edits_a_pair: images for each of the 90 ordered pairs of classes, and seed.
        device: where to run.
    """

    out: Path = Path("runs/editing")
    search: bool = False
    parts: tuple[str, ...] = ("clean", "edits", "noised", "guided")
    images: int = 22
    seeds: int = 3
    search_images: int = 6
    edit_calls: tuple[int, ...] = (10, 20)
    edits_a_pair: int = 1
    device: str = "cpu"


def drawn(seed: int, labels: Tensor) -> ShapeBatch:
    """Shapes of given classes; the same seed with other classes draws the same scenes with other shapes."""
    return draw_shapes(torch.Generator().manual_seed(seed), len(labels), labels)


def noise_for(images: Tensor, seed: int) -> Tensor:
    """Noise of the images' shape from a seed."""
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(seed + 1)).to(images)


# --- reconstruction -----------------------------------------------------------------------------------------------


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


def round_trip(baseline: Baseline) -> RoundTrip:
    """A training-free solver's."""
    run: Run = lambda field, x, t: run_baseline(baseline, field, x, t)  # noqa: E731
    return RoundTrip(baseline.name, baseline.label, run, baseline.calls_per_step, first_calls=baseline.first_calls)


def round_trips(demo: Demo) -> list[RoundTrip]:
    """Those that are compared."""
    ours: Run = lambda field, x, t: solve(field, demo.sidenet, x, t)  # noqa: E731
    rivals = ("euler", "heun", "rf_solver", "fireflow", "predictor_corrector")
    return [*(round_trip(BASELINES[name]) for name in rivals), RoundTrip("ba_solver", "BA-solver", ours)]


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
            jobs = [(trip, calls) for trip in round_trips(demo) for calls in case.calls]
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


# --- edits --------------------------------------------------------------------------------------------------------


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


def tasks(demo: Demo, seed: int, repeats: int, cfg: float, batch: int = 45) -> Iterator[Task]:
    """Every pair of classes, each image with a scene of its own."""
    source, target = pairs(repeats)
    for index, (a, b) in enumerate(zip(source.split(batch), target.split(batch), strict=True)):
        before, after = drawn(seed + 1000 * index, a), drawn(seed + 1000 * index, b)
        noise = noise_for(before.images, seed + 1000 * index)
        yield Task(before, after, noise, demo.field(a, 1.0), demo.field(b, cfg))


Edit = Callable[[Demo, Task, int, float], Tensor]


def edit_grid(intervals: int, start: float) -> Tensor:
    """A grid from `start` down."""
    return start * time_grid(intervals, *EDIT_SHAPE)


def by_inversion(demo: Demo, task: Task, calls: int, start: float) -> Tensor:
    """Ours: half of the calls up, half down, with the residuals."""
    times = editing_grid(edit_grid(calls // 2 - 1, start))
    source = invert(task.source, demo.sidenet, task.before.images, times, task.noise)
    return edit(task.target, demo.sidenet, source, Control(fade=FADE))


def by_inversion_alone(demo: Demo, task: Task, calls: int, start: float) -> Tensor:
    """Ours without the residuals: what an inversion loses, the edit loses."""
    times = editing_grid(edit_grid(calls // 2 - 1, start))
    source = invert(task.source, demo.sidenet, task.before.images, times, task.noise)
    return edit(task.target, demo.sidenet, source, Control(fade=0.0))


def inversion_free(demo: Demo, task: Task, calls: int, start: float) -> Tensor:
    """Ours on the straight path: half of the calls for the source, half for the target."""
    times = edit_grid(calls // 2, start)
    source = straight_path(task.source, demo.sidenet, task.before.images, task.noise, times)
    return edit(task.target, demo.sidenet, source, FREE)


def flowedit(demo: Demo, task: Task, calls: int, start: float) -> Tensor:
    """FlowEdit (Kulikov et al. 2024, algorithm 1, n_avg = 1, n_min = 0): Euler, with fresh noise at each step."""
    image, generator = task.before.images, torch.Generator().manual_seed(int(task.noise.abs().sum() * 1000))
    times = start * time_grid(calls // 2)
    moved = image
    for t0, t1 in itertools.pairwise(times):
        there = interpolate(image, torch.randn(image.shape, generator=generator).to(image), t0)
        difference = task.target.velocity(moved + there - image, t0) - task.source.velocity(there, t0)
        moved = moved + (t1 - t0) * difference
    return moved


def renoising(demo: Demo, task: Task, calls: int, start: float) -> Tensor:
    """Noise mixed in up to `start`, and all calls on the way back by BA-solver, as in image to image (SDEdit)."""
    there = interpolate(task.before.images, task.noise, start)
    return solve(task.target, demo.sidenet, there, edit_grid(calls, start))


EDITS: dict[str, tuple[str, Edit]] = {
    "inversion": ("BA Edit, inversion", by_inversion),
    "inversion_alone": ("the same without residuals", by_inversion_alone),
    "inversion_free": ("BA Edit, inversion-free", inversion_free),
    "flowedit": ("FlowEdit", flowedit),
    "renoising": ("re-noising", renoising),
}
# Searched: the best start at the first guidance, then the other guidances with it.
STARTS = (0.7, 0.8, 0.9, 1.0)
GUIDANCES = (3.5, DEMO_CFG, 5.0)
# Not searched: it shows what the residuals do at the settings of the method that has them.
ABLATED = {"inversion_alone": "inversion"}


@dataclass(frozen=True)
class Shape:
    """What is seen in images: [B, 3] mean colour, [B, 2] centroid (x, y) in pixels, [B] area in pixels."""

    colour: Tensor
    centre: Tensor
    area: Tensor


def seen_shape(images: Tensor, behind: Tensor) -> Shape:
    """The pixels that are not the ground's, as a shape."""
    inside = ((images - behind).abs().amax(1) > SHAPE_THRESHOLD).float()
    area = inside.sum((1, 2))
    weight = inside / area.clamp_min(1)[:, None, None]
    rows, columns = (torch.arange(images.shape[-1], dtype=images.dtype) for _ in range(2))
    centre = torch.stack([(weight.sum(1) * columns).sum(1), (weight.sum(2) * rows).sum(1)], 1)
    return Shape((images * weight[:, None]).sum((2, 3)), centre, area)


def faults(images: Tensor, task: Task) -> dict[str, Tensor]:
    """[B] each: how far an edit is from the drawing with the other class.

    `ground`: RMSE where the ground is in both drawings; `colour`: RMSE of the shape's mean colour; `place`: distance
    of the centroids in pixels.
    """
    images = images.clamp(-1, 1)
    behind = task.before.behind
    kept = ((task.before.images == behind) & (task.after.images == behind)).all(1, keepdim=True).expand_as(images)
    squared = (images - behind).square() * kept
    ours, truth = seen_shape(images, behind), seen_shape(task.after.images, behind)
    return {
        "ground": (squared.flatten(1).sum(1) / kept.flatten(1).sum(1)).sqrt(),
        "colour": (ours.colour - truth.colour).square().mean(1).sqrt(),
        "place": (ours.centre - truth.centre).square().sum(1).sqrt(),
    }


def judge(demo: Demo, method: Edit, calls: int, start: float, cfg: float, seed: int, repeats: int) -> dict[str, float]:
    """Mean faults and the share of edits that the classifier takes for the target class."""
    classifier = load_classifier(CLASSIFIER_FILE)
    values: dict[str, list[Tensor]] = {}
    for task in tasks(demo, seed, repeats, cfg):
        with torch.inference_mode():
            images = method(demo, task, calls, start)
            right = classifier(images.clamp(-1, 1)).argmax(1) == task.after.labels
        for name, value in {"success": right.float(), **faults(images, task)}.items():
            values.setdefault(name, []).append(value)
    return {name: torch.cat(parts).mean().item() for name, parts in values.items()}


def fault_of(row: dict[str, float]) -> float:
    """One number to choose settings by: what should have stayed, once nine in ten edits succeed."""
    return 10 * max(0.0, 0.92 - row["success"]) + row["ground"] + row["colour"] + row["place"] / 10


def search_edits(demo: Demo, calls: int) -> dict[str, tuple[float, float]]:
    """Every method's best (start, guidance) for a number of calls, on other images than the reported ones."""
    found: dict[str, tuple[float, float]] = {}
    for name in progress([name for name in EDITS if name not in ABLATED], f"settings of edits, {calls} calls"):

        def faults_at(start: float, cfg: float, method: Edit = EDITS[name][1]) -> float:
            return fault_of(judge(demo, method, calls, start, cfg, SEARCH_SEED, 0))

        known = {(start, GUIDANCES[0]): faults_at(start, GUIDANCES[0]) for start in STARTS}
        start, _ = min(known, key=known.__getitem__)
        known |= {(start, cfg): faults_at(start, cfg) for cfg in GUIDANCES[1:]}
        found[name] = min(known, key=known.__getitem__)
    return found | {name: found[other] for name, other in ABLATED.items()}


def edit_table(
    settings: EditingSettings, demo: Demo, calls: int, chosen: dict[str, tuple[float, float]]
) -> Iterator[dict[str, list[dict[str, float]]]]:
    """After every seed, for every method, at its chosen settings, a row of means a seed."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(settings.seeds):
        for name in progress(EDITS, f"edits, {calls} calls, seed {seed}"):
            row = judge(demo, EDITS[name][1], calls, *chosen[name], REPORT_SEED + 100_000 * seed, settings.edits_a_pair)
            found.setdefault(name, []).append(row)
        yield found


def draw_page(path: Path, demo: Demo, calls: int, chosen: dict[str, tuple[float, float]], count: int = 10) -> None:
    """A page of edits: a column an image, a row a method, with the original and the truth above."""
    from matplotlib.figure import Figure

    source = torch.arange(count) % len(CLASS_NAMES)
    target = (source + 3) % len(CLASS_NAMES)
    before, after = drawn(REPORT_SEED + 77, source), drawn(REPORT_SEED + 77, target)
    rows = {"image": before.images, "drawn anew": after.images}
    for name, (label, method) in EDITS.items():
        start, cfg = chosen[name]
        task = Task(before, after, noise_for(before.images, 77), demo.field(source, 1.0), demo.field(target, cfg))
        with torch.inference_mode():
            rows[label] = method(demo, task, calls, start)
    figure = Figure(figsize=(1.9 + count, 1.05 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), count, squeeze=False)
    for line, (label, images) in zip(panels, rows.items(), strict=True):
        for index, panel in enumerate(line):
            picture = images[index].clamp(-1, 1).add(1).div(2).permute(1, 2, 0)
            panel.imshow(picture.numpy(), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for panel, a, b in zip(panels[0], source.tolist(), target.tolist(), strict=True):
        panel.set_title(f"{CLASS_NAMES[a]}\n→ {CLASS_NAMES[b]}", fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


# --- the page of numbers ------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    deviation = statistics.pstdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def reconstruction_tables(rows: dict[str, dict[int, list[dict[str, float]]]], case: Case) -> list[str]:
    """One table of the returns, one of the noise."""
    lines = []
    for key, title, digits in (
        ("psnr", "Reconstruction, PSNR in dB", 1),
        ("noise", "Error of the noise, RMSE against a converged solution", 3),
    ):
        held = {label: by for label, by in rows.items() if key in next(iter(by.values()))[0]}
        calls = list(next(iter(held.values())))
        lines += [f"\n### {title}: {case.title}\n"]
        lines += ["| solver | " + " | ".join(f"{n} calls" for n in calls) + " |", "|---" * (len(calls) + 1) + "|"]
        for label, by_calls in held.items():
            cells = (spread([row[key] for row in by_calls[n]], digits) for n in calls)
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The tables as Markdown; those that there are."""
    lines = []
    for name, rows in result["reconstruction"].items():
        lines += reconstruction_tables(rows, CASES[name])
    for calls, by_name in result["edits"].items():
        lines += [f"\n### Edits, all 90 pairs of classes, {calls} calls in all\n"]
        lines += ["| method | start, CFG | target class | ground | colour | place, pixels |", "|---" * 6 + "|"]
        for name, rows in by_name.items():
            cells = [
                spread([100 * row["success"] for row in rows], 1) + " %",
                *(spread([row[key] for row in rows], 3) for key in ("ground", "colour")),
                spread([row["place"] for row in rows], 2),
            ]
            start, cfg = result["settings_found"]["edits"][calls][name]
            lines.append(f"| {EDITS[name][0]} | {start:g}, {cfg:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _by_calls(table: dict[str, Any]) -> dict[int, Any]:
    return {int(calls): value for calls, value in table.items()}


def load_found(path: Path) -> dict[str, Any]:
    """What `--search` wrote."""
    content = json.loads(path.read_text())
    grids = {case: {name: _by_calls(by) for name, by in table.items()} for case, table in content["grids"].items()}
    return {"grids": grids, "edits": _by_calls(content["edits"])}


def load_result(path: Path) -> dict[str, Any]:
    """What an earlier run left; nothing if there was none."""
    if not path.exists():
        return {"reconstruction": {}, "edits": {}}
    content = json.loads(path.read_text())
    cases = {
        case: {name: _by_calls(by) for name, by in rows.items()} for case, rows in content["reconstruction"].items()
    }
    return {"reconstruction": cases, "edits": _by_calls(content["edits"])}


class Benchmark:
    """What has been found so far, written down after every seed."""

    def __init__(self, settings: EditingSettings) -> None:
        self.settings = settings
        self.demo = load_demo(settings.device)
        self.found = load_found(SETTINGS_FILE) if SETTINGS_FILE.exists() else {"grids": {}, "edits": {}}
        self.result = load_result(settings.out / "editing.json")
        self.result["settings"] = {key: str(value) for key, value in asdict(settings).items()}
        self.result["settings_found"] = self.found

    def keep(self) -> None:
        """Write everything but the pictures."""
        if self.settings.search:
            write_text(SETTINGS_FILE, json.dumps(self.found, indent=1))
        write_text(self.settings.out / "editing.json", json.dumps(self.result, indent=1))
        write_text(self.settings.out / "editing.md", markdown(self.result))

    def measure_case(self, name: str) -> None:
        """Reconstructions of one of `CASES`."""
        if self.settings.search:
            self.found["grids"][name] = search_round_trips(self.settings, self.demo, CASES[name])
            self.keep()
        for rows in reconstructions(self.settings, self.demo, CASES[name], self.found["grids"][name]):
            self.result["reconstruction"][name] = rows
            self.keep()

    def measure_edits(self, calls: int) -> None:
        """Edits with a number of calls in all, and a page of them."""
        if self.settings.search:
            self.found["edits"][calls] = search_edits(self.demo, calls)
            self.keep()
        chosen = self.found["edits"][calls]
        draw_page(self.settings.out / f"edits_{calls}.png", self.demo, calls, chosen)
        for rows in edit_table(self.settings, self.demo, calls, chosen):
            self.result["edits"][calls] = rows
            self.keep()


def run_editing(settings: EditingSettings) -> dict[str, Any]:
    """Measure everything, and write it as JSON, Markdown and pages of pictures."""
    benchmark = Benchmark(settings)
    for part in settings.parts:
        if part == "edits":
            for calls in settings.edit_calls:
                benchmark.measure_edits(calls)
        else:
            benchmark.measure_case(part)
    print(markdown(benchmark.result))
    return benchmark.result


if __name__ == "__main__":
    import tyro

    run_editing(tyro.cli(EditingSettings))
