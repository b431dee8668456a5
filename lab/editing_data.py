"""What the editing figures are drawn from: settings, shapes and noises, each set from seeds of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..training.runs.samplers import GridShape
from .shapes import ShapeBatch, draw_shapes

SEARCH_SEED = 12_000_000
REPORT_SEED = 14_000_000
# Gentler than sampling grids: at 5 calls each way (2, 0) to (2.8, 0) cost a sixth in what should stay.
EDIT_SHAPE: GridShape = (1.4, 0.0)


@dataclass(frozen=True)
class EditingSettings:
    """What is measured.

    Attributes:
        out: folder for `editing.json`, `editing.md` and `edits_N.png`, N calls.
        search: search the best grids and edit settings anew and store them with the package.
        parts: what is measured, of `CASES` and "edits"; the other parts stay as they are in `out`.
        images: images a seed of the reconstructions; 66 in all.
        seeds: independent sets of images that are reported.
        search_images: images that grids are searched on.
        edit_calls: calls of an edit in all.
        edits_a_pair: images for each of the 90 ordered pairs of classes, and seed.
        device: where to run.
    """

    out: Path = Path("runs/editing")
    search: bool = False
    parts: tuple[str, ...] = ("clean", "edits", "noised", "guided")
    images: int = 22
    seeds: int = 3
    search_images: int = 6
    edit_calls: tuple[int, ...] = (10, 20)
    edits_a_pair: int = 1
    device: str = "cpu"


def drawn(seed: int, labels: Tensor) -> ShapeBatch:
    """Shapes of given classes; the same seed with other classes draws the same scenes with other shapes."""
    return draw_shapes(torch.Generator().manual_seed(seed), len(labels), labels)


def noise_for(images: Tensor, seed: int) -> Tensor:
    """Noise of the images' shape from a seed."""
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(seed + 1)).to(images)
