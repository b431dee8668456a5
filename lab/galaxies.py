"""Two diffusion models of galaxy images that others trained, as backbones: `hsc32` and `hsc64`.

    ba-solver make --backbone python:ba_solver.lab.galaxies:hsc32 --preset quick --out hsc32.safetensors

The weights are in the wheel galaxygrad 0.1.9 of the Python package index. It is downloaded with pip on first use, into
`$XDG_CACHE_HOME/ba_solver` (`~/.cache/ba_solver`), and read as data: nothing in it is executed.

Galaxies that the first noises lead to, by UniPC and by BA-solver with few calls, and exact ones:

    python -m ba_solver.lab.galaxies --sidenet hsc32.safetensors --out docs/galaxies.png

The models draw galaxies of the Hyper Suprime-Cam survey, one channel, without a condition; hsc32 has 600,000
parameters and hsc64 1.6 million. Each is an MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601) that gives the score
of a variance-preserving diffusion with alpha_bar = exp(-s), s in (0, 10]. Sampling starts at the flow time of s = 10.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bas_core.checkpoint import load_sidenet
from ..bas_core.files import CheckpointError, write_atomically
from ..training.backbones import Backbone
from ..training.progress import say
from ..training.schedules.solvers import baseline_solver, endpoint_errors, sidenet_solver

VERSION = "0.1.9"
WHEEL = f"galaxygrad-{VERSION}-py3-none-any.whl"
SHA256 = "3bd8cbc50926b59f0e081f95622b423f79ef8949169a79d81bf96a117198e785"
# Names of the weights in the wheel, and pixels along a side.
MODELS = {"hsc32": ("eqx_hsc_ScoreNet32", 32), "hsc64": ("eqx_hsc_ScoreNet64", 64)}
LONGEST = 10.0
START = 0.9933
PATCH, BLOCKS = 4, 4


def wheel() -> Path:
    """The wheel's path, after downloading it if it is not there.

    Raises:
        CheckpointError: the file is not the published wheel.
        CalledProcessError: pip could not download it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ba_solver"
    path = cache / WHEEL
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache)]
        subprocess.run([*command, f"galaxygrad=={VERSION}"], check=True)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise CheckpointError(f"{path} is not the published wheel. Delete it; it is then downloaded again.")
    return path


def read_arrays(name: str) -> list[Tensor]:
    """The weights of a model in the order in which equinox wrote them."""
    arrays = []
    with zipfile.ZipFile(wheel()) as archive, archive.open(f"galaxygrad/{name}.eqx") as file:
        while True:
            try:
                arrays.append(torch.from_numpy(np.load(file, allow_pickle=False)).float())
            except (EOFError, ValueError):  # numpy's two ways to say that the file ends here
                return arrays


class Mixer(nn.Module):
    """x [B, 1, H, W] and s [B] in (0, 10] to the score [B, 1, H, W]. Its weights are never trained."""

    def __init__(self, arrays: list[Tensor]) -> None:
        super().__init__()
        rest = iter(arrays)

        def take(count: int) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(next(rest), requires_grad=False) for _ in range(count))

        self.patches, self.images = take(2), take(2)
        # For each block: a linear pair over positions, a linear pair over channels, and the norms before either.
        self.blocks = nn.ModuleList(take(12) for _ in range(BLOCKS))
        self.norm = take(2)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        x = torch.cat([x, (s / LONGEST).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], 1)
        x = F.conv2d(x, self.patches[0], self.patches[1].flatten(), stride=PATCH)
        grid = x.shape[2:]
        x = x.flatten(2)
        for block in self.blocks:
            parts = list(block.parameters())
            x = x + _mlp(x, parts[:4], parts[8:10])
            x = (x.mT + _mlp(x.mT, parts[4:8], parts[10:])).mT
        x = F.layer_norm(x, self.norm[0].shape, self.norm[0], self.norm[1]).unflatten(2, grid)
        # A transposed convolution of jax has its kernel flipped, and input and output channels exchanged.
        kernel = self.images[0].flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, self.images[1].flatten(), stride=PATCH)


def _mlp(x: Tensor, parts: Sequence[Tensor], norm: Sequence[Tensor]) -> Tensor:
    x = F.layer_norm(x, norm[0].shape, norm[0], norm[1])
    return F.linear(F.relu(F.linear(x, parts[0], parts[1])), parts[2], parts[3])


def _backbone(name: str, device: torch.device, dtype: torch.dtype) -> Backbone:
    file, size = MODELS[name]
    network = Mixer(read_arrays(file)).to(device, dtype).eval()

    def velocity(x: Tensor, t: Tensor, conditions: Tensor, scale: float) -> Tensor:
        """The flow velocity, from the score at the state of the same signal-to-noise ratio."""
        t = t.to(x).clamp(1e-4, START).view(-1, 1, 1, 1)
        norm = torch.hypot(1 - t, t)
        score = network((x / norm).to(dtype), (-2 * ((1 - t) / norm).log().flatten()).to(dtype))
        return (-t / norm * score.to(x.dtype) - x) / (1 - t)

    return Backbone(
        name=name,
        kind="python",
        fingerprint=f"galaxygrad-{name}",
        shape=(1, size, size),
        velocity=velocity,
        start=START,
        parameters=sum(p.numel() for p in network.parameters()),
        patch_size=PATCH,
        device=device,
        dtype=dtype,
    )


def hsc32(device: torch.device, dtype: torch.dtype) -> Backbone:
    """Galaxies of 32x32 pixels."""
    return _backbone("hsc32", device, dtype)


def hsc64(device: torch.device, dtype: torch.dtype) -> Backbone:
    """Galaxies of 64x64 pixels."""
    return _backbone("hsc64", device, dtype)


# --- the picture ------------------------------------------------------------------------------------------------------

# Of the exact ones: RMSE .0005.
EXACT_NFE, EXACT_GRID = 100, (1.4, 0.5)
# Below this, in the model's units, the stretch of brightness is linear: about the noise of the sky.
FAINT = 0.05


@dataclass(frozen=True, kw_only=True)
class GalaxySettings:
    """Draw hsc32's galaxies of the first noises, exactly and with few calls.

    Attributes:
        sidenet: of hsc32, with a schedule for `nfe`.
        out: the picture.
        nfe: model calls of UniPC and of BA-solver.
        grid: shift and cosine of UniPC's times: its best of 35 with 5 to 10 calls.
        count: galaxies.
        seed: of the noises.
    """

    sidenet: Path
    out: Path = Path("docs/galaxies.png")
    nfe: int = 5
    grid: tuple[float, float] = (2.0, 0.5)
    count: int = 12
    seed: int = 0


def stretched(galaxies: Tensor, exact: Tensor) -> Tensor:
    """[B, 1, H, W] as brightness in [0, 1]: asinh (Lupton et al. 2004), which shows faint parts beside bright ones.

    Each galaxy has the scale of its exact one.
    """
    brightest = exact.flatten(1).amax(1).clamp_min(FAINT).view(-1, 1, 1, 1)
    return ((galaxies / FAINT).asinh() / (brightest / FAINT).asinh()).clamp(0, 1)


def draw_galaxies(settings: GalaxySettings) -> None:
    """Draw, and write the picture and the errors."""
    from matplotlib.figure import Figure

    backbone = hsc32(torch.device("cpu"), torch.float32)
    sidenet, card = load_sidenet(settings.sidenet)
    field = backbone.field(torch.zeros(settings.count, dtype=torch.long), 1.0)
    generator = torch.Generator().manual_seed(settings.seed)
    noise = backbone.noise(torch.randn((settings.count, *backbone.shape), generator=generator))
    ours = dataclasses.replace(sidenet_solver(sidenet, start=backbone.start), schedules=card.own_schedules)
    with torch.inference_mode():
        exact = baseline_solver("adams_pec", backbone.start).sample(field, noise, EXACT_NFE, EXACT_GRID)
        drawn = {
            f"UniPC, {settings.nfe} calls": baseline_solver("unipc", backbone.start).sample(
                field, noise, settings.nfe, settings.grid
            ),
            f"BA-solver, {settings.nfe} calls": ours.sample(field, noise, settings.nfe),
            "exact": exact,
        }
    figure = Figure(figsize=(settings.count * 0.8 + 1.6, 0.82 * len(drawn)), layout="constrained")
    for panel, (label, galaxies) in zip(figure.subplots(len(drawn), 1), drawn.items(), strict=True):
        row = stretched(galaxies, exact)[:, 0].permute(1, 0, 2).flatten(1)
        panel.imshow(row.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        panel.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        say(f"{label}: error {endpoint_errors(galaxies, exact).mean():.3f}")
    write_atomically(
        settings.out, lambda temporary: figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    )


if __name__ == "__main__":
    import tyro

    draw_galaxies(tyro.cli(GalaxySettings))
