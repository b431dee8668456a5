"""A schedule's times and weights, fitted on a surrogate for the smallest error at the end of the path.

Levenberg and Marquardt's method (Nocedal and Wright 2006, section 10.3) on the end's deviations, with derivatives by
differences: all of a step's are one batch on the surrogate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .linear_form import LinearForm, form_from, from_numbers, to_numbers
from .surrogate import Surrogate, mean_error

# A move of this size counts as one: in the logarithm of a step, in a row's sum, in a weight, in the share that is taken
# of a prediction.
STEP_UNIT, SUM_UNIT, WEIGHT_UNIT, NETWORK_UNIT = 0.3, 0.03, 0.1, 0.5
# Share of the start's error that is added for each squared move of one unit, over the number of trajectories: what is
# fitted stays near where it began, unless moving pays, the nearer the fewer trajectories tell.
PRIOR = 0.3
ITERATIONS = 12
# The least relative gain of an iteration, for another one.
LEAST_GAIN = 1e-4
DIFFERENCE = 1e-4
DAMPING, SMALLER, LARGER, ATTEMPTS = 1e-2, 0.25, 4.0, 6


def fit_on_surrogate(
    surrogate: Surrogate,
    begun: LinearForm,
    size: int,
    extra: Tensor | None = None,
    predictions: Tensor | None = None,
    iterations: int = ITERATIONS,
) -> tuple[float, LinearForm]:
    """Move a method's times and weights to where the surrogate's samples end nearest to the truth.

    Args:
        surrogate: see there.
        begun: where to begin; a prior holds the result near it.
        size: how many numbers a state has.
        extra: see `Surrogate.end_errors`.
        predictions: of a SideNet, see there; how much of them is taken is fitted too, and the times, which they belong
            to, stay.
        iterations: at most so many.

    Returns:
        The mean error over the trajectories, RMSE, and the method.
    """
    steps, part = begun.steps, (float(begun.times[0]), float(begun.times[-1]))
    known = to_numbers(begun)
    units = torch.full_like(known, WEIGHT_UNIT)
    units[:steps], units[steps : 2 * steps] = STEP_UNIT, SUM_UNIT
    first, own = known, len(known)
    if predictions is not None:
        begun_network = known.new_zeros(steps) if begun.network is None else begun.network
        first = torch.cat([known, begun_network])
        units = torch.cat([units, torch.full_like(begun_network, NETWORK_UNIT)])
        units[:steps] = 0

    def ends(moves: Tensor) -> Tensor:
        numbers = first + moves * units
        times, weights = from_numbers(numbers[:, :own], steps, *part)
        return surrogate.end_errors(times, weights, extra, numbers[:, own:], predictions)

    moves, errors = nearest(ends, len(first), size, iterations)
    numbers = first + moves * units
    network = None if predictions is None else numbers[own:]
    return float(mean_error(errors, size)), replace(form_from(numbers[:own], steps, *part), network=network)


def nearest(ends: Callable[[Tensor], Tensor], parameters: int, size: int, iterations: int) -> tuple[Tensor, Tensor]:
    """The moves [P] from zero that end nearest, held back by the prior, and the deviations [M, D] of the ends there.

    Args:
        ends: deviations [G, M, D] for moves [G, P] in units.
        parameters: P.
        size: how many numbers a state has.
        iterations: at most so many.
    """
    moves = torch.zeros(parameters, dtype=torch.float64)
    errors = ends(moves[None])[0]
    error = mean_error(errors, size)
    held = PRIOR * error / len(errors)

    def cost(error: Tensor, moves: Tensor) -> float:
        return float(error + held * moves.square().sum())

    least, damping = cost(error, moves), DAMPING
    for _ in range(iterations):
        slopes = (ends(moves + DIFFERENCE * torch.eye(len(moves), dtype=moves.dtype)) - errors) / DIFFERENCE
        # The mean of the samples' RMSE, not of their squares: each sample counts by one over its own.
        each = (errors.square().sum(-1, keepdim=True) * size).sqrt().clamp_min(1e-12) * len(errors)
        weighted = (slopes / each).flatten(1)
        curvature = weighted @ slopes.flatten(1).T + 2 * held * torch.eye(len(moves), dtype=moves.dtype)
        gradient = weighted @ errors.flatten() + 2 * held * moves
        before = least
        for _ in range(ATTEMPTS):
            damped = curvature + torch.diag(damping * curvature.diagonal())
            tried = moves - torch.linalg.solve(damped, gradient)
            found = ends(tried[None])[0]
            value = cost(mean_error(found, size), tried)
            if value < least:
                moves, errors, least, damping = tried, found, value, damping * SMALLER
                break
            damping *= LARGER
        if not least < before * (1 - LEAST_GAIN):
            break
    return moves, errors
