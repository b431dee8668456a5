"""A comparison as a table, as CSV, as curves and as a grid of pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
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


def best_rows(comparisons: Sequence[Comparison]) -> list[tuple[Row, float]]:
    """Each sampler with its best scheduler for each number of model calls, ordered by that number and by error.

    A row holds the means over all prompts and the first prompt's end; beside it is the standard deviation of the error.
    """
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for comparison in comparisons:
        for row in comparison.rows:
            groups.setdefault((row.asked, row.sampler, row.scheduler), []).append(row)
    best: dict[tuple[int, str], tuple[Row, float]] = {}
    for (asked, sampler, _), rows in groups.items():
        calls, error, seconds = np.mean([(row.calls, row.error, row.seconds) for row in rows], axis=0).tolist()
        mean = replace(rows[0], calls=calls, error=error, seconds=seconds)
        if (asked, sampler) not in best or error < best[asked, sampler][0].error:
            best[asked, sampler] = mean, float(np.std([row.error for row in rows]))
    return sorted(best.values(), key=lambda item: (item[0].asked, item[0].error))


def table(comparisons: Sequence[Comparison]) -> str:
    """The text of the node: the samplers for each number of model calls, the least error first."""
    own_error = np.mean([comparison.own_error for comparison in comparisons])
    parts = [
        "Distance from the converged picture of the same noise (lower is better), each sampler on its best scheduler.",
        f"The error of the converged picture itself is about {own_error:.2g}.",
    ]
    for asked, rows in groupby(best_rows(comparisons), lambda item: item[0].asked):
        parts.append(f"\n{asked} model calls")
        for row, deviation in rows:
            spread = f" ± {deviation:.2g}" if len(comparisons) > 1 else ""
            calls = "" if row.calls == asked else f", {row.calls:g} calls"
            parts.append(f"  {row.error:.4f}{spread}  {row.sampler} ({row.scheduler}{calls}), {row.seconds:.3g} s")
    return "\n".join(parts)


def curves(comparisons: Sequence[Comparison]) -> dict[str, dict[int, float]]:
    """Errors by sampler and number of model calls, for the plot."""
    by_sampler: dict[str, dict[int, float]] = {}
    for row, _ in best_rows(comparisons):
        by_sampler.setdefault(row.sampler, {})[row.asked] = max(row.error, 1e-12)
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


def picture_grid(comparisons: Sequence[Comparison], vae: Any) -> Tensor:
    """The first prompt's pictures, an IMAGE [1, H, W, 3].

    A row for each number of model calls: the converged picture, then the samplers in the order of the table.
    """
    converged = _picture(vae, comparisons[0].reference)
    lines = []
    for _, rows in groupby(best_rows(comparisons), lambda item: item[0].asked):
        lines.append(torch.cat([converged, *(_picture(vae, row.end) for row, _ in rows)], dim=3))
    width = max(line.shape[3] for line in lines)
    lines = [F.pad(line, (0, width - line.shape[3]), value=1.0) for line in lines]
    return torch.cat(lines, dim=2).movedim(1, -1)


def _picture(vae: Any, latent: Tensor) -> Tensor:
    """The first picture of a batch, of a video the first frame: [1, 3, SIDE, W]."""
    pixels = vae.decode(latent[:1])
    picture = pixels.reshape(-1, *pixels.shape[-3:])[:1].movedim(-1, 1).float().cpu()
    height, width = picture.shape[2:]
    mode = "nearest" if height < SIDE else "area"
    return F.interpolate(picture, (SIDE, max(1, round(SIDE * width / height))), mode=mode)
