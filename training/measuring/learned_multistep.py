"""The learned multistep solver: the strongest rival of a SideNet, with no network.

x(t_1) = x(t_0) + sum of c_j v(t_j) over all velocities so far, with coefficients of each step by least squares against
recorded paths. Every step's coefficients are fitted on the states that the steps before it lead to.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ...bas_core.guidance import Field
from ..schedules.fitting import least_squares, linear_combination

Coefficients = list[Tensor]


def fit_multistep(field: Field, noise: Tensor, times: Tensor, truth: Callable[[Tensor], Tensor]) -> Coefficients:
    """Coefficients for one time grid; costs as many calls as the grid has steps.

    Args:
        field: the velocity field of the recorded runs.
        noise: [B, C, *spatial] where they began.
        times: [N + 1] descending.
        truth: their states at any time.

    Returns:
        N tensors of 1, 2, …, N coefficients.
    """
    x, velocities, found = noise, [], []
    for t0, t1 in pairwise(times):
        velocities.append(field.velocity(x, t0))
        found.append(least_squares(velocities, truth(t1) - x))
        x = linear_combination(x, velocities, found[-1].tolist())
    return found


class LearnedMultistep:
    """The solver, fitted for every time grid that it is first used on.

    Args:
        field, noise, truth: what it is fitted on, see `fit_multistep`.
    """

    def __init__(self, field: Field, noise: Tensor, truth: Callable[[Tensor], Tensor]) -> None:
        self.field, self.noise, self.truth = field, noise, truth
        self.fitted: dict[tuple[float, ...], Coefficients] = {}

    def __call__(self, field: Field, x: Tensor, times: Tensor) -> Tensor:
        """Integrate over a grid: [B, C, *spatial] -> [B, C, *spatial]."""
        key = tuple(times.tolist())
        if key not in self.fitted:
            self.fitted[key] = fit_multistep(self.field, self.noise, times, self.truth)
        velocities: list[Tensor] = []
        for t0, coefficients in zip(times[:-1], self.fitted[key], strict=True):
            velocities.append(field.velocity(x, t0))
            x = linear_combination(x, velocities, coefficients.tolist())
        return x
