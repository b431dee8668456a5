"""`ba-solver evaluate`: how far a SideNet's solver ends from the exact end, beside the best solvers without one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bas_core.checkpoint import SideNetCard, load_sidenet, save_sidenet
from ...bas_core.files import CheckpointError, write_text
from ...bas_core.guidance import Field
from ..backbones import Backbone, BackboneChoice, open_backbone
from ..backbones.base import samples_at_once
from ..progress import progress, say
from ..recording.replay import Replay, SideNetInParts
from ..recording.trajectories import open_trajectories
from ..schedules.fitting import FIT_TRAJECTORIES, Schedules
from ..schedules.solvers import UNIFORM, GridShape, Solver, endpoint_errors, search_grid, sidenet_solver
from ..settings import UsageError, check_positive, parse_nfe, plain, prepare_folder
from .learned_multistep import LearnedMultistep
from .reference import Paths, draw_paths
from .report import SHOWN, plot_errors, plot_images, summary, table, write_csv
from .rivals import Measurement, line_up, measure, rivals

# Noises of an evaluation, and of its grid search, are none that were recorded or trained on.
REPORT_SEED, SEARCH_SEED = 6_000_000, 7_000_000

Job = tuple[Solver, int, str, GridShape]
Samples = dict[tuple[str, int, str], Tensor]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a SideNet is evaluated.

    Attributes:
        nfe: numbers of model calls, separated by commas.
        noises: from which every solver samples.
        noise_batch: noises sampled at once; 0 = 4, or 1 of videos.
        search_noises: on which every rival's best time grid is searched; 0 = uniform grids.
        reference: points of the reference solution.
    """

    nfe: str = "5,7,10"
    noises: int = 32
    noise_batch: int = 0
    search_noises: int = 8
    reference: int = 192


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(BackboneChoice, Evaluation):
    """Measure a SideNet beside solvers without one: table, JSON, CSV, plots, images; the table goes into its file.

    Attributes:
        sidenet: its file.
        out: folder for the report.
        recordings: folders of trajectories to fit the learned multistep solver on; left out, it gets its own.
        guidance: CFG scale; left out, the one that the SideNet was trained for (the middle of a range).
        seed: of the noises.
    """

    sidenet: Path
    out: Path
    recordings: tuple[Path, ...] = ()
    guidance: tuple[float, ...] = ()
    seed: int = 1


def check_evaluation(evaluation: Evaluation) -> list[int]:
    """The NFE to measure at.

    Raises:
        UsageError: a setting cannot be used; the message says which and why.
    """
    numbers = parse_nfe(evaluation.nfe)
    check_positive(evaluation, "noises")
    if evaluation.reference < 4 * max(numbers) or min(evaluation.search_noises, evaluation.noise_batch) < 0:
        raise UsageError(
            f"--reference must be at least four times the most model calls, {4 * max(numbers)}, and --search-noises "
            "and --noise-batch not negative."
        )
    return numbers


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


def learned_multistep(
    recordings: tuple[Path, ...], backbone: Backbone, search: Paths | None, guidance: float, mode: str
) -> Solver | None:
    """The learned multistep solver, fitted on recorded trajectories or else on the search noises; None without either.

    Raises:
        CheckpointError: the trajectories are of another model.
    """
    if recordings:
        trajectories, metadata = open_trajectories(recordings)
        if metadata["backbone"]["fingerprint"] != backbone.fingerprint:
            raise CheckpointError(
                f"--recordings are of {metadata['backbone']['name']!r}; {backbone.name!r} is evaluated. Give its own, "
                "or none."
            )
        rows = torch.arange(0, len(trajectories), trajectories.branches)
        scales = torch.ones(len(rows)) if trajectories.scales is None else trajectories.scales[rows]
        # Over a range, those nearest to the scale that is evaluated.
        rows = rows[scales == scales[(scales - guidance).abs().argmin()]][:FIT_TRAJECTORIES]
        replay = Replay(backbone, trajectories, {**metadata, "cfg_mode": mode})
        fitted = LearnedMultistep(replay.field_of(rows), replay.noise(rows), lambda t: replay.truth(rows, t))
    elif search is not None:
        fitted = LearnedMultistep(search.field, search.noise, search.truth)
    else:
        return None
    return Solver("learned_multistep", "learned multistep", fitted, start=backbone.start)


def competitors(backbone: Backbone, multistep: Solver | None) -> list[Solver]:
    """Every solver of the table but ours."""
    return [*rivals(backbone.start), *([multistep] if multistep else [])]


Shapes = dict[tuple[str, int], GridShape]


def search_shapes(jobs: Sequence[tuple[Solver, int]], search: Paths) -> Shapes:
    """Solvers' best grids of the family, by their name and NFE."""
    return {
        (solver.name, n): search_grid(solver, search.field, search.noise, search.ends, n)
        for solver, n in progress(jobs, "grid search")
    }


def jobs_for(
    others: Sequence[Solver], ours: Solver, numbers: Sequence[int], schedules: Schedules, shapes: Shapes
) -> list[Job]:
    """All measurements: every solver on its uniform and best grid, ours on the file's schedules."""
    jobs: list[Job] = []
    for solver, n, grid in line_up([*others, ours], numbers):
        if grid == "uniform":
            jobs.append((solver, n, grid, UNIFORM))
        elif (solver.name, n) in shapes:
            jobs.append((solver, n, grid, shapes[solver.name, n]))
        elif solver is ours and n in schedules:
            jobs.append((dataclasses.replace(ours, schedules=schedules), n, grid, UNIFORM))
    return jobs


def measure_all(jobs: Sequence[Job], paths: Sequence[Paths]) -> tuple[list[Measurement], Samples]:
    """Measure every job on every batch of noises.

    Returns:
        The lines of the table, and the first samples of each job.
    """
    rows: list[Measurement] = []
    samples: Samples = {}
    for solver, n, grid, shape in progress(jobs, "measure"):
        parts = [measure(solver, p.field, p.noise, p.ends, n, shape, grid) for p in paths]
        errors = torch.cat([endpoint_errors(x, p.ends).cpu() for (_, x), p in zip(parts, paths, strict=True)])
        spread = (errors.std() / len(errors) ** 0.5).item() if len(errors) > 1 else 0.0
        seconds = sum(row.seconds * len(p.noise) for (row, _), p in zip(parts, paths, strict=True)) / len(errors)
        rows.append(dataclasses.replace(parts[0][0], error=errors.mean().item(), spread=spread, seconds=seconds))
        samples[solver.name, n, grid] = parts[0][1][:SHOWN].cpu()
    return rows, samples


def to_images(backbone: Backbone, x: Tensor) -> Tensor:
    """States [B, C, *spatial] to images [B, 3, H, W] in [0, 1]; without a decoder, the first three channels."""
    if backbone.decode is not None:  # one by one, for decoding takes more memory than drawing
        return torch.cat([backbone.decode(each.to(backbone.device)).float().cpu() for each in x.split(1)])
    frames = x[:, :, 0] if x.ndim == 5 else x
    shown = frames[:, :3] if frames.shape[1] >= 3 else frames[:, :1].expand(-1, 3, -1, -1)
    low, high = shown.amin(), shown.amax()
    return (shown - low) / (high - low).clamp_min(1e-6)


def draw_references(
    evaluation: Evaluation, backbone: Backbone, field_of: Callable[[Tensor], Field], seed: int
) -> tuple[list[Paths], Paths | None]:
    """Reference solutions from the report's noises, in batches, and from those of the grid search if there is one."""
    say("Reference solutions …")
    batches = torch.arange(evaluation.noises).split(samples_at_once(evaluation.noise_batch, backbone.shape))
    paths = [
        draw_paths(backbone, field_of, REPORT_SEED + 1000 * seed + i, len(rows), evaluation.reference, False)
        for i, rows in enumerate(batches)
    ]
    if not evaluation.search_noises:
        return paths, None
    search_seed = SEARCH_SEED + 1000 * seed
    return paths, draw_paths(backbone, field_of, search_seed, evaluation.search_noises, evaluation.reference)


def evaluate(
    evaluation: Evaluation, choice: BackboneChoice, backbone: Backbone, path: Path, out: Path, more: dict[str, Any]
) -> list[Measurement]:
    """Measure a SideNet and write the report; its file gets the table.

    Args:
        evaluation, choice: settings.
        backbone: the model.
        path: the SideNet's file.
        out: folder of the report.
        more: `recordings` for the learned multistep solver, `seed`, and the `settings` to be stored.
    """
    numbers = check_evaluation(evaluation)
    prepare_folder(out)
    sidenet, card = load_sidenet(path, backbone.device, torch.float32)
    card.check_whole_path(path.name)
    scale = guidance_for(choice, card, backbone)
    schedules = card.schedules_for(scale)
    interval = tuple(card.training.get("recorded", {}).get("guidance_interval", choice.guidance_interval))

    batch = samples_at_once(evaluation.noise_batch, backbone.shape)

    def field_of(conditions: Tensor) -> Field:
        return backbone.field_in_main_memory(conditions, scale, batch, interval, card.cfg_mode)

    with torch.inference_mode():
        paths, search = draw_references(evaluation, backbone, field_of, more["seed"])
        multistep = learned_multistep(more["recordings"], backbone, search, scale, card.cfg_mode)
        others, shapes = competitors(backbone, multistep), {}
        if search:
            shapes = search_shapes([(solver, n) for n in numbers for solver in others], search)
        ours = sidenet_solver(SideNetInParts(sidenet, backbone.device, batch), start=backbone.start)
        rows, samples = measure_all(jobs_for(others, ours, numbers, schedules, shapes), paths)
    searched = search.field.calls if search else 0
    found = {
        "guidance": scale,
        "noises": evaluation.noises,
        "reference_error": max(p.error for p in paths),
        "endpoint_error": [dataclasses.asdict(row) for row in rows],
        "batched_backbone_calls": {"measure": sum(p.field.calls for p in paths), "search": searched},
    }
    card = dataclasses.replace(card, evaluation={**card.evaluation, **found})
    save_sidenet(path, load_sidenet(path)[0], card)
    write_report(out, rows, {"settings": more["settings"], "sidenet": str(path), **found})
    draw_images(out / "images.png", rows, numbers, samples, paths[0].ends[:SHOWN], backbone)
    say(f"Written: {out} (results.json, results.csv, errors.png, images.png); the table is in {path} too.")
    return rows


def write_report(out: Path, rows: list[Measurement], found: dict[str, Any]) -> None:
    """Table, JSON, CSV and plot."""
    say(table(rows))
    say(summary(rows))
    say(f"The reference's own error is at most {found['reference_error']:.2g}.")
    write_text(out / "results.json", json.dumps(found, indent=1))
    write_csv(out / "results.csv", rows)
    plot_errors(out / "errors.png", rows, f"Distance from the converged end point, guidance {found['guidance']:g}")


def draw_images(
    path: Path, rows: list[Measurement], numbers: list[int], samples: Samples, ends: Tensor, backbone: Backbone
) -> None:
    """The first samples of every solver at its best grid, decoded, on one page."""
    best = {(row.solver, row.nfe): row.grid for row in rows}
    drawn = {(solver, n, grid) for (solver, n), grid in best.items()}
    with torch.inference_mode():
        images = {key: to_images(backbone, x) for key, x in samples.items() if key in drawn}
        references = {"converged": to_images(backbone, ends), "Euler, 100 calls": images["euler", 100, "uniform"]}
    plot_images(path, rows, numbers, images, references)


def run_evaluate(settings: EvaluateSettings) -> list[Measurement]:
    """Do the work of `ba-solver evaluate`."""
    check_evaluation(settings)
    more = {"recordings": settings.recordings, "seed": settings.seed, "settings": plain(settings)}
    return evaluate(settings, settings, open_backbone(settings), settings.sidenet, settings.out, more)
