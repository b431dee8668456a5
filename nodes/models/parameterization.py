"""ComfyUI's sigmas and states to the core's times and states, and back: the only file that knows both conventions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import torch
from torch import Tensor

from ...bas_core.flow import per_sample, time_to_ve_sigma, ve_sigma_to_time, ve_to_flow

ROUNDING = 1e-5


@dataclass(frozen=True)
class Parameterization:
    """How a model's states x(sigma) correspond to flow states and flow times.

    Attributes:
        name: for messages.
        exploding: x = x_0 + sigma noise (diffusion models); else sigma is the flow time and x the flow state.
    """

    name: str
    exploding: bool

    def times(self, sigmas: Tensor) -> Tensor:
        """Flow times [N] of sigmas [N]."""
        return torch.as_tensor(ve_sigma_to_time(sigmas)) if self.exploding else sigmas

    def sigmas(self, times: Tensor) -> Tensor:
        """Sigmas [N] of flow times [N]; infinite at t = 1 for diffusion models."""
        return torch.as_tensor(time_to_ve_sigma(times)) if self.exploding else times

    def to_flow(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The flow state of a model's state x [B, ...] at sigma (0-d or [B])."""
        return ve_to_flow(x, sigma) if self.exploding else x

    def from_flow(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The model's state of a flow state. It takes sigma, since 1 - t has few digits left where sigma is large."""
        return x * (1 + per_sample(sigma, x)) if self.exploding else x


FLOW = Parameterization("flow", exploding=False)
DIFFUSION = Parameterization("diffusion", exploding=True)

# By ComfyUI's classes, the special ones first: they derive from the general ones. None = not supported.
_BY_CLASS: tuple[tuple[str, Parameterization | None], ...] = (
    ("IMG_TO_IMG", None),
    ("IMG_TO_IMG_FLOW", None),
    ("V_PREDICTION_DDPM", None),
    ("CONST", FLOW),
    ("COSMOS_RFLOW", DIFFUSION),
    ("EPS", DIFFUSION),
)


def parameterization_of(model_sampling: Any) -> Parameterization:
    """The parameterization of a MODEL's `model_sampling`.

    Raises:
        ValueError: the MODEL is neither a flow nor a diffusion model.
    """
    for name, found in _BY_CLASS:
        if isinstance(model_sampling, getattr(comfy.model_sampling, name, ())):
            if found is not None:
                return found
            break
    kinds = ", ".join(base.__name__ for base in type(model_sampling).__mro__[1:3])
    raise ValueError(
        f"BA-solver samples flow models (FLUX, SD3, Wan, SiT …) and diffusion models (SD 1.5, SDXL …); this MODEL's "
        f"sampling is of another kind ({kinds}). Use another sampler for it."
    )


def flow_time(model_sampling: Any, sigma: Any) -> float:
    """The flow time of one of a MODEL's sigmas, such as its largest, where sampling starts; at most 1."""
    times = parameterization_of(model_sampling).times(torch.as_tensor(float(sigma), dtype=torch.float64))
    return min(1.0, float(times))


def flow_interval(model_sampling: Any, start_percent: float, end_percent: float) -> tuple[float, float]:
    """The flow times (lo, hi) between two shares of a sampling, as ComfyUI's `percent_to_sigma` means them.

    Args:
        model_sampling: of a MODEL.
        start_percent, end_percent: in [0, 1], in order; 0 gives hi = 1 and 1 gives lo = 0 exactly.
    """

    def time(percent: float) -> float:
        if percent in (0, 1):
            return 1.0 - percent
        return flow_time(model_sampling, model_sampling.percent_to_sigma(percent))

    return time(end_percent), time(start_percent)


@dataclass(frozen=True)
class SigmaSchedule:
    """The sigmas of a sampling, and their flow times.

    Attributes:
        parameterization: of the model.
        sigmas: [N + 1], float32; on the CPU, unless moved.
        times: [N + 1], float32; beside them.
    """

    parameterization: Parameterization
    sigmas: Tensor
    times: Tensor

    @staticmethod
    def of(parameterization: Parameterization, sigmas: Tensor) -> SigmaSchedule:
        """Check sigmas, and find their times.

        Raises:
            ValueError: fewer than two, not falling, negative, not finite, or above 1 for a flow model.
        """
        sigmas = sigmas.detach().cpu().float()
        if not parameterization.exploding:
            # ComfyUI's time shift rounds some largest sigmas to a hair above 1.
            sigmas = torch.where((sigmas > 1) & (sigmas < 1 + ROUNDING), torch.ones_like(sigmas), sigmas)
        values = [round(value, 4) for value in sigmas.tolist()]
        if sigmas.ndim != 1 or len(values) < 2:
            raise ValueError(
                f"sigmas must hold at least two values, the ends of one step; got {values}. Give the scheduler more "
                "steps, or split the sigmas elsewhere."
            )
        if not sigmas.isfinite().all() or sigmas.min() < 0:
            raise ValueError(f"sigmas must be finite and not negative; got {values}.")
        if not (sigmas.diff() < 0).all():
            raise ValueError(
                f"sigmas must fall from noise to image, without repeating a value; got {values}. BA-Solver Sampler "
                "does not invert: leave out Flip Sigmas."
            )
        if not parameterization.exploding and sigmas[0] > 1:
            raise ValueError(
                f"This is a flow model, whose sigmas lie between 0 and 1; got {values}. Use a scheduler that is given "
                "this MODEL, such as BA-Solver Scheduler or BasicScheduler."
            )
        return SigmaSchedule(parameterization, sigmas, parameterization.times(sigmas))

    def over(self, times: Sequence[Tensor]) -> SigmaSchedule:
        """The same ends, with other times between them."""
        if torch.equal(torch.stack(list(times)).float(), self.times):
            return self
        inner = self.parameterization.sigmas(torch.stack(list(times[1:-1])).double()).float()
        return SigmaSchedule.of(self.parameterization, torch.cat([self.sigmas[:1], inner, self.sigmas[-1:]]))

    def to(self, device: torch.device) -> SigmaSchedule:
        """The same on a device, where sigmas of times there are found without a wait."""
        return SigmaSchedule(self.parameterization, self.sigmas.to(device), self.times.to(device))

    def sigma_at(self, time: Tensor | float) -> Tensor:
        """The sigma (0-d) of one of the times, without rounding; a 0-d time has to be on the schedule's device."""
        return self.sigmas.index_select(0, (self.times - time).abs().argmin().reshape(1))[0]


@dataclass(frozen=True)
class AnySigma:
    """Takes a SigmaSchedule's place where the model is called at any time."""

    parameterization: Parameterization

    def sigma_at(self, time: Tensor | float) -> Tensor:
        """The sigma (0-d) of a time, on its device."""
        return self.parameterization.sigmas(torch.as_tensor(time, dtype=torch.float32))
