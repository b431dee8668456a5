"""SideNets for the demo backbone by the trainer's own recipe: its figures over several seeds, and what each part gives.

    python -m ba_solver.lab.sidenet --out runs/demo_sidenet             # about an hour and a half, two cores
    python -m ba_solver.lab.sidenet --out runs/demo_sidenet --levers    # half an hour more

For every seed it records chains, trains a SideNet on them, and trains another by the published objective with twice the
backbone calls. All of them, the solvers without a SideNet on their best grids and the learned multistep solver are then
measured on noises that none of them has seen. What is finished is not done again when the same command goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bas_core.checkpoint import SideNetCard, load_sidenet
from ..bas_core.files import write_safetensors, write_text
from ..bas_core.guidance import Field
from ..training.backbones import Backbone, open_backbone
from ..training.demo.assets import DEMO_CFG, SIT_FILE, demo_noise, load_grids
from ..training.make import MakeSettings
from ..training.measuring.reference import draw_paths
from ..training.measuring.rivals import converged_reference, more_rivals, rivals
from ..training.measuring.score import learned_multistep
from ..training.network.published import CHAIN_STEPS
from ..training.progress import progress, say
from ..training.recording.record import record
from ..training.runs.samplers import GridShape, Sampler, endpoint_errors, search_grid, sidenet_sampler
from ..training.runs.search import coordinate_search
from ..training.train import train_from
from .kept import kept
from .shapes import draw_shapes

CALLS = (5, 7, 10)
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
        chains, starts: recorded runs, and starts of more.
        grid_runs: recorded runs on which the family of grids is searched.
        tune: steps that tune times and weights for each number of calls.
        noises: held-out noises of the report.
        search_noises: on which the grids of what has no learned grids are searched.
        levers: also train the variants in `LEVERS`, from the first seed's chains.
    """

    out: Path = Path("runs/demo_sidenet")
    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int = 2200
    chains: int = 256
    starts: int = 1024
    grid_runs: int = 12
    tune: int = 480
    noises: int = 96
    search_noises: int = 20
    levers: bool = False


def recipe(settings: FigureSettings, out: Path, seed: int, **changes: Any) -> MakeSettings:
    """What `ba-solver make` is told: defaults, but for the SideNet's size, under a tenth of the demo backbone's."""
    usual: dict[str, Any] = {
        "steps": settings.steps,
        "chains": settings.chains,
        "starts": settings.starts,
        "patch_size": 4,
        "num_layers": 2,
        "embedding_dim": 48,
        "grid_nfe": ",".join(map(str, CALLS)),
        "grid_runs": settings.grid_runs,
        "tune": settings.tune,
        "resume": True,
    }
    return MakeSettings(backbone=f"sit:{SIT_FILE}", guidance=(DEMO_CFG,), out=out, seed=seed, **{**usual, **changes})


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
        chains=32,
        starts=0,
        grid_nfe="",
        tune=0,
    )
    if not job.out.exists():
        record(job, dataclasses.replace(job, seed=1), few, backbone)  # to validate on
    trained(job, few, backbone)
    return job.out


# --- measuring ------------------------------------------------------------------------------------------------------


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

    def error(self, sampler: Sampler, calls: int, shape: tuple[float, float], mode: str = "guided") -> float:
        """Mean end-point error.

        Raises:
            RuntimeError: the sampler spent another number of calls than it was given.
        """
        field = self.field(mode)
        x = sampler.sample(field, self.noise, calls, shape)
        if field.cost != calls:
            raise RuntimeError(f"{sampler.label} was given {calls} calls and spent {field.cost:g}.")
        return endpoint_errors(x, self.reference).mean().item()


def sidenet_errors(path: Path, report: Measured, search: Measured) -> dict[int, float]:
    """A SideNet's end-point errors, on its learned grids or else on those searched for it here; kept beside it."""
    key = [hashlib.sha256(path.read_bytes()).hexdigest(), len(report.noise), len(search.noise)]
    found = kept(path.with_suffix(".errors.json"), key, partial(_sidenet_errors, path, report, search))
    return {int(calls): error for calls, error in found.items()}


def _sidenet_errors(path: Path, report: Measured, search: Measured) -> dict[int, float]:
    sidenet, card = load_sidenet(path)
    sampler = sidenet_sampler(sidenet)
    errors = {}
    for calls in CALLS:
        if calls in card.runs:
            errors[calls] = report.error(dataclasses.replace(sampler, given=card.runs), calls, (1.0, 0.0))
        else:
            shape = search_grid(sampler, search.field(card.velocity), search.noise, search.reference, calls)
            best = best_times(sampler, search, calls, shape, card.velocity)
            errors[calls] = report.error(best, calls, shape, card.velocity)
    return errors


def best_times(sampler: Sampler, search: Measured, calls: int, shape: GridShape, mode: str = "guided") -> Sampler:
    """A rival on the best grid found for it: from the family's best on, time by time, as ours is."""
    field = search.field(mode)

    def error(times: Tensor) -> float:
        return endpoint_errors(sampler.run(field, search.noise, times), search.reference).mean().item()

    times = coordinate_search(error, sampler.times(calls, shape))
    return dataclasses.replace(sampler, given={calls: times})


def rival_errors(chains: Path, report: Measured, search: Measured) -> dict[str, dict[int, float]]:
    """Solvers without a SideNet, each on its best grid; the learned multistep solver is fitted on chains.

    All grids are of the family (shift, cosine); those that come near the best of them there are searched further.
    """
    backbone = report.backbone
    paths = draw_paths(backbone, lambda rows: backbone.field(rows, DEMO_CFG), SEARCH_SEED, 1, 64)
    multistep = learned_multistep((chains,), backbone, paths, DEMO_CFG, "guided")
    samplers = [*rivals(), *more_rivals(), *([multistep] if multistep else [])]
    grids = load_grids()
    errors: dict[str, dict[int, float]] = {}
    for calls in progress(CALLS, "rivals"):
        shapes = {
            sampler.label: grids[sampler.name][calls]
            if sampler.name in grids
            else search_grid(sampler, search.field(), search.noise, search.reference, calls)
            for sampler in samplers
        }
        found = {sampler.label: search.error(sampler, calls, shapes[sampler.label]) for sampler in samplers}
        for sampler in samplers:
            best = sampler
            if sampler.calls_per_step == 1 and found[sampler.label] <= NEAR_BEST * min(found.values()):
                best = best_times(sampler, search, calls, shapes[sampler.label])
            errors.setdefault(sampler.label, {})[calls] = report.error(best, calls, shapes[sampler.label])
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


def run_figures(settings: FigureSettings) -> dict[str, Any]:
    """Train and measure everything; write it as JSON and Markdown."""
    first = recipe(settings, settings.out / "seed1.safetensors", settings.seeds[0])
    backbone = open_backbone(first)
    ours: list[Path] = []
    theirs: list[Path] = []
    costs: dict[str, Any] = {}
    for seed in settings.seeds:
        job = recipe(settings, settings.out / f"seed{seed}.safetensors", seed)
        chains = settings.out / f"chains{seed}"
        record(job, job, chains, backbone)
        card = trained(job, chains, backbone)
        ours.append(job.out)
        costs[f"seed {seed}"] = {
            "guided calls": spent(card),
            "training seconds": card.training["seconds"],
            "residual": card.evaluation["residual_variance"]["kind"],
        }
    for seed in settings.seeds:
        theirs.append(published(settings, seed, backbone))
        costs[f"seed {seed}"]["published, guided calls"] = spent(load_sidenet(theirs[-1])[1])
    chains = settings.out / f"chains{settings.seeds[0]}"
    levers: dict[str, Path] = {}
    for name, changes in LEVERS.items() if settings.levers else ():
        job = recipe(settings, settings.out / f"{name.replace(' ', '_')}.safetensors", settings.seeds[0], **changes)
        trained(job, chains, backbone)
        levers[name] = job.out
    with torch.inference_mode():
        report = Measured.draw(backbone, REPORT_SEED, settings.noises)
        search = Measured.draw(backbone, SEARCH_SEED, settings.search_noises)
        key = [settings.noises, settings.search_noises, settings.chains, settings.seeds[0], load_grids()]
        found = kept(settings.out / "rivals.json", key, partial(rival_errors, chains, report, search))
        without = {name: {int(calls): error for calls, error in row.items()} for name, row in found.items()}
        errors = {
            "ours": [sidenet_errors(path, report, search) for path in progress(ours, "ours")],
            "published objective, twice the calls": [
                sidenet_errors(path, report, search) for path in progress(theirs, "published")
            ],
        }
        parts = {name: [sidenet_errors(path, report, search)] for name, path in levers.items()}
    best = {calls: min(row[calls] for row in without.values()) for calls in CALLS}
    ratios = {
        name: [{calls: run[calls] / measure[calls] for calls in CALLS} for run, measure in pairs]
        for name, pairs in {
            "ours / best rival": [(run, best) for run in errors["ours"]],
            "ours / published objective": list(zip(*errors.values(), strict=True)),
        }.items()
    }
    lines = [
        *table("End-point error", {**{name: [row] for name, row in without.items()}, **errors}),
        *table("Ratios", ratios),
        *(table("One part exchanged (first seed)", {"as it is": errors["ours"][:1], **parts}) if parts else []),
        f"\n```json\n{json.dumps(costs, indent=1)}\n```",
    ]
    result = {"rivals": without, "errors": errors, "levers": parts, "ratios": ratios, "costs": costs}
    write_text(settings.out / "training.json", json.dumps(result, indent=1))
    write_text(settings.out / "training.md", "\n".join(lines) + "\n")
    say("\n".join(lines))
    return result


if __name__ == "__main__":
    import tyro

    run_figures(tyro.cli(FigureSettings))
