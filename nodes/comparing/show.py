"""A comparison as a table, as CSV, as a plot and as a sheet of pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...bas_core.files import write_text
from .compare import Comparison, Row

COLUMNS = ("sampler", "scheduler", "asked", "calls", "error", "seconds", "prompt")
SIDE, LABEL = 160, 34
BEST, WORST = "#2e9e5b", "#c0392b"


@dataclass(frozen=True)
class Line:
    """A sampler's best scheduler for a number of calls, over all prompts.

    Attributes:
        sampler, scheduler, asked: which.
        calls: model calls that were made.
        error, spread: mean over the prompts, and its standard deviation.
        seconds: a picture.
    """

    sampler: str
    scheduler: str
    asked: int
    calls: float
    error: float
    spread: float
    seconds: float


def best_lines(comparisons: Sequence[Comparison]) -> list[Line]:
    """Of every sampler and number of calls the scheduler of least error, the nearest first."""
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for found in comparisons:
        for row in found.rows:
            groups.setdefault((row.asked, row.sampler, row.scheduler), []).append(row)
    lines = [
        Line(
            sampler,
            scheduler,
            asked,
            float(np.mean([row.calls for row in rows])),
            float(np.mean([row.error for row in rows])),
            float(np.std([row.error for row in rows])),
            float(np.mean([row.seconds for row in rows])),
        )
        for (asked, sampler, scheduler), rows in groups.items()
    ]
    best: dict[tuple[int, str], Line] = {}
    for line in sorted(lines, key=lambda line: line.error):
        best.setdefault((line.asked, line.sampler), line)
    return sorted(best.values(), key=lambda line: (line.asked, line.error))


def table(comparisons: Sequence[Comparison]) -> str:
    """What the node writes: for every number of calls the samplers, the nearest first."""
    lines = best_lines(comparisons)
    own = np.mean([found.own_error for found in comparisons])
    parts = [
        "How far each ends from the converged picture of the same noise (lower is nearer), on its best scheduler.",
        f"The converged one's own error is about {own:.2g}.",
    ]
    for asked in sorted({line.asked for line in lines}):
        parts.append(f"\n{asked} model calls")
        for line in (line for line in lines if line.asked == asked):
            spread = f" ± {line.spread:.2g}" if len(comparisons) > 1 else ""
            made = "" if line.calls == asked else f", {line.calls:g} calls"
            parts.append(f"  {line.error:.4f}{spread}  {line.sampler} ({line.scheduler}{made}), {line.seconds:.3g} s")
    return "\n".join(parts)


def curves(comparisons: Sequence[Comparison]) -> dict[str, dict[int, float]]:
    """Errors by sampler and number of calls, for the plot."""
    found: dict[str, dict[int, float]] = {}
    for line in best_lines(comparisons):
        found.setdefault(line.sampler, {})[line.asked] = max(line.error, 1e-12)
    return found


def write_csv(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Every run, one a line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for prompt, found in enumerate(comparisons):
        for r in found.rows:
            writer.writerow([r.sampler, r.scheduler, r.asked, r.calls, f"{r.error:.6g}", f"{r.seconds:.4g}", prompt])
    write_text(path, out.getvalue())


def sheet(found: Comparison, lines: Sequence[Line], vae: Any) -> Tensor:
    """Pictures of one prompt, an IMAGE [1, H, W, 3]: a row a number of calls, the converged one first.

    The nearest is framed in green, the farthest in red. Without a VAE, a page that says so.
    """
    if vae is None:
        return _page(["Connect a VAE to see the pictures."])
    asked = sorted({line.asked for line in lines})
    width = 1 + max(len([line for line in lines if line.asked == calls]) for calls in asked)
    page = Image.new("RGB", (width * SIDE, len(asked) * (SIDE + LABEL)), "white")
    for number, calls in enumerate(asked):
        row = [line for line in lines if line.asked == calls]
        shown: list[tuple[str, str, Tensor, str | None]] = [("converged", "", found.reference, None)]
        for place, line in enumerate(row):
            wanted = (calls, line.sampler, line.scheduler)
            end = next(r.end for r in found.rows if (r.asked, r.sampler, r.scheduler) == wanted)
            frame = BEST if place == 0 else WORST if place == len(row) - 1 else None
            shown.append((line.sampler, f"{calls} calls, {line.error:.3g}", end, frame))
        for column, (name, note, latent, frame) in enumerate(shown):
            _place(page, (column * SIDE, number * (SIDE + LABEL)), _picture(vae, latent), name, note, frame)
    return _as_image(page)


def _picture(vae: Any, latent: Tensor) -> Image.Image:
    """The first picture of a batch, of a video the first frame."""
    pixels = vae.decode(latent[:1])
    pixels = pixels.reshape(-1, *pixels.shape[-3:])[0]
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def _place(
    page: Image.Image, corner: tuple[int, int], picture: Image.Image, name: str, note: str, frame: str | None
) -> None:
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    left, top = corner
    fitted = picture.resize((SIDE - 8, SIDE - 8), Image.Resampling.NEAREST if picture.width < SIDE else None)
    if frame:
        draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=frame)
    page.paste(fitted, (left + 4, top + 4))
    draw.text((left + 4, top + SIDE + 1), name[:26], fill="black", font=font)
    draw.text((left + 4, top + SIDE + 15), note, fill=frame or "black", font=font)


def _page(lines: Sequence[str]) -> Tensor:
    page = Image.new("RGB", (420, 40 + 20 * len(lines)), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(page).text((16, 16 + 20 * number), line, fill="black", font=ImageFont.load_default(14))
    return _as_image(page)


def _as_image(page: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(page).astype(np.float32) / 255)[None]
