"""A SideNet whose part of the prediction is weighted: as a whole (a strength) or at each place (an inpaint mask).

The weight scales what the SideNet adds to the straight line through the two anchors, so that 0 is the multistep
baseline (`solve` without a SideNet) and 1 the SideNet itself, whether it has one anchor or two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .flow import per_sample
from .steps import Predictor

Weight = Callable[[Tensor], Tensor | float]


class WeightedSideNet:
    """change = line + weight (SideNet - line), with the line through both anchors; a `Predictor`.

    Where the weight is 0 and the velocity does not change along the path, as in the part of an image that an inpaint
    mask keeps, neither does the prediction.

    Args:
        sidenet: with one anchor or two.
        weight: from the times [N] of the anchors that are predicted from, to a number or a tensor that broadcasts
            with [N, C, *spatial].
    """

    anchors = 2

    def __init__(self, sidenet: Predictor, weight: Weight) -> None:
        self.sidenet = sidenet
        self.weight = weight
        self.config = getattr(sidenet, "config", None)

    def first_velocity(self, x: Tensor, t: Tensor) -> Tensor | None:
        """What the SideNet knows of the first velocity, whatever its weight: it says nothing of the change from it."""
        known = getattr(self.sidenet, "first_velocity", None)
        return None if known is None else known(x, t)

    def __call__(self, *, t: Tensor, h: Tensor, slope: Tensor, span: Tensor, **inputs: Any) -> Tensor:
        second = {"slope": slope, "span": span} if getattr(self.sidenet, "anchors", 1) == 2 else {}
        change = self.sidenet(t=t, h=h, **inputs, **second)
        line = slope * per_sample(h, slope)
        return torch.lerp(line, change, torch.as_tensor(self.weight(t), dtype=change.dtype, device=change.device))


def with_strength(sidenet: Predictor | None, strength: float) -> Predictor | None:
    """The SideNet with a strength: 1 = itself, 0 = None, the multistep baseline.

    Raises:
        ValueError: strength is negative or not finite.
    """
    if not 0 <= strength < float("inf"):
        raise ValueError(f"The SideNet's strength must be a number from 0 on; got {strength}. 1 is as trained.")
    if sidenet is None or strength == 0:
        return None
    return sidenet if strength == 1 else WeightedSideNet(sidenet, lambda times: strength)
