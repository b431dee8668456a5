"""A folder of images with the settings they were drawn with; images are written atomically."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...bas_core.files import write_atomically, write_safetensors, write_text
from ..settings import UsageError, differences, prepare_folder
from ..text_files import read_user_text

SETTINGS = "settings.json"
IMAGES, PAIRS, LATENTS = "images", "pairs", "latents"


@dataclass(frozen=True)
class Folder:
    """Images under numbers.

    Attributes:
        out: holds the settings, and folders of images, pairs and latents.
        latents: whether it holds states instead of images.
    """

    out: Path
    latents: bool = False

    def path(self, index: int, kind: str = "") -> Path:
        """The path of an image, or of its pair or its latent."""
        kind = kind or (LATENTS if self.latents else IMAGES)
        return self.out / kind / f"{index:06d}.{'safetensors' if kind == LATENTS else 'png'}"

    def open(self, settings: dict[str, Any]) -> None:
        """Begin, or continue with images that were drawn with the same settings.

        Raises:
            UsageError: the folder holds images of other settings, or other things, or cannot be written.
        """
        prepare_folder(self.out)
        path = self.out / SETTINGS
        if path.exists():
            try:
                known = json.loads(read_user_text(path))
                if not isinstance(known, dict):
                    raise ValueError("it is no table")
            except ValueError as error:
                raise UsageError(f"{path} is damaged ({error}). Choose another folder, or remove it.") from error
            differing = differences(known, settings)
            if differing:
                raise UsageError(
                    f"--out {self.out} holds images that were drawn with other settings ({differing}). Choose another "
                    "folder; nothing is overwritten."
                )
            return
        strange = sorted(p.name for p in self.out.iterdir() if not p.name.startswith("."))
        if strange:
            raise UsageError(f"--out {self.out} holds other things ({strange[0]}). Choose an empty folder.")
        write_text(path, json.dumps(settings, indent=1))

    def missing(self, count: int) -> list[int]:
        """Numbers below `count` of which there is no image."""
        return [index for index in range(count) if not self.path(index).exists()]

    def write(self, index: int, drawn: Tensor, beside: Tensor | None = None) -> None:
        """Write an image [3, H, W] in [0, 1] (or a state), and a picture of it beside another."""
        if self.latents:
            self.path(index).parent.mkdir(exist_ok=True)
            write_safetensors(self.path(index), {"latent": drawn}, {})
            return
        if beside is not None:
            write_png(self.path(index, PAIRS), torch.cat((drawn, beside), 2))
        write_png(self.path(index), drawn)


def as_bytes(image: Tensor) -> np.ndarray[Any, Any]:
    """An image [3, H, W] in [0, 1] as uint8 [H, W, 3]."""
    scaled = (image.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return np.ascontiguousarray(scaled.movedim(0, -1).numpy())


def write_png(path: Path, image: Tensor) -> None:
    """Write an image [3, H, W] in [0, 1]."""
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda temporary: Image.fromarray(as_bytes(image)).save(temporary, format="PNG"))


def read_pngs(paths: list[Path]) -> Iterator[np.ndarray[Any, Any]]:
    """Images as uint8 [H, W, 3], one at a time."""
    for path in paths:
        with Image.open(path) as image:
            yield np.asarray(image.convert("RGB"))


def write_npz(path: Path, images: list[Path]) -> None:
    """The images as one array `arr_0`, uint8 [N, H, W, 3], which ImageNet's usual evaluator reads.

    One image is in memory at a time.
    """
    first = next(read_pngs(images[:1]))
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *first.shape)}

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as out:
            np.lib.format.write_array_header_1_0(out, header)
            for image in read_pngs(images):
                out.write(image.tobytes())

    write_atomically(path, write)
