"""The published training objective (arXiv 2601.21542, section 3 and its official code), for comparison.

From a noised latent, a trajectory of small random steps; at each new state the backbone is called and the SideNet's
prediction from the state before is compared with the true velocity.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bas_core.files import CheckpointError, read_safetensors
from ...bas_core.flow import interpolate, per_sample
from ...bas_core.quadrature import RULES
from ..backbones import Backbone
from ..settings import UsageError
from .loop import Microbatch

CHAIN_STEPS = 8
RATE = 50.0
CLASS_DROPOUT = 0.1
NODES = RULES["legendre3"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Latents:
    """Data: latents [M, C, *spatial] and the conditions [M] they go with."""

    states: Tensor
    labels: Tensor


def load_latents(path: Path, backbone: Backbone) -> Latents:
    """Latents from a safetensors file (`latents`, and `labels` if there are classes), or from a folder of images.

    A folder's subfolders, in alphabetical order, are the classes.

    Raises:
        FileNotFoundError, CheckpointError, UsageError: there is nothing to train on, or it does not fit the model.
    """
    latents = _from_folder(path, backbone) if path.is_dir() else _from_file(path)
    if tuple(latents.states.shape[1:]) != backbone.shape:
        raise UsageError(
            f"--latents {path} holds {tuple(latents.states.shape[1:])}; {backbone.name} takes {backbone.shape}."
        )
    highest = int(latents.labels.max())
    if highest >= backbone.conditions:
        raise UsageError(f"--latents {path} has class {highest}; {backbone.name} has {backbone.conditions} conditions.")
    return latents


def _from_file(path: Path) -> Latents:
    tensors, _ = read_safetensors(path)
    if "latents" not in tensors:
        raise CheckpointError(f"{path} has no tensor 'latents' (and 'labels', where there are classes).")
    states = tensors["latents"].float()
    if not len(states) or not states.isfinite().all():
        raise CheckpointError(f"{path}: its latents are empty or not finite.")
    labels = tensors.get("labels", torch.zeros(len(states)))
    if labels.shape != states.shape[:1]:
        raise CheckpointError(f"{path}: labels must be [{len(states)}], one a latent; got {tuple(labels.shape)}.")
    return Latents(states, labels.long())


def _from_folder(folder: Path, backbone: Backbone) -> Latents:
    from matplotlib.image import imread

    if backbone.encode is None:
        raise UsageError(
            f"{backbone.name} has no autoencoder to turn the images of --latents {folder} into latents with. Give a "
            "safetensors file with 'latents'."
        )
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UsageError(f"--latents {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    classes = {name: index for index, name in enumerate(sorted({path.parent.name for path in files}))}
    states = []
    for path in files:
        pixels = torch.from_numpy(imread(path).copy()).float()
        pixels = pixels / 255 if path.suffix.lower() != ".png" else pixels
        image = (pixels if pixels.ndim == 3 else pixels[..., None].expand(-1, -1, 3))[..., :3].permute(2, 0, 1)[None]
        size = (backbone.shape[-2] * backbone.pixels_per_latent, backbone.shape[-1] * backbone.pixels_per_latent)
        with torch.no_grad():
            states.append(backbone.encode(F.interpolate(image, size, mode="bilinear", antialias=True)).cpu())
    return Latents(torch.cat(states), torch.tensor([classes[path.parent.name] for path in files]))


def signed_steps(t: Tensor, generator: torch.Generator) -> Tensor:
    """[B] steps h, positive toward the data: a fair coin for the direction, a truncated exponential for the size."""
    toward_data = torch.rand(len(t), generator=generator) < 0.5
    room = torch.where(toward_data, t, 1 - t)
    u = torch.rand(len(t), generator=generator)
    size = -torch.log1p(-u * -torch.expm1(-RATE * room)) / RATE
    return torch.where(toward_data, size, -size)


def published_loss(
    sidenet: nn.Module,
    backbone: Backbone,
    latents: Latents,
    batch: int,
    generator: torch.Generator,
    microbatch: Microbatch,
) -> Tensor:
    """Mean squared error over the trajectory's steps. Costs `CHAIN_STEPS + 1` calls of one branch a sample."""
    rows = torch.randint(len(latents.states), (batch,), generator=generator)
    noise = torch.randn((batch, *backbone.shape), generator=generator)
    t = torch.rand(batch, generator=generator) * backbone.start
    dropped = torch.rand(batch, generator=generator) < CLASS_DROPOUT
    y = latents.labels[rows]
    if backbone.null is not None:
        y = torch.where(dropped, backbone.null, y)
    device = backbone.device
    x = microbatch.of(interpolate(latents.states[rows], noise, t)).to(device)
    y = microbatch.of(y).to(device)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        # In its own precision, whatever the SideNet is trained in.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return backbone.velocity(x.float(), t, y, 1.0).float()

    def predict(x: Tensor, v: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return v + sidenet(x, v, t, h, y)

    v, losses = velocity(x, microbatch.of(t).to(device)), []
    for _ in range(CHAIN_STEPS):
        step = signed_steps(t, generator)
        now, h = microbatch.of(t).to(device), microbatch.of(step).to(device)
        with torch.no_grad():
            ahead = [w * predict(x, v, now, c * h) for c, w in zip(NODES.nodes, NODES.weights, strict=True)]
            moved = x - per_sample(h, x) * torch.stack(ahead).sum(0)
        seen = velocity(moved, now - h)
        losses.append((predict(x, v, now, h).float() - seen).square().mean())
        x, v, t = moved, seen, t - step
    return torch.stack(losses).mean()
