"""How often a sampler calls the model: counted while it runs, and found out beforehand without the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from torch import Tensor


class TooManyCallsError(ValueError):
    """A sampler goes on beyond what it was given."""


@dataclass
class Count:
    """Model calls so far.

    Attributes:
        limit: above it the run is stopped.
        told: sees 1 or 0.5 at each call.
        calls: with CFG, one that leaves the negative out counts half.
    """

    limit: float = math.inf
    told: Callable[[float], Any] = field(default=lambda cost: None)
    calls: float = 0.0

    def add(self, cost: float) -> None:
        self.calls += cost
        self.told(cost)
        if self.calls > self.limit:
            raise TooManyCallsError(f"It called the model more than {self.limit:g} times.")


@contextmanager
def counted(guider: Any, count: Count, predict: Callable[..., Tensor] | None = None) -> Iterator[None]:
    """Count a guider's calls of its model.

    Args:
        guider: ComfyUI's, in the midst of its sampling.
        count: is added to.
        predict: stands in for the model; None = the model itself.
    """
    scale, made = guider.cfg, predict or guider.outer_predict_noise

    def outer_predict_noise(x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any = None) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        alone = math.isclose(guider.cfg, 1.0) and not model_options.get("disable_cfg1_optimization", False)
        count.add(0.5 if alone and not math.isclose(scale, 1.0) else 1.0)
        return made(x, timestep, model_options, seed)

    # On the object, so that its class stays what others ask for.
    guider.outer_predict_noise = outer_predict_noise
    try:
        yield
    finally:
        del guider.outer_predict_noise


def rehearse(
    guider: Any, sampler: Any, sigmas: Tensor, noise: Tensor, limit: float, seed: int = 0
) -> tuple[float, Tensor]:
    """Run a sampler on a corner of the noise with half of each state in the model's place.

    Returns:
        How often it called, and where it ended.

    Raises:
        TooManyCallsError: more often than the limit.
    """
    corner = noise[:1, ..., :2, :2].clone()
    count = Count(limit)
    with counted(guider, count, lambda x, timestep, model_options, seed: 0.5 * x):
        arguments = {"model_options": {}, "seed": seed}
        end = sampler.sample(guider, sigmas, arguments, None, corner, torch.zeros_like(corner), None, True)
    return count.calls, end


def steps_for(
    guider: Any, sampler: Any, sigmas_of: Callable[[int], Tensor], noise: Tensor, calls: int
) -> tuple[int, float]:
    """The most steps that a sampler makes on so many calls, and the calls that it then makes.

    Raises:
        ValueError: it adds noise on its way, or needs more calls for a single step.
    """
    for steps in range(calls, 0, -1):
        sigmas = sigmas_of(steps)
        try:
            made, end = rehearse(guider, sampler, sigmas, noise, calls)
        except TooManyCallsError:
            continue
        if not torch.equal(end, rehearse(guider, sampler, sigmas, noise, calls, seed=1)[1]):
            raise ValueError("It adds noise on its way, and so has no end that it could come near.")
        return steps, made
    raise ValueError(f"It needs more than {calls} calls of the model for one step.")
