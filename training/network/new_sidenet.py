"""A SideNet before its training: sized for the trajectories, with the mean of the data that they show."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bas_core.checkpoint import load_sidenet
from ...bas_core.files import CheckpointError
from ...bas_core.sidenet import SideNet, SideNetConfig
from ..backbones import Backbone
from ..progress import say
from ..recording.trajectories import Trajectories
from ..settings import UsageError
from .options import Training

# The call at t = 1 is saved where the mean of the data leaves no more of the velocity there than this share of its mean
# square (the demo at CFG 2: 0.017); the mean is taken over so many trajectories.
MEAN_TOLERANCE, MEAN_CHAINS = 0.05, 1024


def mean_in(sidenet: SideNet, shape: Sequence[int]) -> Tensor | None:
    """The mean of the data that a SideNet keeps, as states of `shape`; None if it keeps none."""
    known = sidenet.analytic_velocity(torch.zeros(1, *shape), torch.tensor(1.0))
    return None if known is None else -known[0]


def data_mean(trajectories: Trajectories, start: float, size: int, tolerance: float = MEAN_TOLERANCE) -> Tensor | None:
    """The mean of the model's data, read off the trajectories' first velocities: at t = 1, velocity = noise - mean.

    Args:
        trajectories: recorded runs.
        start: the time that sampling starts from.
        size: of the grid that it is kept on; 0 = it is not kept.
        tolerance: what share of the first velocity's mean square may be something else.

    Returns:
        [C, size, size], a video's over its frames. None where it is not asked for, where sampling does not
        start from pure noise, and where the first velocity says more than that: its call is then not to be saved.
    """
    if not size or start != 1:
        return None
    rows = torch.arange(len(trajectories))[:MEAN_CHAINS]
    first = torch.zeros_like(rows)
    velocities = trajectories.velocities[rows, first]
    seen = trajectories.states[rows, first] - velocities
    unexplained = ((seen - seen.mean(0)).square().mean() / velocities.square().mean()).item()
    if unexplained > tolerance:
        say(
            f"The first velocity is not noise minus a mean ({100 * unexplained:.0f} % of it is something else), so its "
            "call is not saved."
        )
        return None
    return pooled(seen.mean(0), size)


def pooled(mean: Tensor, size: int) -> Tensor:
    """[C, size, size] of a mean [C, *spatial]; a video's over its frames."""
    return F.adaptive_avg_pool2d(mean.mean(1) if mean.ndim == 4 else mean, size)


# Of a network that is not trained, and adds nothing.
SMALLEST = {
    "base_channels": 4, "embedding_dim": 4, "num_layers": 1, "num_heads": 1, "patch_size": 8, "kernel_size": 1,
    "num_classes": 0,
}  # fmt: skip


def new_sidenet(training: Training, about: dict[str, Any], mean: Tensor | None = None) -> SideNet:
    """A fresh SideNet that fits the trajectories, and keeps the mean of the data if it is given; or the one to start
    from.

    One that is not to be trained is as small as can be.

    Raises:
        UsageError, CheckpointError: the sizes do not fit each other, or the trajectories.
    """
    low, high = about["guidance"]
    try:
        sizes = {
            f.name: getattr(training, f.name) for f in dataclasses.fields(SideNetConfig) if hasattr(training, f.name)
        }
        sizes |= {
            "in_channels": about["shape"][0],
            "num_classes": about["num_classes"],
            "cfg_input": low != high,
            "data_mean_size": 0 if mean is None else training.data_mean_size,
            "patch_size": training.patch_size or about.get("patch_size", Backbone.patch_size),
        }
        config = SideNetConfig(**(sizes if training.trains or training.start_from else sizes | SMALLEST))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if training.start_from is None:
        torch.manual_seed(training.seed)
        sidenet = SideNet(config).zero_output()
        if mean is not None:
            sidenet.data_mean.copy_(mean)
        return sidenet
    sidenet, card = load_sidenet(training.start_from, dtype=torch.float32)
    if card.backbone.get("fingerprint") != about["backbone"]["fingerprint"]:
        raise CheckpointError(
            f"{training.start_from} belongs to {card.backbone.get('name')!r}, the trajectories to "
            f"{about['backbone']['name']!r}. Start from a SideNet of the same model."
        )
    if (sidenet.config.in_channels, sidenet.config.cfg_input) != (config.in_channels, config.cfg_input):
        raise CheckpointError(f"{training.start_from} takes other channels or guidance than the trajectories have.")
    return sidenet.train().requires_grad_(True)
