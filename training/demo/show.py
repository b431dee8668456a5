"""`ba-solver demo`: sample the shipped model with every solver, and show the table, the images and the errors."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from ...bas_core.checkpoint import write_atomically
from ..evaluate import (
    Measurement,
    Sampler,
    converged_reference,
    endpoint_errors,
    line_up,
    measure,
    rivals,
    sidenet_sampler,
)
from ..progress import progress
from ..settings import UsageError, check_device, parse_calls, prepare_folder
from .assets import DEMO_CFG, demo_noise, load_demo

IMAGES = 20
SHOWN = 5
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
    calls = parse_calls(settings.nfe)
    if not 0 <= settings.cfg <= 20:
        raise UsageError(f"--cfg must lie between 0 and 20; got {settings.cfg}.")
    device = check_device(settings.device)
    prepare_folder(settings.out)
    demo = load_demo(device)
    if settings.cfg != DEMO_CFG:
        print(f"Note: the demo SideNet was trained at CFG {DEMO_CFG:g}; at {settings.cfg:g} it is less accurate.")

    noise, labels = (part.to(device) for part in demo_noise(SEED_OFFSET + settings.seed, IMAGES))
    field = demo.field(labels, settings.cfg)
    samplers = [*rivals(), sidenet_sampler(demo.sidenet)]
    jobs = line_up(samplers, calls)

    rows: list[Measurement] = []
    images: dict[tuple[str, int, str], Tensor] = {}
    with torch.inference_mode(), progress(jobs, "sampling", leave=False) as bar:
        bar.set_description("converged reference")
        reference = converged_reference(field, noise)
        for sampler, n, grid in bar:
            bar.set_description(f"{sampler.label}, {n} calls")
            row, samples = measure(sampler, field, noise, reference, n, demo.grid(sampler.name, n, grid), grid)
            rows.append(row)
            images[sampler.name, n, grid] = samples.cpu()

    print(table(rows))
    write_csv(settings.out / "results.csv", rows)
    plot_errors(settings.out / "errors.png", rows, settings.cfg)
    plot_images(settings.out / "images.png", samplers, calls, images, reference.cpu())
    print(summary(rows))
    print(f"Written to {settings.out}: images.png, errors.png, results.csv")
    return rows


def table(rows: Sequence[Measurement]) -> str:
    """The measurements as aligned text."""
    lines = [f"{'solver':<18} {'grid':<8} {'NFE':>4}  {'endpoint error':>14}  {'s/image':>8}"]
    previous = 0
    for row in rows:
        if row.calls != previous:
            lines.append("-" * len(lines[0]))
            previous = row.calls
        lines.append(f"{row.label:<18} {row.grid:<8} {row.calls:>4}  {row.error:>14.4f}  {row.seconds:>8.3f}")
    return "\n".join(lines)


def summary(rows: Sequence[Measurement]) -> str:
    """One sentence on what the table shows."""
    long = next(row for row in rows if row.sampler == "euler" and row.calls == 100)
    ours = [row for row in rows if row.sampler == "ba_solver" and row.error <= long.error]
    if not ours:
        return f"Euler with 100 calls ends at {long.error:.4f}; BA-solver does not reach that with these calls."
    best = min(ours, key=lambda row: row.calls)
    return f"BA-solver with {best.calls} calls ({best.error:.4f}) does the work of Euler with 100 ({long.error:.4f})."


def write_csv(path: Path, rows: Sequence[Measurement]) -> None:
    """The measurements as CSV."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    write_atomically(path, write)


def plot_errors(path: Path, rows: Sequence[Measurement], cfg: float) -> None:
    """Endpoint error over backbone calls, log scale, one panel a grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    euler_long = next(row.error for row in rows if row.calls == 100)
    for panel, grid, title in zip(panels, ("uniform", "best"), ("uniform grid", "best grid of each"), strict=True):
        for name in dict.fromkeys(row.sampler for row in rows):
            line = [row for row in rows if row.sampler == name and row.grid == grid and row.calls < 100]
            ours = name == "ba_solver"
            panel.errorbar(
                [row.calls for row in line],
                [row.error for row in line],
                [row.spread for row in line],
                label=line[0].label,
                marker="o",
                capsize=2,
                linewidth=3 if ours else 1.3,
                color="black" if ours else None,
                zorder=5 if ours else 2,
            )
        panel.axhline(euler_long, color="grey", linestyle=":", label="Euler, 100 calls")
        panel.set(yscale="log", title=title, xlabel="backbone calls (NFE)")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("endpoint error (RMSE)")
    panels[1].legend(fontsize=8)
    figure.suptitle(f"Distance from the converged end point, demo model, CFG {cfg:g}")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def plot_images(
    path: Path,
    samplers: Sequence[Sampler],
    calls: Sequence[int],
    images: dict[tuple[str, int, str], Tensor],
    reference: Tensor,
) -> None:
    """The first samples side by side: a row a solver (at its best grid), a block a number of calls."""
    from matplotlib.figure import Figure

    rows = [("converged", None), ("Euler, 100 calls", None), *((s.label, s.name) for s in reversed(samplers))]
    figure = Figure(figsize=(1.3 + 2.6 * len(calls), 0.62 * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(len(rows), len(calls), squeeze=False)
    for i, (label, name) in enumerate(rows):
        for j, n in enumerate(calls):
            if name is not None:
                shown = images[name, n, "best"]
            else:
                shown = reference if label == "converged" else images["euler", 100, "uniform"]
            strip = shown[:SHOWN].clamp(-1, 1).add(1).div(2).permute(2, 0, 3, 1).flatten(1, 2)
            panel = panels[i, j]
            panel.imshow(strip.numpy(), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            if i == 0:
                panel.set_title(f"{n} calls", fontsize=10)
            if j == 0:
                panel.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
            if name is not None:
                error = endpoint_errors(shown, reference).mean().item()
                panel.set_xlabel(f"error {error:.3f}", fontsize=7, labelpad=1)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
