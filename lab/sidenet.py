"""SideNets for the demo backbone by the trainer's own recipe: its figures over several seeds, and what each part gives.

    python -m ba_solver.lab.sidenet --out runs/demo_sidenet             # about two hours, two cores
    python -m ba_solver.lab.sidenet --out runs/demo_sidenet --levers    # half an hour more

For every seed it records chains and makes a SideNet from them, one whose network adds nothing but whose times and
weights are found and tuned alike, and one by the published objective with twice the backbone calls. All of them, the
solvers without a SideNet on their best grids and the learned multistep solver are then measured on noises that none of
them has seen, by the distance of pixels and by that of a classifier's features. What is finished is not done again when
the same command goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bas_core.checkpoint import SideNetCard, load_sidenet
from ..bas_core.files import write_safetensors
from ..bas_core.guidance import Field
from ..training.backbones import Backbone, open_backbone
from ..training.demo.assets import CLASSIFIER_FILE, DEMO_CFG, SIT_FILE, demo_noise, load_grids
from ..training.efforts import with_effort
from ..training.make import MakeSettings
from ..training.measuring.reference import draw_paths
from ..training.measuring.rivals import converged_reference, more_rivals, rivals
from ..training.measuring.score import learned_multistep
from ..training.network.published import CHAIN_STEPS
from ..training.progress import progress
from ..training.recording.record import record
from ..training.runs.samplers import GridShape, Sampler, endpoint_errors, search_grid, sidenet_sampler
from ..training.runs.search import coordinate_search
from ..training.train import train_from
from .classifier import Classifier, feature_distances, load_classifier
from .kept import kept, write_report
from .shapes import draw_shapes

CALLS = (5, 7, 10)
# What a measurement holds, in this order.
DISTANCES = ("pixels", "a classifier's features")
Row = dict[int, list[float]]
OURS, WITHOUT, PUBLISHED = "BA-solver", "the same without its network", "the paper's objective, twice the calls"
MADE = (OURS, WITHOUT, PUBLISHED)
# Rivals whose grids are searched further: those within this factor of the best.
NEAR_BEST = 1.5
REPORT_SEED, SEARCH_SEED = 8_000_000, 9_000_000
# Ours may spend 50,000 guided calls; the published objective gets twice that, whatever ours did spend.
PUBLISHED_IMAGES, PUBLISHED_BATCH, PUBLISHED_CALLS = 20_000, 32, 100_000
# What the default recipe becomes if one part of it is left out or exchanged.
LEVERS: Mapping[str, Mapping[str, Any]] = {
    "one anchor": {"anchors": 1},
    "convolution body": {"body": "convolution", "base_channels": 96, "num_layers": 4, "embedding_dim": 48},
    "AdamW": {"muon": False, "learning_rate": 2e-3},
    "first call made": {"mean_size": 0},
    "closed loop": {"closed_loop": 200},
}


@dataclass(frozen=True)
class FigureSettings:
    """What is trained and measured.

    Attributes:
        out: folder for recordings, SideNets, `training.json` and `training.md`.
        seeds: training seeds.
        steps: of each training.
        effort: of `ba-solver make`; its chains, starts, search and tuning.
        noises: held-out noises of the report.
        search_noises: on which the grids of what has no learned grids are searched.
        levers: also train the variants in `LEVERS`, from the first seed's chains.
    """

    out: Path = Path("runs/demo_sidenet")
    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int = 2200
    effort: str = "thorough"
    noises: int = 96
    search_noises: int = 20
    levers: bool = False


def recipe(settings: FigureSettings, out: Path, seed: int, **changes: Any) -> MakeSettings:
    """What `ba-solver make` is told: an effort, and the SideNet's size, under a tenth of the demo backbone's."""
    usual: dict[str, Any] = {
        "steps": settings.steps,
        "patch_size": 4,
        "num_layers": 2,
        "embedding_dim": 48,
        "grid_nfe": ",".join(map(str, CALLS)),
        "resume": True,
    }
    told = MakeSettings(backbone=f"sit:{SIT_FILE}", guidance=(DEMO_CFG,), out=out, seed=seed, **{**usual, **changes})
    return with_effort(told, settings.effort)


def trained(settings: MakeSettings, chains: Path, backbone: Backbone) -> SideNetCard:
    """Train unless it is done; returns what the file says."""
    if not settings.out.exists():
        train_from(settings, settings, (chains,), settings.out, settings, backbone)
    return load_sidenet(settings.out)[1]


def spent(card: SideNetCard) -> int:
    """Guided backbone calls of a whole training; the published objective's are of one branch, half as dear."""
    calls: dict[str, int] = card.training["backbone_calls"]
    return round(sum(n / 2 if name == "published" else n for name, n in calls.items()))


def published(settings: FigureSettings, seed: int, backbone: Backbone) -> Path:
    """Train by the published objective; returns the SideNet's file."""
    folder = settings.out / "published"
    latents, few = folder / "images.safetensors", folder / "chains"
    if not latents.exists():
        shapes = draw_shapes(torch.Generator().manual_seed(1), PUBLISHED_IMAGES, torch.arange(PUBLISHED_IMAGES) % 10)
        write_safetensors(latents, {"latents": shapes.images, "labels": shapes.labels}, {})
    steps = round(PUBLISHED_CALLS / ((CHAIN_STEPS + 1) / 2 * PUBLISHED_BATCH))
    job = recipe(
        settings,
        folder / f"seed{seed}.safetensors",
        seed,
        objective="published",
        latents=latents,
        mode="branch",
        anchors=1,
        mean_size=0,
        batch=PUBLISHED_BATCH,
        steps=steps,
        save_every=max(1, steps // 4),
        grid_nfe="",
    )
    job = dataclasses.replace(job, chains=32, starts=0, tune=0)  # whatever the effort says
    if not job.out.exists():
        record(job, dataclasses.replace(job, seed=1), few, backbone)  # to validate on
    trained(job, few, backbone)
    return job.out


# --- measuring ------------------------------------------------------------------------------------------------------


@cache
def shipped_classifier() -> Classifier:
    """Whose features the pictures are compared by."""
    return load_classifier(CLASSIFIER_FILE)


@dataclass(frozen=True)
class Measured:
    """Noises, and the exact ends of their paths.

    Attributes:
        backbone: the demo model.
        noise, labels: [B, C, H, W], [B].
        reference: [B, C, H, W].
    """

    backbone: Backbone
    noise: Tensor
    labels: Tensor
    reference: Tensor

    @classmethod
    def draw(cls, backbone: Backbone, seed: int, count: int) -> Measured:
        noise, labels = demo_noise(seed, count)
        return cls(backbone, noise, labels, converged_reference(backbone.field(labels, DEMO_CFG), noise))

    def field(self, mode: Any = "guided") -> Field:
        return self.backbone.field(self.labels, DEMO_CFG, mode=mode)

    def ends(self, sampler: Sampler, calls: int, shape: GridShape, mode: str = "guided") -> Tensor:
        """[B, C, H, W] where a sampler leads.

        Raises:
            RuntimeError: the sampler spent another number of calls than it was given.
        """
        field = self.field(mode)
        x = sampler.sample(field, self.noise, calls, shape)
        if field.cost != calls:
            raise RuntimeError(f"{sampler.label} was given {calls} calls and spent {field.cost:g}.")
        return x

    def pixels(self, sampler: Sampler, calls: int, shape: GridShape) -> float:
        """Mean distance of pixels from the exact ends, which grids are searched by."""
        return endpoint_errors(self.ends(sampler, calls, shape), self.reference).mean().item()

    def errors(self, sampler: Sampler, calls: int, shape: GridShape, mode: str = "guided") -> list[float]:
        """Mean distance from the exact ends: of pixels, and of a classifier's features."""
        x = self.ends(sampler, calls, shape, mode)
        features = feature_distances(shipped_classifier(), x, self.reference)
        return [endpoint_errors(x, self.reference).mean().item(), features.mean().item()]


def by_calls(found: Mapping[str, list[float]]) -> Row:
    """A row of a table, as it was before it was kept in a file."""
    return {int(calls): errors for calls, errors in found.items()}


def sidenet_errors(path: Path, report: Measured, search: Measured) -> Row:
    """A SideNet's end-point errors, on its learned grids or else on those searched for it here; kept beside it."""
    key = [hashlib.sha256(path.read_bytes()).hexdigest(), len(report.noise), len(search.noise), DISTANCES]
    return by_calls(kept(path.with_suffix(".errors.json"), key, partial(_sidenet_errors, path, report, search)))


def _sidenet_errors(path: Path, report: Measured, search: Measured) -> Row:
    sidenet, card = load_sidenet(path)
    sampler = sidenet_sampler(sidenet)
    errors = {}
    for calls in CALLS:
        if calls in card.runs:
            errors[calls] = report.errors(dataclasses.replace(sampler, given=card.runs), calls, (1.0, 0.0))
        else:
            shape = search_grid(sampler, search.field(card.velocity), search.noise, search.reference, calls)
            best = best_times(sampler, search, calls, shape, card.velocity)
            errors[calls] = report.errors(best, calls, shape, card.velocity)
    return errors


def best_times(sampler: Sampler, search: Measured, calls: int, shape: GridShape, mode: str = "guided") -> Sampler:
    """A rival on the best grid found for it: from the family's best on, time by time, as ours is."""
    field = search.field(mode)

    def error(times: Tensor) -> float:
        return endpoint_errors(sampler.run(field, search.noise, times), search.reference).mean().item()

    times = coordinate_search(error, sampler.times(calls, shape))
    return dataclasses.replace(sampler, given={calls: times})


def rival_errors(chains: Path, report: Measured, search: Measured) -> dict[str, Row]:
    """Solvers without a SideNet, each on its best grid; the learned multistep solver is fitted on chains.

    All grids are of the family (shift, cosine); those that come near the best of them there are searched further.
    """
    backbone = report.backbone
    paths = draw_paths(backbone, lambda rows: backbone.field(rows, DEMO_CFG), SEARCH_SEED, 1, 64)
    multistep = learned_multistep((chains,), backbone, paths, DEMO_CFG, "guided")
    samplers = [*rivals(), *more_rivals(), *([multistep] if multistep else [])]
    grids = load_grids()
    errors: dict[str, Row] = {}
    for calls in progress(CALLS, "rivals"):
        shapes = {
            sampler.label: grids[sampler.name][calls]
            if sampler.name in grids
            else search_grid(sampler, search.field(), search.noise, search.reference, calls)
            for sampler in samplers
        }
        found = {sampler.label: search.pixels(sampler, calls, shapes[sampler.label]) for sampler in samplers}
        for sampler in samplers:
            best = sampler
            if sampler.calls_per_step == 1 and found[sampler.label] <= NEAR_BEST * min(found.values()):
                best = best_times(sampler, search, calls, shapes[sampler.label])
            errors.setdefault(sampler.label, {})[calls] = report.errors(best, calls, shapes[sampler.label])
    return errors


def table(title: str, rows: Mapping[str, Sequence[Mapping[int, float]]]) -> list[str]:
    """Lines of Markdown: mean over the seeds, and their standard deviation where there are several."""
    lines = [f"\n### {title}\n", "| | " + " | ".join(map(str, CALLS)) + " |", "|---" * (len(CALLS) + 1) + "|"]
    for name, runs in rows.items():
        cells = []
        for calls in CALLS:
            values = [run[calls] for run in runs]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def tables(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Lines of Markdown: the errors by every distance, and how many times ours the others' are."""
    lines: list[str] = []
    for place, distance in enumerate(DISTANCES):
        one = {name: [{calls: run[calls][place] for calls in CALLS} for run in runs] for name, runs in rows.items()}
        rivals_only = [runs[0] for name, runs in one.items() if name not in MADE]
        best = {calls: min(row[calls] for row in rivals_only) for calls in CALLS}
        against = {"best rival / ours": [best] * len(one[OURS]), "without network / ours": one[WITHOUT]}
        ratios = {
            name: [
                {calls: other[calls] / ours[calls] for calls in CALLS}
                for other, ours in zip(others, one[OURS], strict=True)
            ]
            for name, others in {**against, "published / ours": one[PUBLISHED]}.items()
        }
        lines += [*table(f"Distance of {distance}", one), *table(f"Ratios, {distance}", ratios)]
    return lines


def made_of_seed(settings: FigureSettings, seed: int, backbone: Backbone) -> tuple[dict[str, Path], dict[str, Any]]:
    """Record and train for one seed; the files by what they are, and what they cost."""
    job = recipe(settings, settings.out / f"seed{seed}.safetensors", seed)
    without = dataclasses.replace(job, out=settings.out / f"without{seed}.safetensors", steps=0)
    chains = settings.out / f"chains{seed}"
    record(job, job, chains, backbone)
    cards = {name: trained(each, chains, backbone) for name, each in ((OURS, job), (WITHOUT, without))}
    costs = {
        "guided calls": {name: spent(card) for name, card in cards.items()},
        "training seconds": cards[OURS].training["seconds"],
        "residual": cards[OURS].evaluation["residual_variance"]["kind"],
    }
    theirs = published(settings, seed, backbone)
    costs["guided calls"][PUBLISHED] = spent(load_sidenet(theirs)[1])
    return {OURS: job.out, WITHOUT: without.out, PUBLISHED: theirs}, costs


def run_figures(settings: FigureSettings) -> dict[str, Any]:
    """Train and measure everything; write it as JSON and Markdown."""
    first = recipe(settings, settings.out / "seed1.safetensors", settings.seeds[0])
    backbone = open_backbone(first)
    made, costs = zip(*(made_of_seed(settings, seed, backbone) for seed in settings.seeds), strict=True)
    chains = settings.out / f"chains{settings.seeds[0]}"
    levers: dict[str, Path] = {}
    for name, changes in LEVERS.items() if settings.levers else ():
        job = recipe(settings, settings.out / f"{name.replace(' ', '_')}.safetensors", settings.seeds[0], **changes)
        trained(job, chains, backbone)
        levers[name] = job.out
    with torch.inference_mode():
        report = Measured.draw(backbone, REPORT_SEED, settings.noises)
        search = Measured.draw(backbone, SEARCH_SEED, settings.search_noises)
        key = [settings.noises, settings.search_noises, first.chains, settings.seeds[0], load_grids(), DISTANCES]
        found = kept(settings.out / "rivals.json", key, partial(rival_errors, chains, report, search))
        errors = {name: [by_calls(row)] for name, row in found.items()}
        for kind in MADE:
            errors[kind] = [sidenet_errors(paths[kind], report, search) for paths in progress(made, kind)]
        parts = {name: sidenet_errors(path, report, search) for name, path in levers.items()}
    changed = {
        name: [{calls: row[calls][0] for calls in CALLS}] for name, row in {OURS: errors[OURS][0], **parts}.items()
    }
    lines = [
        *tables(errors),
        *(table("One part exchanged (first seed)", changed) if parts else []),
        f"\n```json\n{json.dumps(costs, indent=1)}\n```",
    ]
    result = {"errors": errors, "levers": parts, "costs": costs}
    write_report(settings.out / "training", result, "\n".join(lines))
    return result


if __name__ == "__main__":
    import tyro

    run_figures(tyro.cli(FigureSettings))
