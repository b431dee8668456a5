"""Edits of drawn shapes by several methods, and what they got wrong, read off the pixels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bas_core.editing import FADE, FREE, Control, edit, editing_grid, invert, straight_path
from ..bas_core.flow import interpolate
from ..bas_core.grids import time_grid
from ..bas_core.guidance import Field
from ..bas_core.solver import solve
from ..training.demo.assets import CLASSIFIER_FILE, DEMO_CFG, Demo
from ..training.progress import progress
from .classifier import load_classifier
from .editing_data import EDIT_SHAPE, REPORT_SEED, SEARCH_SEED, EditingSettings, drawn, noise_for
from .shapes import CLASS_NAMES, ShapeBatch

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
