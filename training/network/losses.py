"""The loss: a SideNet's error on examples, relative to that of the straight line."""

from __future__ import annotations

from torch import Tensor, nn

from .pairs import Examples

# Share of the velocities' mean square that is added to the line's error, so that queries on which the line is
# already right to rounding do not dominate.
RELATIVE_FLOOR = 1e-3


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
