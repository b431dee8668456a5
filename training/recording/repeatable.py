"""Whether a model answers the same question alike.

A node that answers from a cache (TeaCache, EasyCache, First Block Cache), remembers earlier calls (momentum) or adds
noise is no velocity field: what is recorded of it is not what it says in another order of calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...bas_core.guidance import Field
from ..settings import UsageError

# How many of a trajectory's calls are made again, and by what share an answer may differ: rounding differs by less, and
# a cached answer by more somewhere on a path of dense points.
ASKED, ALIKE = 8, 0.01

# State [B, C, *spatial], time [B] and velocities [K, B, C, *spatial] of the first K branches.
Call = tuple[Tensor, Tensor, Tensor]


def remembering(field: Field, calls: list[Call]) -> Field:
    """The same field, which adds its calls to a list, in main memory."""

    def evaluate(x: Tensor, t: Tensor, branches: int) -> Tensor:
        v = field.evaluate(x, t, branches)
        calls.append((x.clone().cpu(), t.cpu(), v.clone().cpu()))
        return v

    return field.with_evaluate(evaluate)


def check_repeatable(field: Field, calls: Sequence[Call], device: torch.device) -> None:
    """Make some of a trajectory's calls again, the last ones first, and compare the answers.

    In this order a cache that answers again does so from another call than before.

    Args:
        field: of the samples.
        calls: in the order in which they were made.
        device: of the states.

    Raises:
        UsageError: an answer differs.
    """
    points = torch.linspace(len(calls) - 2, 1, ASKED).round().long().tolist()
    worst, at = 0.0, 0.0
    for x, t, before in (calls[point] for point in points):
        again = field.call_model(x.to(device), t[0], len(before)).cpu()
        apart = (again - before).norm() / before.norm().clamp_min(1e-12)
        worst, at = max((worst, at), (float(apart), float(t[0])))
    if worst > ALIKE:
        raise UsageError(
            f"The same model call gives different answers: at t = {at:.2f} the second is {100 * worst:.2g} % off. "
            "Something on the model answers from a cache (TeaCache, EasyCache and the like), remembers earlier calls "
            "(momentum) or adds noise; such answers are no truth to measure by. Take it off here; it can be used for "
            "sampling."
        )
