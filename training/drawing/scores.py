"""FID, IS, precision and recall by `torch-fidelity`, where it and its network's weights are installed."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...bas_core.files import CheckpointError
from ..settings import UsageError

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
# torch-fidelity's names, and the usual ones.
NAMED = {
    "frechet_inception_distance": "FID",
    "inception_score_mean": "IS",
    "precision": "precision",
    "recall": "recall",
}
MISSING = (
    "sFID is not computed, for no maintained library has it: give --npz, and the array file to guided-diffusion's "
    "evaluator."
)


def weights_file() -> Path:
    """The Inception network's weights.

    Raises:
        UsageError: the library or the weights are missing; the message says where they belong.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UsageError("--fid needs torch-fidelity: pip install torch-fidelity.")
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not path.exists():
        raise UsageError(
            f"--fid needs the weights of the Inception network, and {path} is not there. Download {WEIGHTS} from "
            "torch-fidelity's releases and put it there."
        )
    # The library unpickles the file, which runs what is in it: it must be the published one, whose name tells its sum.
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.rpartition("-")[2]):
        raise UsageError(f"{path} is not the published file, or was cut short. Download it again.")
    return path


class Images(torch.utils.data.Dataset[Tensor]):
    """PNG files, or the images of an array file, as uint8 [3, H, W]; of an array file, read as they are asked for."""

    def __init__(self, source: list[Path] | np.ndarray[Any, Any]) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        entry = self.source[index]
        if isinstance(entry, Path):
            with Image.open(entry) as image:
                entry = np.asarray(image.convert("RGB"))
        return torch.from_numpy(np.array(entry)).movedim(-1, 0)


def reference_images(path: Path) -> Images:
    """The images of an evaluator's reference file.

    Raises:
        CheckpointError: it holds none.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            array = content["arr_0"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is no array file of images with the key arr_0: {error}") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise CheckpointError(f"{path} must hold uint8 [N, H, W, 3]; got {array.dtype} {array.shape}.")
    return Images(array)


def scores(images: list[Path], reference: Path, device: torch.device, weights: Path) -> dict[str, float]:
    """FID, IS, precision and recall of PNG files against a reference file."""
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=Images(images),
        input2=reference_images(reference),
        fid=True,
        isc=True,
        prc=True,
        # For precision and recall the library would take another network; the evaluators take this one's features too.
        feature_extractor="inception-v3-compat",
        feature_layer_prc="2048",
        cuda=device.type == "cuda",
        feature_extractor_weights_path=str(weights),
        isc_splits=min(10, len(images)),
        verbose=False,
    )
    return {name: float(found[key]) for key, name in NAMED.items()}
