"""A SideNet's card as text and as a plot."""

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

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 200, 30, 50
COLOURS = ("#d1495b", "#00798c", "#edae49", "#66a182", "#2e4057", "#8d96a3", "#9b5de5", "#f15bb5")


def report(name: str, config: SideNetConfig, card: SideNetCard) -> str:
    """A few lines on what the SideNet is for, how it was made, and how good it is."""
    trained = card.training
    lines = [
        f"SideNet: {name}",
        f"Made for: {card.backbone.get('name') or 'not stated'} (kind: {card.backbone.get('kind') or 'not stated'})",
        f"Latents: {config.in_channels} channels; classes: {config.num_classes or 'none'}",
        f"Predicts: {'each branch of CFG' if card.cfg_mode == 'branch' else 'the guided velocity'}, "
        f"CFG {card.describe_cfg()}; anchors: {config.anchors}",
        f"Fitted runs: {describe_schedules(card.schedules_for(card.cfg))}",
        *(f"Training {key.replace('_', ' ')}: {_short(trained[key])}" for key in trained if key != "settings"),
        *(f"{series} error: {_row(errors)}" for series, errors in error_curves(card.evaluation).items()),
        f"Licence: {card.license or 'not stated'}",
    ]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _row(errors: dict[int, float]) -> str:
    return ", ".join(f"{errors[calls]:.4g} at {calls} calls" for calls in sorted(errors))


def error_curves(evaluation: dict[str, Any]) -> Curves:
    """Endpoint errors by solver and number of calls, each on the grid where it is best.

    Reads the rows {label, grid, calls, error} that the trainer writes; what does not look like one is left out.
    """
    tables: dict[tuple[str, str], dict[int, float]] = {}
    rows = evaluation.get("endpoint_error", [])
    for row in rows if isinstance(rows, list) else []:
        match row:
            case {"label": str(label), "grid": str(grid), "calls": int(calls), "error": float(error)}:
                if 1e-30 < error < 1e30 and 0 < calls < 1e6:  # what the plot can show
                    tables.setdefault((label, grid), {})[calls] = error
    curves: Curves = {}
    # The grid with the most numbers of calls, and of those the one with the least error on average.
    for (label, _), errors in sorted(tables.items(), key=lambda item: (-len(item[1]), sum(item[1].values()))):
        curves.setdefault(label, errors)
    return curves


def training_curves(history: list[dict[str, float]]) -> Curves:
    """Loss and held-out residual variance of a training, by step."""
    names = {"loss": "loss", "score": "held out"}
    found: Curves = {label: {} for label in names.values()}
    for row in history:
        for name, label in names.items():
            if row.get(name, 0) > 0:
                found[label][int(row["step"])] = row[name]
    return {label: curve for label, curve in found.items() if curve}


def error_plot(curves: Curves, across: str = "backbone calls", up: str = "endpoint error") -> Tensor:
    """A plot of errors (logarithmic) over numbers of calls: an IMAGE [1, height, width, 3]."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    if curves:
        _draw_curves(draw, font, curves, (across, up))
    else:
        draw.text((LEFT, HEIGHT // 2), "This SideNet's file holds no error table.", fill="black", font=font)
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]


def _draw_curves(draw: Any, font: Any, curves: Curves, words: tuple[str, str]) -> None:
    calls = sorted({n for errors in curves.values() for n in errors})
    logs = [math.log10(e) for errors in curves.values() for e in errors.values()]
    bottom, top = math.floor(min(logs) * 4) / 4, math.ceil(max(logs) * 4) / 4 + 0.01

    def place(n: int, error: float) -> tuple[float, float]:
        across = (n - calls[0]) / max(1, calls[-1] - calls[0])
        up = (math.log10(error) - bottom) / (top - bottom)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    frame = (*place(calls[0], 10**top), *place(calls[-1], 10**bottom))
    draw.rectangle(frame, outline="#888888")
    for n in calls[:: -(-len(calls) // 12)]:
        draw.text((place(n, 10**bottom)[0] - 5, frame[3] + 6), str(n), fill="black", font=font)
    for level in np.linspace(bottom, top, 5):
        height = place(calls[0], 10**level)[1]
        draw.line((frame[0], height, frame[2], height), fill="#dddddd")
        draw.text((8, height - 8), f"{10**level:.3g}", fill="black", font=font)
    draw.text(((frame[0] + frame[2]) / 2 - 60, HEIGHT - 24), words[0], fill="black", font=font)
    draw.text((8, 6), words[1], fill="black", font=font)
    for row, (name, errors) in enumerate(curves.items()):
        colour = COLOURS[row % len(COLOURS)]
        points = [place(n, errors[n]) for n in sorted(errors)]
        draw.line(points, fill=colour, width=3)
        for x, y in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        draw.text((WIDTH - RIGHT + 12, TOP + 20 * row), name[:26], fill=colour, font=font)
