"""`ba-solver evaluate`: how far a SideNet's solver ends from the exact end, beside the best solvers without one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bas_core.checkpoint import SideNetCard, load_sidenet, save_sidenet
from ...bas_core.files import CheckpointError, write_text
from ...bas_core.guidance import Field
from ...bas_core.schedule import Schedule
from ...bas_core.sidenet import SideNet
from ..backbones import Backbone, BackboneChoice, open_backbone
from ..progress import progress, say
from ..recording.replay import Replay
from ..recording.trajectories import open_trajectories
from ..schedules.fitting import Fitting, fit_schedules
from ..schedules.solvers import UNIFORM, GridShape, Solver, endpoint_errors, search_grid, sidenet_solver
from ..schedules.time_search import search_times
from ..settings import UsageError, check_positive, parse_nfe, plain, prepare_folder
from .learned_multistep import LearnedMultistep
from .reference import Paths, draw_paths
from .report import SHOWN, plot_errors, plot_images, summary, table, write_csv
from .rivals import Measurement, line_up, measure, rivals

FIT_RUNS = 32

# Noises of an evaluation, and of its grid search, are none that were recorded or trained on.
REPORT_SEED, SEARCH_SEED = 6_000_000, 7_000_000


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a SideNet is evaluated.

    Attributes:
        nfe: numbers of backbone calls, separated by commas.
        noises: from which every solver samples.
        noise_batch: noises sampled at once.
        search_noises: on which every solver's best time grid is searched; 0 = uniform grids, and the SideNet's own.
        reference: points of the reference solution.
    """

    nfe: str = "5,7,10"
    noises: int = 32
    noise_batch: int = 16
    search_noises: int = 8
    reference: int = 192


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(BackboneChoice, Evaluation):
    """Measure a SideNet beside solvers without one: table, JSON, CSV, plots, images; the table goes into its file.

    Attributes:
        sidenet: its file.
        out: folder for the report.
        trajectories: folders of recorded runs, to fit the learned multistep solver on; left out, it gets runs of its
            own.
        guidance: CFG scale; left out, what the SideNet was trained for (the middle of a range).
        seed: of the noises.
    """

    sidenet: Path
    out: Path
    trajectories: tuple[Path, ...] = ()
    guidance: tuple[float, ...] = ()
    seed: int = 1


def learned_multistep(
    trajectories: tuple[Path, ...], backbone: Backbone, search: Paths | None, guidance: float, mode: str
) -> Solver | None:
    """The learned multistep solver, fitted on recorded trajectories, or else on the search noises; None without either.

    Raises:
        CheckpointError: the trajectories are of another model or guidance.
    """
    if not trajectories:
        if search is None:
            return None
        fitted = LearnedMultistep(search.field, search.noise, search.truth)
        return Solver("learned_multistep", "learned multistep", fitted, start=backbone.start)
    recorded, about = open_trajectories(trajectories)
    if about["backbone"]["fingerprint"] != backbone.fingerprint:
        raise CheckpointError(
            f"--trajectories were recorded from {about['backbone']['name']!r}; {backbone.name!r} is evaluated. "
            "Give its trajectories, or none."
        )
    runs = torch.arange(0, len(recorded), recorded.branches)
    # Over a range, those nearest to the scale that is evaluated.
    scales = torch.ones(len(recorded)) if recorded.scales is None else recorded.scales
    nearest = scales[runs][(scales[runs] - guidance).abs().argmin()]
    rows = runs[scales[runs] == nearest][:FIT_RUNS]
    replay = Replay(backbone, recorded, {**about, "cfg_mode": mode})
    fitted = LearnedMultistep(replay.field_of(rows), replay.noise(rows), lambda t: replay.truth(rows, t))
    return Solver("learned_multistep", "learned multistep", fitted, start=backbone.start)


def competitors(backbone: Backbone, multistep: Solver | None) -> list[Solver]:
    """Every solver of the table but ours."""
    others = rivals(backbone.start)
    if importlib.util.find_spec("diffusers") is None:
        say("UniPC is left out: it needs diffusers, which the extra brings: ba-solver[bench].")
        others = [solver for solver in others if solver.name != "unipc"]
    return [*others, *([multistep] if multistep else [])]


Shapes = dict[tuple[str, int], GridShape]


def search_shapes(jobs: Sequence[tuple[Solver, int]], search: Paths) -> Shapes:
    """Solvers' best grids of the family for numbers of calls."""
    return {
        (solver.name, n): search_grid(solver, search.field, search.noise, search.ends, n)
        for solver, n in progress(jobs, "grid search")
    }


def fitted_schedules(sidenet: SideNet, nfe: Sequence[int], search: Paths, start: float) -> dict[int, Schedule]:
    """Schedules for more NFE, found on the search noises."""
    fitting = Fitting(sidenet, search.field, search.noise, search.truth, start)
    return fit_schedules(search_times(fitting, nfe), fitting)


def jobs_for(
    others: Sequence[Solver], ours: Solver, calls: Sequence[int], schedules: dict[int, Schedule], shapes: Shapes
) -> list[tuple[Solver, int, str, GridShape]]:
    """What is measured: every solver on its uniform and best grid, ours on those in its file."""
    jobs: list[tuple[Solver, int, str, GridShape]] = []
    for solver, n, grid in line_up([*others, ours], calls):
        if grid == "uniform":
            jobs.append((solver, n, grid, UNIFORM))
        elif (solver.name, n) in shapes:
            jobs.append((solver, n, grid, shapes[solver.name, n]))
        elif solver is ours and n in schedules:
            jobs.append((dataclasses.replace(ours, given=schedules), n, grid, UNIFORM))
    return jobs


def measure_all(
    jobs: Sequence[tuple[Solver, int, str, GridShape]], paths: Sequence[Paths]
) -> tuple[list[Measurement], dict[tuple[str, int, str], Tensor]]:
    """Measure every job on every batch of noises; the first batch's samples are returned too."""
    rows: list[Measurement] = []
    images: dict[tuple[str, int, str], Tensor] = {}
    for solver, n, grid, shape in progress(jobs, "measure"):
        parts = [measure(solver, p.field, p.noise, p.ends, n, shape, grid) for p in paths]
        errors = torch.cat([endpoint_errors(x, p.ends).cpu() for (_, x), p in zip(parts, paths, strict=True)])
        spread = (errors.std() / len(errors) ** 0.5).item() if len(errors) > 1 else 0.0
        seconds = sum(row.seconds * len(p.noise) for (row, _), p in zip(parts, paths, strict=True)) / len(errors)
        rows.append(dataclasses.replace(parts[0][0], error=errors.mean().item(), spread=spread, seconds=seconds))
        images[solver.name, n, grid] = parts[0][1][:SHOWN].cpu()
    return rows, images


def guidance_for(choice: BackboneChoice, card: SideNetCard, backbone: Backbone) -> float:
    """The CFG scale to evaluate at.

    Raises:
        CheckpointError: the SideNet belongs to another model, or was not trained for this scale.
    """
    if card.backbone.get("fingerprint") not in (None, backbone.fingerprint):
        raise CheckpointError(
            f"The SideNet belongs to {card.backbone.get('name')!r}; {backbone.name!r} is asked for. Train one for it."
        )
    if not choice.guidance:
        return card.cfg
    scale = choice.scales[0]
    if len(choice.guidance) > 1 or not card.supports_cfg(scale):
        raise CheckpointError(
            f"The SideNet was made for guidance {card.describe_cfg()}; {choice.guidance} is asked for. Give one scale "
            "near that, or leave --guidance out."
        )
    return scale


def to_images(backbone: Backbone, x: Tensor) -> Tensor:
    """States [B, C, *spatial] to images [B, 3, H, W] in [0, 1]; without a decoder, the first three channels."""
    if backbone.decode is not None:
        return backbone.decode(x.to(backbone.device)).float().cpu()
    frames = x[:, :, 0] if x.ndim == 5 else x
    shown = frames[:, :3] if frames.shape[1] >= 3 else frames[:, :1].expand(-1, 3, -1, -1)
    low, high = shown.amin(), shown.amax()
    return (shown - low) / (high - low).clamp_min(1e-6)


def check_evaluation(scoring: Evaluation) -> list[int]:
    """The numbers of calls to measure at.

    Raises:
        UsageError: a setting cannot be used; the message says which and why.
    """
    calls = parse_nfe(scoring.nfe)
    check_positive(scoring, "noises", "noise_batch")
    if scoring.reference < 4 * max(calls) or scoring.search_noises < 0:
        raise UsageError(
            f"--reference must be at least four times the most calls, {4 * max(calls)}, and "
            "--search-noises not negative."
        )
    return calls


def draw_references(
    scoring: Evaluation, backbone: Backbone, field_of: Callable[[Tensor], Field], seed: int
) -> tuple[list[Paths], Paths | None]:
    """Reference solutions from the report's noises, in batches, and from those of the grid search if there is one."""
    say("Reference solutions …")
    batches = torch.arange(scoring.noises).split(scoring.noise_batch)
    paths = [
        draw_paths(backbone, field_of, REPORT_SEED + 1000 * seed + i, len(rows), scoring.reference)
        for i, rows in enumerate(batches)
    ]
    if not scoring.search_noises:
        return paths, None
    return paths, draw_paths(backbone, field_of, SEARCH_SEED + 1000 * seed, scoring.search_noises, scoring.reference)


def evaluate(
    scoring: Evaluation, choice: BackboneChoice, backbone: Backbone, path: Path, out: Path, more: dict[str, Any]
) -> list[Measurement]:
    """Measure a SideNet and write the report; its file gets the table.

    Args:
        scoring, choice: settings.
        backbone: the model.
        path: the SideNet's file.
        out: folder of the report.
        more: `trajectories` for the learned multistep solver, `seed`, and the `settings` to be stored.
    """
    calls = check_evaluation(scoring)
    prepare_folder(out)
    sidenet, card = load_sidenet(path, backbone.device, torch.float32)
    scale = guidance_for(choice, card, backbone)
    schedules = card.schedules_for(scale)
    recorded = card.training.get("recorded", {})
    interval = tuple(recorded.get("guidance_interval", choice.guidance_interval))

    def field_of(conditions: Tensor) -> Field:
        return backbone.field(conditions, scale, interval, card.cfg_mode)

    spent: Counter[str] = Counter()
    with torch.inference_mode():
        paths, search = draw_references(scoring, backbone, field_of, more["seed"])
        multistep = learned_multistep(more["trajectories"], backbone, search, scale, card.cfg_mode)
        others, shapes = competitors(backbone, multistep), {}
        if search:
            shapes = search_shapes([(solver, n) for n in calls for solver in others], search)
            unknown = [n for n in calls if n not in schedules]
            schedules = schedules | fitted_schedules(sidenet, unknown, search, backbone.start)
        ours = sidenet_solver(sidenet, start=backbone.start)
        rows, states = measure_all(jobs_for(others, ours, calls, schedules, shapes), paths)
        images = {key: to_images(backbone, x) for key, x in states.items()}
        ends = to_images(backbone, paths[0].ends[:SHOWN])
    for name, fields in (("measure", [p.field for p in paths]), ("search", [search.field] if search else [])):
        spent[name] = sum(field.calls for field in fields)
    found = {
        "guidance": scale,
        "noises": scoring.noises,
        "reference_error": max(p.error for p in paths),
        "endpoint_error": [dataclasses.asdict(row) for row in rows],
        "batched_backbone_calls": dict(spent),
    }
    write_report(out, rows, calls, images, ends, {"settings": more["settings"], "sidenet": str(path), **found})
    # Schedules that were missing are added to those of their own CFG scale.
    own = {scale: schedules} if scale == card.cfg and schedules else {}
    card = dataclasses.replace(card, schedules=card.schedules | own, evaluation={**card.evaluation, **found})
    save_sidenet(path, load_sidenet(path)[0], card)
    say(f"Written: {out} (results.json, results.csv, errors.png, images.png); the table is in {path} too.")
    return rows


def write_report(
    out: Path,
    rows: list[Measurement],
    calls: list[int],
    images: dict[tuple[str, int, str], Tensor],
    ends: Tensor,
    found: dict[str, Any],
) -> None:
    """Table, JSON, CSV, plot and images."""
    say(table(rows))
    say(summary(rows))
    say(f"The reference's own error is at most {found['reference_error']:.2g}.")
    write_text(out / "results.json", json.dumps(found, indent=1))
    write_csv(out / "results.csv", rows)
    plot_errors(out / "errors.png", rows, f"Distance from the converged end point, guidance {found['guidance']:g}")
    long = images["euler", 100, "uniform"]
    plot_images(out / "images.png", rows, calls, images, {"converged": ends, "Euler, 100 calls": long})


def run_evaluate(settings: EvaluateSettings) -> list[Measurement]:
    """Do the work of `ba-solver evaluate`."""
    parse_nfe(settings.nfe)
    more = {"trajectories": settings.trajectories, "seed": settings.seed, "settings": plain(settings)}
    return evaluate(settings, settings, open_backbone(settings), settings.sidenet, settings.out, more)
