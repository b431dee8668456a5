"""Linear multistep methods as numbers: every state is the noise plus a weighted sum of the velocities so far.

Adams-Bashforth, the predictor-corrector, DPM-Solver++(2M), UniPC, iPNDM and their like differ in these weights alone.
So each of them, on any times, is a point of the space in which schedules are fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...bas_core.grids import grid_between
from ...bas_core.guidance import Field
from ...bas_core.schedule import DROPPED, Schedule
from ..baselines import run_baseline

# The quadrature rule of schedules: it asks the SideNet once a step (lobatto4: five times), and coefficients make up for
# its lower order.
RULE = "lobatto2"


@dataclass(frozen=True)
class LinearForm:
    """A linear multistep method on given times.

    Attributes:
        times: [N + 1] descending, float64.
        weights: [N, N], lower triangular: the state at times[k + 1] is the noise plus weights[k, j] times the velocity
            of call j = 0 … k. A known method's row sums to times[k + 1] - times[0], so that a straight path is exact.
        network: [N] how much is added, in each step, of what a SideNet predicts of it beyond the straight line through
            its two anchors; 0 = the SideNet is not asked. It stays in the states after. None: never.
    """

    times: Tensor
    weights: Tensor
    network: Tensor | None = None

    @property
    def steps(self) -> int:
        """N."""
        return len(self.weights)


def linear_form(solver: str, times: Tensor) -> LinearForm:
    """What a solver of one call a step (`training.baselines`) does on a grid [N + 1]: it is run on unit vectors."""
    times = times.double()
    calls = len(times) - 1
    states: list[Tensor] = []

    def evaluate(x: Tensor, t: Tensor, branches: int) -> Tensor:
        states.append(x[0, 1:, 0, 0])
        unit = torch.zeros_like(x)
        unit[0, len(states)] = 1
        return unit[None]

    noise = torch.zeros(1, 1 + calls, 1, 1, dtype=torch.float64)
    noise[0, 0] = 1
    end = run_baseline(solver, Field(evaluate), noise, times)
    return LinearForm(times, torch.stack([*states[1:], end[0, 1:, 0, 0]]))


def schedule_of(
    form: LinearForm, analytic_first_step: bool = False, cfg_coefficients: list[list[float]] | None = None
) -> Schedule:
    """The method as a schedule with times from 1 to 0, in the solver's coefficients (`Schedule.coefficients`).

    After a step's corrector the predictor's state is kept (-1 for the corrected state, 1 for the predicted one), and
    each predictor goes on from there by the difference of two rows of weights. Where a SideNet is asked, its straight
    line is part of the answer, and taken from the weights.
    """
    times, weights = form.times, form.weights
    network = torch.zeros_like(times[1:]) if form.network is None else form.network
    rows: list[list[float]] = []
    before = torch.zeros_like(weights[0])
    for i in range(form.steps):
        change = (weights[i] - before) / (times[i + 1] - times[i])
        others = change[:i].clone()
        if i:
            others[-1] += network[i] / 2 * (times[i] - times[i + 1]) / (times[i - 1] - times[i])
        rows.append([DROPPED + float(network[i]), *others.tolist(), float(change.sum()) - 1])
        if i < form.steps - 1:
            rows.append([DROPPED, 1.0, *[0.0] * (i + 2)])
        before = weights[i]
    return Schedule(
        ((times - times[-1]) / (times[0] - times[-1])).tolist(),
        coefficients=rows,
        cfg_coefficients=cfg_coefficients or (),
        analytic_first_step=analytic_first_step,
        rule=RULE,
    )


def lower(steps: int) -> Tensor:
    """[N, N] mask of the weights below the diagonal."""
    return torch.ones(steps, steps, dtype=torch.bool).tril(-1)


def to_numbers(form: LinearForm) -> Tensor:
    """[2 N + N (N - 1) / 2] free numbers: the logarithms of the steps, by how much each row's sum is more than a
    straight path's, and the weights below the diagonal."""
    excess = form.weights.sum(1) - (form.times[1:] - form.times[0])
    return torch.cat([(-form.times.diff()).log(), excess, form.weights[lower(form.steps)]])


def from_numbers(numbers: Tensor, steps: int, start: float, end: float = 0.0) -> tuple[Tensor, Tensor]:
    """Times [G, N + 1] and weights [G, N, N] of G points [G, 2 N + N (N - 1) / 2] of the space, from `start` to
    `end`."""
    shares = torch.softmax(numbers[:, :steps], 1).cumsum(1)
    first, last = shares.new_ones(len(numbers), 1), shares.new_zeros(len(numbers), 1)
    times = grid_between(torch.cat([first, 1 - shares[:, :-1], last], 1), start, end)
    weights = numbers.new_zeros(len(numbers), steps, steps)
    weights[:, lower(steps)] = numbers[:, 2 * steps :]
    sums = times[:, 1:] - times[:, :1] + numbers[:, steps : 2 * steps]
    return times, weights + torch.diag_embed(sums - weights.sum(2))


def form_from(numbers: Tensor, steps: int, start: float, end: float = 0.0) -> LinearForm:
    """One point of the space [2 N + N (N - 1) / 2]."""
    times, weights = from_numbers(numbers[None], steps, start, end)
    return LinearForm(times[0], weights[0])
