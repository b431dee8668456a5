"""`ba-solver demo`: sample the shipped model with every solver, and show the table, the images and the errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from ..measuring.report import SHOWN, plot_errors, plot_images, summary, table, write_csv
from ..measuring.rivals import Measurement, converged_reference, line_up, measure, rivals
from ..progress import progress
from ..schedules.solvers import sidenet_solver
from ..settings import UsageError, check_device, parse_nfe, prepare_folder
from .assets import DEMO_CFG, demo_noise, load_demo

IMAGES = 20
# Seeds of the demo lie beyond those of recording and of the grid search.
SEED_OFFSET = 5_000_000


@dataclass(frozen=True)
class DemoSettings:
    """Sample the shipped demo model with BA-solver and its rivals.

    Attributes:
        out: folder for the table (CSV) and the pictures (PNG).
        nfe: numbers of backbone calls, separated by commas.
        cfg: guidance scale; the shipped SideNet was trained at 2.
        seed: of the noise.
        device: cpu, cuda, cuda:1, mps …
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("ba_solver_demo")
    nfe: Annotated[str, tyro.conf.arg(metavar="N,N,…")] = "4,5,7,10"
    cfg: float = DEMO_CFG
    seed: int = 0
    device: str = "cpu"


def run_demo(settings: DemoSettings) -> list[Measurement]:
    """Do the work of `ba-solver demo`; returns the table.

    Raises:
        UsageError: a setting cannot be used.
    """
    calls = parse_nfe(settings.nfe)
    if not 0 <= settings.cfg <= 20:
        raise UsageError(f"--cfg must lie between 0 and 20; got {settings.cfg}.")
    device = check_device(settings.device)
    prepare_folder(settings.out)
    demo = load_demo(device)
    if settings.cfg != DEMO_CFG:
        print(f"Note: the demo SideNet was trained at CFG {DEMO_CFG:g}; at {settings.cfg:g} it is less accurate.")

    noise, labels = (part.to(device) for part in demo_noise(SEED_OFFSET + settings.seed, IMAGES))
    field = demo.field(labels, settings.cfg)
    solvers = [*rivals(), sidenet_solver(demo.sidenet)]
    jobs = line_up(solvers, calls)

    rows: list[Measurement] = []
    images: dict[tuple[str, int, str], Tensor] = {}

    def shown(x: Tensor) -> Tensor:
        return (x[:SHOWN].cpu().clamp(-1, 1) + 1) / 2

    with torch.inference_mode(), progress(jobs, "sampling", leave=False) as bar:
        bar.set_description("converged reference")
        reference = converged_reference(field, noise)
        for solver, n, grid in bar:
            bar.set_description(f"{solver.label}, {n} calls")
            on_grid, shape = demo.on_grid(solver, n, grid)
            row, samples = measure(on_grid, field, noise, reference, n, shape, grid)
            rows.append(row)
            images[solver.name, n, grid] = shown(samples)

    print(table(rows))
    write_csv(settings.out / "results.csv", rows)
    title = f"Distance from the converged end point, demo model, CFG {settings.cfg:g}"
    plot_errors(settings.out / "errors.png", rows, title)
    references = {"converged": shown(reference), "Euler, 100 calls": images["euler", 100, "uniform"]}
    plot_images(settings.out / "images.png", rows, calls, images, references)
    print(summary(rows))
    print(f"Written to {settings.out}: images.png, errors.png, results.csv")
    return rows
