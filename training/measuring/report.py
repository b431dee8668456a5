"""Reports of a comparison: a table, CSV, a plot of errors and a page of images."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from ...bas_core.files import write_atomically
from .rivals import Measurement

SHOWN = 5
LONG = 100


def table(rows: Sequence[Measurement]) -> str:
    """The measurements as aligned text."""
    lines = [f"{'solver':<18} {'grid':<8} {'NFE':>4}  {'endpoint error':>14}  {'s/image':>8}"]
    previous = 0
    for row in rows:
        if row.nfe != previous:
            lines.append("-" * len(lines[0]))
            previous = row.nfe
        lines.append(f"{row.label:<18} {row.grid:<8} {row.nfe:>4}  {row.error:>14.4f}  {row.seconds:>8.3f}")
    return "\n".join(lines)


def summary(rows: Sequence[Measurement]) -> str:
    """One sentence on what the table shows."""
    long = next(row for row in rows if row.solver == "euler" and row.nfe == LONG)
    ours = [row for row in rows if row.solver == "ba_solver" and row.error <= long.error]
    if not ours:
        return f"Euler with 100 calls ends at {long.error:.4f}; BA-solver does not reach that with these calls."
    best = min(ours, key=lambda row: row.nfe)
    return f"BA-solver with {best.nfe} calls ({best.error:.4f}) does the work of Euler with 100 ({long.error:.4f})."


def write_csv(path: Path, rows: Sequence[Measurement]) -> None:
    """The measurements as CSV."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    write_atomically(path, write)


def plot_errors(path: Path, rows: Sequence[Measurement], title: str) -> None:
    """Endpoint error over NFE, log scale, one panel for uniform grids and one for each solver's best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    euler_long = next(row.error for row in rows if row.nfe == LONG)
    for panel, grid, heading in zip(panels, ("uniform", "best"), ("uniform grid", "best grid of each"), strict=True):
        for name in dict.fromkeys(row.solver for row in rows):
            line = [row for row in rows if row.solver == name and row.grid == grid and row.nfe < LONG]
            if not line:
                continue
            ours = name == "ba_solver"
            panel.errorbar(
                [row.nfe for row in line],
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
        panel.set(yscale="log", title=heading, xlabel="model calls (NFE)")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("endpoint error (RMSE)")
    panels[1].legend(fontsize=8)
    figure.suptitle(title)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def plot_images(
    path: Path,
    rows: Sequence[Measurement],
    calls: Sequence[int],
    images: dict[tuple[str, int, str], Tensor],
    references: dict[str, Tensor],
) -> None:
    """The first samples side by side: a row a solver (at its best grid), a block a number of calls.

    Args:
        path: of the PNG.
        rows: the measurements that the images belong to.
        calls: the blocks.
        images: [B, 3, H, W] in [0, 1] by solver, calls and grid.
        references: more rows, by their labels, the same in every block.
    """
    from matplotlib.figure import Figure

    best = {(row.solver, row.nfe): row for row in rows}  # the last of a solver's grids is its best
    solvers = {row.solver: row.label for row in reversed(rows) if row.nfe in calls}
    lines = [*references, *solvers]
    figure = Figure(figsize=(1.3 + 2.6 * len(calls), 0.62 * len(lines) + 0.5), layout="constrained")
    panels = figure.subplots(len(lines), len(calls), squeeze=False)
    for i, name in enumerate(lines):
        for j, n in enumerate(calls):
            row = best.get((name, n))
            shown = images[name, n, row.grid] if row else references.get(name)
            panel = panels[i, j]
            panel.set(xticks=[], yticks=[])
            if shown is not None:
                panel.imshow(shown[:SHOWN].permute(2, 0, 3, 1).flatten(1, 2).float().numpy(), interpolation="nearest")
            if i == 0:
                panel.set_title(f"{n} calls", fontsize=10)
            if j == 0:
                panel.set_ylabel(solvers.get(name, name), rotation=0, ha="right", va="center", fontsize=9)
            if row:
                panel.set_xlabel(f"error {row.error:.3f}", fontsize=7, labelpad=1)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
