"""`ba-solver compare`: folders of drawn images beside exact ones of other noises, as distributions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bas_core.files import read_safetensors, write_text
from .drawing.distribution import Components, distances
from .drawing.folder import IMAGES, LATENTS, SETTINGS, read_pngs
from .progress import progress, say
from .settings import UsageError, differences
from .text_files import read_user_text

# What images may differ in and still be compared.
MAY_DIFFER = ("sidenet", "method", "nfe", "grid", "preset", "seed", "compare")


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Whether drawn images are distributed like exact ones of other noises: no images are compared one by one.

    Attributes:
        exact: folder that `ba-solver sample` drew with many calls.
        drawn: folders to compare with it, of other seeds; one of exact images shows the least distance that so many can
            have.
        count: images of each folder; 0 = all.
        out: file for the distances (JSON).
    """

    exact: Path
    drawn: tuple[Path, ...]
    count: int = 0
    out: Path | None = None


def run_compare(settings: CompareSettings) -> list[dict[str, Any]]:
    """Do the work of `ba-solver compare`; returns the table's rows.

    Raises:
        UsageError: a folder holds no images, too few, or such as cannot be compared.
    """
    known = drawn_settings(settings.exact)
    for folder in settings.drawn:
        check_comparable(settings.exact, known, folder, drawn_settings(folder))
    exact = read_folder(settings.exact, settings.count)
    components = Components(exact)
    rows: list[dict[str, Any]] = []
    for folder in progress(settings.drawn, "compare"):
        images, drawn = read_folder(folder, settings.count), drawn_settings(folder)
        row = {"folder": folder.name, "method": drawn["method"], "nfe": drawn["nfe"], "images": len(images)}
        rows.append({**row, **distances(images, exact, components)})
    say(table(rows))
    if settings.out is not None:
        write_text(settings.out, json.dumps({"exact": str(settings.exact), "rows": rows}, indent=1))
    return rows


def drawn_settings(folder: Path) -> dict[str, Any]:
    """What the images of a folder were drawn with.

    Raises:
        UsageError: `ba-solver sample` did not write it, or it is damaged.
    """
    try:
        found = json.loads(read_user_text(folder / SETTINGS))
        if not isinstance(found, dict) or not found.keys() >= {"method", "nfe", "seed"}:
            raise ValueError("it lacks settings")
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is no folder that `ba-solver sample` wrote: {error}") from error
    return found


def check_comparable(exact: Path, known: dict[str, Any], folder: Path, drawn: dict[str, Any]) -> None:
    """Refuse images of another model or condition, and of the same noises.

    Raises:
        UsageError: saying what differs, or does not.
    """
    differing = differences(known, drawn, MAY_DIFFER, ("is", "here"))
    if differing:
        raise UsageError(f"{folder} cannot be compared with {exact}: {differing}. Draw both with the same settings.")
    if known["seed"] == drawn["seed"]:
        raise UsageError(
            f"{folder} and {exact} are of the same noises, seed {known['seed']}: images would be compared with "
            "themselves. Draw the exact ones with another --seed."
        )


def read_folder(folder: Path, count: int) -> Tensor:
    """The first images of a folder, [N, 3, H, W] in [0, 1], or its states [N, C, *spatial].

    Raises:
        UsageError: there are fewer than asked for, or than two.
    """
    paths = sorted([*folder.glob(f"{IMAGES}/*.png"), *folder.glob(f"{LATENTS}/*.safetensors")])
    if len(paths) < max(count, 2):
        raise UsageError(f"{folder} holds {len(paths)} images; {max(count, 2)} are needed. Draw more, with --count.")
    paths = paths[: count or None]
    if paths[0].parent.name == LATENTS:
        return torch.stack([read_safetensors(path)[0]["latent"] for path in paths]).float()
    return torch.from_numpy(np.stack(list(read_pngs(paths)))).movedim(-1, 1).float() / 255


def table(rows: list[dict[str, Any]]) -> str:
    """The distances as aligned text."""
    columns = [name for name in rows[0] if name not in ("method", "nfe")]
    lines = ["".join(f"{name:>16}" for name in columns)]
    for row in rows:
        cells = (f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for name in columns)
        lines.append("".join(f"{cell:>16}" for cell in cells))
    return "\n".join(["Distance over the exact images' own spread; 0 = distributed alike.", *lines])
