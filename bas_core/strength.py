"""A SideNet whose output is weighted: as a whole (a strength) or at each place (an inpaint mask).

The weight scales what the SideNet adds to the straight line through the two anchors: 0 is the multistep method (`solve`
without a SideNet) and 1 the SideNet itself, whether it has one anchor or two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .flow import per_sample
from .prediction import SideNetProtocol, check_sidenet

Weight = Callable[[Tensor], Tensor | float]


class WeightedSideNet:
    """change = line + weight (SideNet - line), with the line through both anchors; a `SideNetProtocol`.

    Where the weight is 0 and the velocity is constant, as where an inpaint mask keeps the image, so is the prediction.

    Args:
        sidenet: with one anchor or two.
        weight: from the times [N] of the anchors that are predicted from, to a number or a tensor that broadcasts
            with [N, C, *spatial].
    """

    anchors = 2

    def __init__(self, sidenet: SideNetProtocol, weight: Weight) -> None:
        self.sidenet = check_sidenet(sidenet)
        self.weight = weight

    @property
    def cfg_input(self) -> bool:
        """See `SideNetProtocol`."""
        return self.sidenet.cfg_input

    @property
    def has_data_mean(self) -> bool:
        """See `SideNetProtocol`."""
        return self.sidenet.has_data_mean

    def analytic_velocity(self, x: Tensor, t: float) -> Tensor:
        """The SideNet's, whatever the weight."""
        return self.sidenet.analytic_velocity(x, t)

    def __call__(self, *, t: Tensor, h: Tensor, slope: Tensor | None, span: Tensor | None, **inputs: Any) -> Tensor:
        """See `SideNetProtocol`."""
        second = (slope, span) if self.sidenet.anchors == 2 else (None, None)
        change = self.sidenet(t=t, h=h, slope=second[0], span=second[1], **inputs)
        both = cast(Tensor, slope)  # this predictor has two anchors
        line = both * per_sample(h, both)
        weight = self.weight(t)
        return torch.lerp(line, change, weight.to(change) if isinstance(weight, Tensor) else weight)


def with_strength(sidenet: SideNetProtocol, strength: float) -> SideNetProtocol:
    """The SideNet with a strength: 1 = itself, 0 = a straight line through two anchors. The data mean stays.

    Raises:
        ValueError: strength is negative or not finite.
    """
    if not 0 <= strength < float("inf"):
        raise ValueError(f"The SideNet's strength must be a number from 0 on; got {strength}. 1 is as trained.")
    return sidenet if strength == 1 else WeightedSideNet(sidenet, lambda times: strength)
