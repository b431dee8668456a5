"""A SideNet before its training: sized for the trajectories, with the data mean that they show."""

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
from ..progress import say
from ..recording.trajectories import Trajectories
from ..settings import UsageError
from .options import Training

# The first step is analytic where the data mean leaves no more than this share of the first velocity's mean square (the
# demo at CFG 2: 0.017); the mean is taken over so many trajectories.
MEAN_TOLERANCE, MEAN_TRAJECTORIES = 0.05, 1024
# What a network's size is chosen from: its width, time embedding, blocks and heads. Taken is the largest one with at
# most the share LARGE of a backbone's parameters, or up to ENOUGH the share SMALL; the second where they are not known.
# A larger one than the last would take hours to train at the latents' full resolution.
SIZES = tuple(
    {"base_channels": width, "embedding_dim": embedding, "num_layers": blocks, "num_heads": heads}
    for width, embedding, blocks, heads in (
        (16, 16, 3, 4), (24, 16, 3, 4), (32, 32, 4, 4), (48, 32, 4, 4), (64, 64, 5, 4), (96, 64, 6, 4),
        (128, 96, 8, 4), (192, 128, 8, 4), (256, 192, 10, 4),
    )
)  # fmt: skip
LARGE, SMALL, ENOUGH, UNKNOWN = 0.015, 0.1, 60_000, 1
# Of a network that is not trained, and adds nothing.
SMALLEST = {
    "base_channels": 4, "embedding_dim": 4, "num_layers": 1, "num_heads": 1, "patch_size": 8, "kernel_size": 1,
    "num_classes": 0,
}  # fmt: skip


def mean_in(sidenet: SideNet, shape: Sequence[int]) -> Tensor | None:
    """The data mean that a SideNet keeps, as a state of `shape`; None if it keeps none."""
    if not sidenet.has_data_mean:
        return None
    return -sidenet.analytic_velocity(torch.zeros(1, *shape), 1.0)[0]


def data_mean(trajectories: Trajectories, start: float, size: int, tolerance: float = MEAN_TOLERANCE) -> Tensor | None:
    """The mean of the model's data, read off the first velocities: at t = 1, velocity = noise - mean.

    Args:
        trajectories: recorded ones.
        start: the time that sampling starts from.
        size: side of the grid that the mean is averaged on; 0 = no mean.
        tolerance: the share of the first velocity's mean square that may be something else.

    Returns:
        [C, size, size], a video's over its frames. None where it is not asked for, where sampling does not start from
        pure noise, and where the first velocity tells more than the mean.
    """
    if not size or start != 1:
        return None
    count = min(len(trajectories), MEAN_TRAJECTORIES)
    total = torch.zeros(trajectories.states.shape[2:], dtype=torch.float64)
    squares = velocity_squares = 0.0
    first = torch.zeros(1, dtype=torch.long)
    for row in torch.arange(count).split(1):  # one by one: all would take a state and a velocity of each
        velocity = trajectories.velocities[row, first][0].double()
        implied = trajectories.states[row, first][0] - velocity
        total += implied
        squares += float(implied.square().mean())
        velocity_squares += float(velocity.square().mean())
    mean = total / count
    unexplained = (squares - count * float(mean.square().mean())) / velocity_squares
    if unexplained > tolerance:
        say(
            f"The first velocity is not noise minus a mean ({100 * unexplained:.0f} % of it is something else), so the "
            "first step is not analytic."
        )
        return None
    return pooled(mean.float(), size)


def kept_mean(training: Training, mean: Tensor | None) -> Tensor | None:
    """The mean [C, S, S] for analytic first steps: `mean`, or what the SideNet to start from keeps."""
    if training.start_from is None or mean is None:
        return mean
    begun, _ = load_sidenet(training.start_from, dtype=torch.float32)
    return begun.data_mean if begun.has_data_mean else None


def pooled(mean: Tensor, size: int) -> Tensor:
    """[C, size, size] of a mean [C, *spatial]; a video's over its frames."""
    return F.adaptive_avg_pool2d(mean.mean(1) if mean.ndim == 4 else mean, size)


def size_for(parameters: int, others: dict[str, Any]) -> dict[str, int]:
    """The size of a network for a backbone of so many parameters.

    Args:
        parameters: 0 = not known.
        others: the rest of its `SideNetConfig`.
    """
    allowed = max(LARGE * parameters, min(SMALL * parameters, ENOUGH))
    with torch.device("meta"):
        counts = [sum(p.numel() for p in SideNet(SideNetConfig(**others | size)).parameters()) for size in SIZES]
    fitting = [size for size, count in zip(SIZES, counts, strict=True) if count <= allowed]
    return SIZES[UNKNOWN] if not parameters else (fitting or SIZES)[-1 if fitting else 0]


def new_sidenet(training: Training, metadata: dict[str, Any], mean: Tensor | None = None) -> SideNet:
    """A SideNet with fresh weights that fits the trajectories, or the one to start from.

    Args:
        training: settings; a SideNet that is not trained is as small as can be.
        metadata: of the trajectories.
        mean: [C, S, S] of the data, for the SideNet to keep.

    Raises:
        UsageError, CheckpointError: the sizes do not fit each other, or the trajectories.
    """
    low, high = metadata["guidance"]
    sizes = {f.name: getattr(training, f.name) for f in dataclasses.fields(SideNetConfig) if hasattr(training, f.name)}
    sizes |= {
        "in_channels": metadata["shape"][0],
        "num_classes": metadata["num_classes"],
        "cfg_input": low != high,
        "data_mean_size": 0 if mean is None else training.data_mean_size,
        # Convolutions have the more to learn from, the finer the grid.
        "patch_size": training.patch_size or (1 if training.architecture == "local" else metadata["patch_size"]),
    }
    try:
        if not (training.steps or training.start_from):
            sizes |= SMALLEST
        elif not all(sizes[name] for name in SIZES[0]):
            chosen = size_for(metadata.get("parameters", 0), {k: v for k, v in sizes.items() if k not in SIZES[0]})
            sizes |= {name: sizes[name] or value for name, value in chosen.items()}
        config = SideNetConfig(**sizes)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if training.start_from is None:
        torch.manual_seed(training.seed)
        sidenet = SideNet(config).zero_output()
        if mean is not None:
            sidenet.data_mean.copy_(mean)
        return sidenet
    sidenet, card = load_sidenet(training.start_from, dtype=torch.float32)
    if card.backbone.get("fingerprint") != metadata["backbone"]["fingerprint"]:
        raise CheckpointError(
            f"{training.start_from} belongs to {card.backbone.get('name')!r}, the trajectories to "
            f"{metadata['backbone']['name']!r}. Start from a SideNet of the same model."
        )
    if (sidenet.config.in_channels, sidenet.config.cfg_input) != (config.in_channels, config.cfg_input):
        raise CheckpointError(f"{training.start_from} takes other channels or guidance than the trajectories have.")
    return sidenet.train().requires_grad_(True)
