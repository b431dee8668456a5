"""How often a sampler calls the model: counted while it samples, or found out beforehand without the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor


class TooManyCallsError(ValueError):
    """A sampler makes more model calls than its limit."""


@dataclass
class CallCounter:
    """Model calls so far.

    Attributes:
        limit: of `nfe`; the next call is an error.
        on_call: is given the NFE of each call, 1 or 0.5.
        nfe: with CFG, a call that leaves the negative out counts one half.
    """

    limit: float = math.inf
    on_call: Callable[[float], Any] = field(default=lambda nfe: None)
    nfe: float = 0.0

    def add(self, nfe: float) -> None:
        self.nfe += nfe
        self.on_call(nfe)
        if self.nfe > self.limit:
            raise TooManyCallsError(f"It called the model more than {self.limit:g} times.")


@contextmanager
def counting(guider: Any, counter: CallCounter, predict: Callable[..., Tensor] | None = None) -> Iterator[None]:
    """Count a guider's model calls.

    Args:
        guider: ComfyUI's, while it samples.
        counter: is added to.
        predict: is called in the model's place; None = the model itself.
    """
    cfg, call = guider.cfg, predict or guider.outer_predict_noise

    def outer_predict_noise(x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any = None) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        conditional = math.isclose(guider.cfg, 1.0) and not model_options.get("disable_cfg1_optimization", False)
        counter.add(0.5 if conditional and not math.isclose(cfg, 1.0) else 1.0)
        return call(x, timestep, model_options, seed)

    # On the object and not its class, which `is_comfyui_cfg` looks at.
    guider.outer_predict_noise = outer_predict_noise
    try:
        yield
    finally:
        del guider.outer_predict_noise


class Run(NamedTuple):
    """A sampler's end [B, C, *spatial] in the model's own space, on the CPU, its NFE, and the seconds that it took."""

    end: Tensor
    nfe: float
    seconds: float


class CountedSampler(comfy.samplers.Sampler):
    """A sampler whose model calls are counted.

    Args:
        sampler: ComfyUI's SAMPLER.
        counter: is added to.
    """

    def __init__(self, sampler: Any, counter: CallCounter) -> None:
        self.sampler, self.counter = sampler, counter
        self.done: Run | None = None

    def sample(self, model_wrap: Any, *rest: Any, **more: Any) -> Tensor:
        """Called by ComfyUI's guiders; the arguments are theirs.

        Raises:
            ValueError: the end is not finite.
        """
        began = time.perf_counter()
        with counting(model_wrap, self.counter):
            end: Tensor = self.sampler.sample(model_wrap, *rest, **more)
        stored = end.cpu()  # waits for the device
        if not stored.isfinite().all():
            raise ValueError("Its picture holds NaN or infinity.")
        self.done = Run(stored, self.counter.nfe, time.perf_counter() - began)
        return end

    @property
    def run(self) -> Run:
        """The finished sampling.

        Raises:
            RuntimeError: ComfyUI did not call the sampler.
        """
        if self.done is None:
            raise RuntimeError("A node on the MODEL replaced the sampling, and nothing was compared.")
        return self.done


def rehearse(guider: Any, sampler: Any, sigmas: Tensor, noise: Tensor, limit: float, seed: int = 0) -> Tensor:
    """Run a sampler on a corner of the noise, with x / 2 in place of the model's answers; returns its end.

    Raises:
        TooManyCallsError: more model calls than the limit.
    """
    corner = noise[:1, ..., :2, :2].clone()
    arguments = {"model_options": {}, "seed": seed}
    with counting(guider, CallCounter(limit), lambda x, timestep, model_options, seed: 0.5 * x):
        return sampler.sample(guider, sigmas.clone(), arguments, None, corner, torch.zeros_like(corner), None, True)


def steps_for(guider: Any, sampler: Any, sigmas_of: Callable[[int], Tensor], noise: Tensor, calls: int) -> int:
    """The most steps that a sampler makes with so many model calls.

    Raises:
        ValueError: it adds noise on its way, or needs more calls for a single step.
    """
    for steps in range(calls, 0, -1):
        sigmas = sigmas_of(steps)
        try:
            end = rehearse(guider, sampler, sigmas, noise, calls)
        except TooManyCallsError:
            continue
        if not torch.allclose(end, rehearse(guider, sampler, sigmas, noise, calls, seed=1), rtol=1e-4, atol=1e-6):
            raise ValueError("It adds noise on its way, and so has no end that it could come near.")
        return steps
    raise ValueError(f"It needs more than {calls} calls of the model for one step.")
