"""Solvers at their best time grids, on any backbone: how far each ends from the converged end of the sampling ODE.

    python -m ba_solver.lab.benchmark --backbone sit:weights/demo_sit.safetensors --guidance 2 \\
        --sidenet weights/demo_sidenet.safetensors --grids weights/demo_grids.json --out runs/demo
    python -m ba_solver.lab.benchmark --backbone python:ba_solver.lab.galaxies:hsc32 \\
        --sidenet hsc32_seed1.safetensors hsc32_seed2.safetensors --out runs/hsc32

Every solver without a SideNet gets the best of `GRIDS`, found for each number of model calls on noises of their own.
BA-solver has the schedules in its SideNet's file. All are also measured under one ordinary schedule. Several SideNets,
from recordings with several seeds, give a mean and a standard deviation.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bas_core.checkpoint import SideNetCard, load_sidenet
from ..bas_core.files import write_text
from ..bas_core.guidance import Field
from ..bas_core.sidenet import SideNet
from ..bas_core.solver import solve
from ..bas_core.strength import WeightedSideNet
from ..training.backbones import Backbone, BackboneChoice, open_backbone
from ..training.demo.assets import Grids, load_grids
from ..training.progress import progress, say
from ..training.schedules.solvers import GridShape, Solver, baseline_solver, endpoint_errors
from ..training.settings import UsageError, parse_nfe, prepare_folder
from .cost import cost

MULTISTEP = ("adams_bashforth2", "dpmpp_2m", "unipc", "predictor_corrector", "ipndm", "deis", "res_multistep")
RIVALS = (*MULTISTEP, "dpm_2", "euler", "heun")
# (shift, cosine) of `time_grid`; each rival gets the best.
GRIDS: tuple[GridShape, ...] = tuple(
    itertools.product((0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6), (-0.2, 0.0, 0.15, 0.3, 0.5))
)
REPORT_SEED, SEARCH_SEED = 8_000_000, 9_000_000
OURS, NO_NETWORK = "BA-solver", "BA-solver without its network"
BEST = "best schedule"


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(BackboneChoice):
    """Measure solvers on a model: JSON, CSV, and tables in Markdown.

    Attributes:
        out: folder for `benchmark.json`, `benchmark.csv`, `benchmark.md` and `grids.json`.
        sidenet: files of SideNets for this model, one for each seed; none to measure the other solvers alone.
        grids: file of the rivals' best grids, which is completed by a search; left out, `grids.json` in `out`.
        nfe: numbers of model calls, separated by commas.
        noises: from which every solver samples.
        search_noises: others, on which the best grids are found.
        batch: noises that are sampled at once.
        shift: of the ordinary schedule, `time_grid(n, shift)`.
        solvers: rivals to measure.
        cost: measure time and memory of the schedule of the middle number of model calls too.
    """

    out: Path
    sidenet: tuple[Path, ...] = ()
    grids: Path | None = None
    nfe: str = "5,7,10"
    noises: int = 96
    search_noises: int = 24
    batch: int = 96
    shift: float = 3.0
    solvers: tuple[str, ...] = RIVALS
    cost: bool = False

    @property
    def counts(self) -> list[int]:
        """Numbers of model calls."""
        return parse_nfe(self.nfe)

    @property
    def cfg(self) -> float:
        """The CFG scale."""
        return self.scales[0]

    @property
    def ordinary(self) -> str:
        """The ordinary schedule's name in tables."""
        return f"shift {self.shift:g}"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        solver: for people.
        sidenet: file name of the SideNet; empty for rivals.
        schedule: "best schedule" or the ordinary one.
        nfe: model calls; a conditional-only call counts one half.
        shift, cosine: of the time grid; 0 where the times are fitted.
        error: mean over the noises of the end's RMSE.
        standard_error: of that mean.
    """

    solver: str
    sidenet: str
    schedule: str
    nfe: int
    shift: float
    cosine: float
    error: float
    standard_error: float


@dataclass(frozen=True)
class Noises:
    """Noises, and where the sampling ODE leads from them.

    Attributes:
        backbone, cfg: the model, and its CFG scale.
        batches: (noise [B, C, *spatial], conditions [B], ends [B, C, *spatial]).
        reference_error: of the ends: how far a ten times larger tolerance moves the first batch's, RMSE.
    """

    backbone: Backbone
    cfg: float
    batches: list[tuple[Tensor, Tensor, Tensor]]
    reference_error: float

    @classmethod
    def draw(
        cls, settings: BenchmarkSettings, backbone: Backbone, seed: int, count: int, tolerance: float = 1e-5
    ) -> Noises:
        """Unit normal noise from a seed, the conditions in turn, and the converged ends."""
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn((count, *backbone.shape), generator=generator)
        noise = backbone.noise(gaussian).to(backbone.device)
        batches: list[tuple[Tensor, Tensor, Tensor]] = []
        error = 0.0
        for rows in progress(torch.arange(count).split(settings.batch), "converged ends"):
            conditions = rows % backbone.conditions
            field = backbone.field(conditions, settings.cfg)
            ends = converged_ends(field, noise[rows], backbone.start, tolerance)
            if not batches:
                rough = converged_ends(field, noise[rows], backbone.start, 10 * tolerance)
                error = endpoint_errors(rough, ends).mean().item()
            batches.append((noise[rows], conditions, ends))
        return cls(backbone, settings.cfg, batches, error)

    def errors(self, sampler: Solver, nfe: int, shape: GridShape, mode: Any = "combined") -> Tensor:
        """[noises] RMSE of the ends.

        Raises:
            RuntimeError: the sampler spends another number of model calls than `nfe`.
        """
        found = []
        for noise, conditions, ends in self.batches:
            field = self.backbone.field(conditions, self.cfg, cfg_mode=mode)
            found.append(endpoint_errors(sampler.sample(field, noise, nfe, shape), ends).cpu())
            if field.nfe != nfe:
                raise RuntimeError(f"{sampler.label} was given {nfe} model calls and spent {field.nfe:g}.")
        return torch.cat(found)


def converged_ends(field: Field, noise: Tensor, start: float, tolerance: float) -> Tensor:
    """Ends by adaptive Dormand-Prince 5 of `torchdiffeq`, relative and absolute tolerance alike."""
    from torchdiffeq import odeint

    times = torch.tensor([start, 0.0], device=noise.device)
    return odeint(lambda t, x: field.velocity(x, t), noise, times, rtol=tolerance, atol=tolerance, method="dopri5")[-1]


def rival(name: str, start: float) -> Solver:
    """A solver without a SideNet."""
    return baseline_solver(name, start)


def best_grids(settings: BenchmarkSettings, backbone: Backbone, rivals: Sequence[Solver]) -> Grids:
    """Every rival's best grid by number of model calls; those that the file lacks are searched and added to it.

    Raises:
        UsageError: the file's grids are of another model or CFG scale.
    """
    path = settings.grids or settings.out / "grids.json"
    owner = {"backbone": backbone.fingerprint, "cfg": settings.cfg}
    grids: Grids = {}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        if {name: content.get(name) for name in owner} != owner:
            raise UsageError(f"The grids in {path} are of another model or CFG scale; give another --grids or --out.")
        grids = load_grids(path)
    jobs = [(r, n) for r in rivals for n in settings.counts if n not in grids.get(r.name, {})]
    if not jobs:
        return grids
    search = Noises.draw(settings, backbone, SEARCH_SEED, settings.search_noises)
    for sampler, nfe in progress(jobs, "best grids"):
        shape = min(GRIDS, key=lambda shape: search.errors(sampler, nfe, shape).mean().item())
        grids.setdefault(sampler.name, {})[nfe] = shape
        write_text(path, json.dumps({**owner, "grids": grids}, indent=1))
    return grids


def ours(sidenet: SideNet, card: SideNetCard, backbone: Backbone, cfg: float) -> Iterator[tuple[str, Solver, Any]]:
    """(label, sampler, schedules) of BA-solver with and without its network; schedules None: over plain times.

    Without its network, the schedules keep their times, coefficients and analytic first step.
    """
    silent = WeightedSideNet(sidenet, lambda t: 0.0)
    for label, predictor, plain in ((OURS, sidenet, sidenet), (NO_NETWORK, silent, None)):
        for schedules, network in ((card.schedules_for(cfg), predictor), (None, plain)):

            def sample(field: Field, x: Tensor, over: Any, network: Any = network) -> Tensor:
                return solve(field, network, x, over)

            yield label, Solver("ba_solver", label, sample, start=backbone.start, schedules=schedules), schedules


def measure_rivals(settings: BenchmarkSettings, noises: Noises, rivals: Sequence[Solver], grids: Grids) -> list[Row]:
    """Every rival at its best grid and under the ordinary schedule."""
    rows = []
    for sampler, nfe in progress([(r, n) for r in rivals for n in settings.counts], "rivals"):
        for schedule, shape in ((BEST, grids[sampler.name][nfe]), (settings.ordinary, (settings.shift, 0.0))):
            errors = noises.errors(sampler, nfe, shape)
            rows.append(row_of(sampler.label, "", schedule, nfe, shape, errors))
    return rows


def measure_sidenet(settings: BenchmarkSettings, noises: Noises, path: Path) -> list[Row]:
    """BA-solver with one SideNet, with and without the network.

    Raises:
        UsageError: the SideNet belongs to another model.
    """
    backbone = noises.backbone
    sidenet, card = load_sidenet(path, backbone.device)
    if card.backbone.get("fingerprint") != backbone.fingerprint:
        raise UsageError(f"{path} belongs to {card.backbone.get('name')!r}; {backbone.name!r} is measured.")
    rows = []
    for label, sampler, schedules in ours(sidenet, card, backbone, settings.cfg):
        shape = (0.0, 0.0) if schedules is not None else (settings.shift, 0.0)
        schedule = settings.ordinary if schedules is None else BEST
        for nfe in settings.counts:
            if schedules is None or nfe in schedules:
                errors = noises.errors(sampler, nfe, shape, card.cfg_mode)
                rows.append(row_of(label, path.name, schedule, nfe, shape, errors))
    return rows


def row_of(label: str, sidenet: str, schedule: str, nfe: int, shape: GridShape, errors: Tensor) -> Row:
    """A measurement from the noises' errors [B]."""
    standard_error = errors.std().item() / len(errors) ** 0.5 if len(errors) > 1 else 0.0
    return Row(label, sidenet, schedule, nfe, *shape, errors.mean().item(), standard_error)


def markdown(rows: Sequence[Row], settings: BenchmarkSettings, reference_error: float) -> str:
    """One table for each schedule, the rivals in order of their errors."""
    lines = [
        f"{settings.backbone}, CFG {settings.cfg:g}, {settings.noises} noises; RMSE to the converged end, "
        f"which is itself {reference_error:.1g} off at most."
    ]
    for schedule in (BEST, settings.ordinary):
        shown = [row for row in rows if row.schedule == schedule]
        first = [label for label in (OURS, NO_NETWORK) if any(row.solver == label for row in shown)]
        totals = {row.solver: sum(r.error for r in shown if r.solver == row.solver) for row in shown}
        others = sorted(set(totals) - set(first), key=totals.__getitem__)
        lines += [f"\n### {schedule}\n", "| model calls | " + " | ".join(map(str, settings.counts)) + " |"]
        lines.append("|---" * (len(settings.counts) + 1) + "|")
        for label in [*first, *others]:
            errors = [[r.error for r in shown if (r.solver, r.nfe) == (label, nfe)] for nfe in settings.counts]
            cells = [spread(values, 4) for values in errors]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and standard deviation where there are several values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def measure_cost(settings: BenchmarkSettings, noises: Noises) -> dict[str, float]:
    """Time and memory with the first SideNet."""
    sidenet, card = load_sidenet(settings.sidenet[0], noises.backbone.device)
    noise, conditions, _ = noises.batches[0]
    field = noises.backbone.field(conditions, settings.cfg, cfg_mode=card.cfg_mode)
    nfe = settings.counts[len(settings.counts) // 2]
    return cost(field, sidenet, noise, card.schedules_for(settings.cfg)[nfe].scaled(noises.backbone.start))


def write_report(out: Path, rows: Sequence[Row], result: dict[str, Any], text: str) -> None:
    """JSON, CSV and Markdown."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(asdict(rows[0])))
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    write_text(out / "benchmark.csv", table.getvalue())
    write_text(out / "benchmark.json", json.dumps({**result, "rows": list(map(asdict, rows))}, indent=1))
    write_text(out / "benchmark.md", text)
    say(text)


def run_benchmark(settings: BenchmarkSettings) -> list[Row]:
    """Measure everything, and write it.

    Raises:
        UsageError: a setting cannot be used.
    """
    if not settings.sidenet and (settings.cost or not settings.solvers):
        raise UsageError("--cost, or no --solvers, needs a --sidenet.")
    unknown = set(settings.solvers) - set(RIVALS)
    if unknown:
        raise UsageError(f"--solvers must be of {', '.join(RIVALS)}; got {', '.join(sorted(unknown))}.")
    backbone = open_backbone(settings)
    settings.check_guidance(backbone)
    prepare_folder(settings.out)
    rivals = [rival(name, backbone.start) for name in settings.solvers]
    with torch.inference_mode():
        grids = best_grids(settings, backbone, rivals)
        noises = Noises.draw(settings, backbone, REPORT_SEED, settings.noises, 1e-6)
        rows = [row for path in settings.sidenet for row in measure_sidenet(settings, noises, path)]
        rows += measure_rivals(settings, noises, rivals, grids)
    text = markdown(rows, settings, noises.reference_error)
    result: dict[str, Any] = {
        "settings": {name: str(value) for name, value in asdict(settings).items()},
        "reference_error": noises.reference_error,
    }
    if settings.cost:
        result["cost"] = measure_cost(settings, noises)
        text += f"\n```json\n{json.dumps(result['cost'], indent=1)}\n```\n"
    write_report(settings.out, rows, result, text)
    return rows


if __name__ == "__main__":
    import tyro

    run_benchmark(tyro.cli(BenchmarkSettings))
