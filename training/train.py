"""Train a SideNet from recorded chains; the backbone is not needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bas_core.quadrature import get_rule
from ..bas_core.sidenet import SideNet, SideNetConfig
from .chains import Chains
from .loop import LoopSettings, Share, train
from .pairs import KINDS, Examples, QueryRange, draw_examples

# Share of the velocities' mean square that is added to the line's error, so that queries on which the line is
# already right to rounding do not dominate.
RELATIVE_FLOOR = 1e-3


@dataclass(frozen=True)
class TrainSettings:
    """How a SideNet is trained.

    Attributes:
        loop: steps, batch, learning rate.
        rule: quadrature whose nodes are asked for.
        ranges: which queries are drawn.
    """

    loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(
            steps=4500, batch=128, learning_rate=3e-3, weight_decay=0.01, warmup=100, muon=True, ema=0.995
        )
    )
    rule: str = "lobatto4"
    ranges: QueryRange = field(default_factory=QueryRange)


def predicted(sidenet: nn.Module, e: Examples, anchors: int) -> Tensor:
    """The SideNet's velocities for a batch of examples."""
    if anchors == 1:
        return e.v + sidenet(e.x, e.v, e.t, e.h, e.labels, scale=e.scales)
    return e.v + sidenet(e.x, e.v, e.t, e.h, e.labels, slope=e.slope, span=e.span, scale=e.scales)


def squared_errors(guess: Tensor, e: Examples) -> Tensor:
    """[B] mean squared errors against the recorded velocities."""
    return (guess - e.target).square().flatten(1).mean(1)


def relative_loss(sidenet: nn.Module, e: Examples, anchors: int) -> Tensor:
    """Squared error relative to the straight line's own, so that every kind of query counts alike.

    Without this, extrapolation and the hardly predictable end of the path outweigh interpolation, which then
    ends worse than the line.
    """
    line = squared_errors(e.straight_line(), e)
    floor = RELATIVE_FLOOR * e.target.square().flatten(1).mean(1)
    return (squared_errors(predicted(sidenet, e, anchors), e) / (line + floor)).mean()


@torch.inference_mode()
def residual_variance(
    sidenet: nn.Module, anchors: int, chains: Chains, settings: TrainSettings, batches: int = 16
) -> dict[str, float]:
    """Held-out residual variance left, by kind of query: the SideNet's squared error over the straight line's."""
    generator = torch.Generator().manual_seed(10_007)
    ours, lines = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
    for _ in range(batches):
        e = draw_examples(chains, get_rule(settings.rule), anchors, 128, settings.ranges, generator)
        ours.index_add_(0, e.kinds, squared_errors(predicted(sidenet, e, anchors), e))
        lines.index_add_(0, e.kinds, squared_errors(e.straight_line(), e))
    return {kind: round((ours[i] / lines[i].clamp_min(1e-12)).item(), 4) for i, kind in enumerate(KINDS)}


def train_sidenet(
    config: SideNetConfig,
    chains: Chains,
    held_out: Chains,
    settings: TrainSettings,
    state_path: Path | None = None,
    openings: Chains | None = None,
) -> tuple[SideNet, dict[str, float]]:
    """Train a SideNet on chains.

    Args:
        config: of the network.
        chains: to train on.
        held_out: to validate on.
        settings: see there.
        state_path: where to keep the unfinished run; the same call goes on from it. None = keep nothing.
        openings: first stretches of more runs; see `draw_examples`.

    Returns:
        The SideNet with averaged weights, and its held-out residual variance by kind of query.

    Raises:
        FloatingPointError: the loss is not finite; the last save is kept.
    """
    torch.manual_seed(settings.loop.seed)
    sidenet = SideNet(config).zero_output()

    def loss_at(step: int, share: Share) -> Tensor:
        generator, batch = settings.loop.generator(step), settings.loop.batch
        e = draw_examples(chains, get_rule(settings.rule), config.anchors, batch, settings.ranges, generator, openings)
        return relative_loss(sidenet, e.share(share.of), config.anchors)

    def report(average: SideNet, step: int) -> dict[str, float]:
        return residual_variance(average, config.anchors, held_out, settings)

    result = train(sidenet, loss_at, settings.loop, "sidenet", state_path, report)
    return result, residual_variance(result, config.anchors, held_out, settings)
