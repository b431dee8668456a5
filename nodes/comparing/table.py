"""A comparison as a table, as CSV, as curves and as a grid of pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...bas_core.files import write_text
from .compare import Comparison, Row

COLUMNS = ("sampler", "scheduler", "asked", "calls", "error", "seconds", "prompt")
SIDE = 192  # height of a picture of the grid, pixels


@dataclass(frozen=True)
class Line:
    """A sampler's best scheduler for a number of model calls, over all prompts.

    Attributes:
        sampler, scheduler, asked: as in `Row`.
        calls: model calls that were made.
        error, spread: mean over the prompts, and its standard deviation.
        seconds: of one picture.
    """

    sampler: str
    scheduler: str
    asked: int
    calls: float
    error: float
    spread: float
    seconds: float


def best_lines(comparisons: Sequence[Comparison]) -> list[Line]:
    """The scheduler of least error for each sampler and number of calls; by calls, then by error."""
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for comparison in comparisons:
        for row in comparison.rows:
            groups.setdefault((row.asked, row.sampler, row.scheduler), []).append(row)
    lines = []
    for (asked, sampler, scheduler), rows in groups.items():
        calls, error, seconds = np.mean([(row.calls, row.error, row.seconds) for row in rows], axis=0).tolist()
        spread = float(np.std([row.error for row in rows]))
        lines.append(Line(sampler, scheduler, asked, calls, error, spread, seconds))
    best: dict[tuple[int, str], Line] = {}
    for line in sorted(lines, key=lambda line: line.error):
        best.setdefault((line.asked, line.sampler), line)
    return sorted(best.values(), key=lambda line: (line.asked, line.error))


def table(comparisons: Sequence[Comparison]) -> str:
    """The text of the node: the samplers for each number of model calls, the least error first."""
    lines = best_lines(comparisons)
    own_error = np.mean([comparison.own_error for comparison in comparisons])
    parts = [
        "Distance from the converged picture of the same noise (lower is better), each sampler on its best scheduler.",
        f"The error of the converged picture itself is about {own_error:.2g}.",
    ]
    for asked in sorted({line.asked for line in lines}):
        parts.append(f"\n{asked} model calls")
        for line in (line for line in lines if line.asked == asked):
            spread = f" ± {line.spread:.2g}" if len(comparisons) > 1 else ""
            calls = "" if line.calls == asked else f", {line.calls:g} calls"
            parts.append(f"  {line.error:.4f}{spread}  {line.sampler} ({line.scheduler}{calls}), {line.seconds:.3g} s")
    return "\n".join(parts)


def curves(comparisons: Sequence[Comparison]) -> dict[str, dict[int, float]]:
    """Errors by sampler and number of model calls, for the plot."""
    by_sampler: dict[str, dict[int, float]] = {}
    for line in best_lines(comparisons):
        by_sampler.setdefault(line.sampler, {})[line.asked] = max(line.error, 1e-12)
    return by_sampler


def write_csv(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Every sampling, one a line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for prompt, comparison in enumerate(comparisons):
        for r in comparison.rows:
            writer.writerow([r.sampler, r.scheduler, r.asked, r.calls, f"{r.error:.6g}", f"{r.seconds:.4g}", prompt])
    write_text(path, out.getvalue())


def picture_grid(comparison: Comparison, lines: Sequence[Line], vae: Any) -> Tensor:
    """Pictures of one prompt, an IMAGE [1, H, W, 3].

    A row for each number of model calls: the converged picture, then the samplers in the order of the table.
    """
    ends = {(row.asked, row.sampler, row.scheduler): row.end for row in comparison.rows}
    converged = _picture(vae, comparison.reference)
    rows = []
    for asked in sorted({line.asked for line in lines}):
        shown = [_picture(vae, ends[asked, x.sampler, x.scheduler]) for x in lines if x.asked == asked]
        rows.append(torch.cat([converged, *shown], dim=3))
    width = max(row.shape[3] for row in rows)
    rows = [F.pad(row, (0, width - row.shape[3]), value=1.0) for row in rows]
    return torch.cat(rows, dim=2).movedim(1, -1)


def _picture(vae: Any, latent: Tensor) -> Tensor:
    """The first picture of a batch, of a video the first frame: [1, 3, SIDE, W]."""
    pixels = vae.decode(latent[:1])
    picture = pixels.reshape(-1, *pixels.shape[-3:])[:1].movedim(-1, 1).float().cpu()
    height, width = picture.shape[2:]
    mode = "nearest" if height < SIDE else "area"
    return F.interpolate(picture, (SIDE, max(1, round(SIDE * width / height))), mode=mode)
