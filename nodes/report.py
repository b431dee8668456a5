"""A SideNet's metadata as text, and errors as a plot."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..bas_core.checkpoint import SideNetCard
from ..bas_core.schedule import describe_schedules
from ..bas_core.sidenet import SideNetConfig

Curves = dict[str, dict[int, float]]

WIDTH, HEIGHT, FONT = 960, 540, 26  # capital letters are a thirtieth of the height
PLOT = (110, 50, 620, 450)  # left, top, right, bottom of the axes; the legend is on their right
COLOURS = ("#d1495b", "#00798c", "#b8860b", "#3d8b5f", "#2e4057", "#6c757d", "#9b5de5", "#d6249f")


def report(name: str, config: SideNetConfig, card: SideNetCard) -> str:
    """A few lines on the SideNet's model, its making and its errors."""
    model, kind = (card.backbone.get(key) or "not stated" for key in ("name", "kind"))
    making = {key.replace("_", " "): value for key, value in card.training.items() if not _nested(value)}
    lines = [
        f"SideNet: {name}",
        f"Made for: {model} (kind: {kind})",
        f"Latents: {config.in_channels} channels; classes: {config.num_classes or 'none'}",
        f"Predicts: {'each branch of CFG' if card.cfg_mode == 'per_branch' else 'the guided velocity'}, "
        f"CFG {card.describe_cfg()}; anchors: {config.anchors}",
        *([] if card.whole_path else [f"Part of the path: {card.describe_part()}"]),
        f"Schedules: {describe_schedules(card.own_schedules)}",
        *(f"Training {key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in making.items()),
    ]
    for solver, errors in error_curves(card.evaluation).items():
        values = ", ".join(f"{errors[calls]:.4g} at {calls} model calls" for calls in sorted(errors))
        lines.append(f"{solver} error: {values}")
    return "\n".join([*lines, f"License: {card.license or 'not stated'}"])


def _nested(value: Any) -> bool:
    return isinstance(value, dict) and not all(isinstance(part, int | float) for part in value.values())


def error_curves(evaluation: dict[str, Any]) -> Curves:
    """Endpoint errors by solver and number of model calls, each solver on its best grid.

    Reads the rows {label, grid, nfe, error} that the trainer writes; other entries are left out.
    """
    by_grid: dict[tuple[str, str], dict[int, float]] = {}
    rows = evaluation.get("endpoint_error", [])
    for row in rows if isinstance(rows, list) else []:
        match row:
            case {"label": str(label), "grid": str(grid), "nfe": int(calls), "error": float(error)}:
                if 1e-30 < error < 1e30 and 0 < calls < 1e6:
                    by_grid.setdefault((label, grid), {})[calls] = error
    curves: Curves = {}
    # The best grid has the most numbers of calls, and of those the least error on average.
    for (label, _), errors in sorted(by_grid.items(), key=lambda item: (-len(item[1]), sum(item[1].values()))):
        curves.setdefault(label, errors)
    return curves


def training_curves(history: list[dict[str, float]]) -> Curves:
    """Loss and validation score of a training by step, as far as they are above 0."""
    series = {"loss": "loss", "validation": "score"}
    curves = {
        label: {int(row["step"]): row[key] for row in history if row.get(key, 0) > 0} for label, key in series.items()
    }
    return {label: curve for label, curve in curves.items() if curve}


def error_plot(curves: Curves, across: str = "model calls", up: str = "error") -> Tensor:
    """Curves with a logarithmic ordinate, and numbers at equal distances: an IMAGE [1, HEIGHT, WIDTH, 3].

    Args:
        curves: by label, values above 0 by number.
        across, up: what the axes show.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(FONT)
    left, top, right, bottom = PLOT
    draw.rectangle(PLOT, outline="#888888")
    draw.text((16, 8), up if curves else "no errors in this file", fill="black")
    draw.text(((left + right) / 2, HEIGHT - 8), across, fill="black", anchor="mb")
    numbers = sorted({n for curve in curves.values() for n in curve})
    logs = [math.log10(value) for curve in curves.values() for value in curve.values()] or [0.0]
    low, high = math.floor(min(logs) * 4) / 4, math.ceil(max(logs) * 4) / 4 + 0.01

    def y(log: float) -> float:
        return bottom - (log - low) / (high - low) * (bottom - top)

    def x(number: int) -> float:
        return left + numbers.index(number) / max(1, len(numbers) - 1) * (right - left)

    for level in np.linspace(low, high, 5 if curves else 0):
        draw.line((left, y(level), right, y(level)), fill="#dddddd")
        draw.text((left - 8, y(level)), f"{10**level:.2g}", fill="black", anchor="rm")
    for number in numbers[:: -(-len(numbers) // 6) or 1]:
        draw.text((x(number), bottom + 6), str(number), fill="black", anchor="mt")
    for row, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[row % len(COLOURS)]
        points = [(x(number), y(math.log10(curve[number]))) for number in sorted(curve)]
        draw.line(points, fill=colour, width=4)
        for px, py in points:
            draw.ellipse((px - 5, py - 5, px + 5, py + 5), fill=colour)
        draw.text((right + 16, top + 36 * row), label[:22], fill=colour)
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]
