"""A `diffusers` network at any state and time: how it packs states, and its own times."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ...bas_core.files import CheckpointError
from ...bas_core.flow import (
    eps_to_velocity,
    flow_to_vp,
    v_prediction_to_velocity,
    vp_alpha_to_time,
)
from ..settings import UsageError
from .base import BackboneChoice, Combine
from .pipeline_watch import Watch, join, layout, moved


@dataclass(frozen=True)
class Packing:
    """How states [B, C, *spatial] become what the network takes: 2 x 2 patches as tokens, or nothing at all."""

    height: int
    width: int
    packed: bool

    def pack(self, x: Tensor) -> Tensor:
        """States to the network's layout."""
        return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2) if self.packed else x

    def unpack(self, tokens: Tensor) -> Tensor:
        """Back."""
        if not self.packed:
            return tokens
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=self.height // 2, p=2, q=2)


@dataclass(frozen=True)
class Clock:
    """How flow times map to the network's own time, and its output to a velocity.

    Attributes:
        offset, slope: network time = offset + slope times the scheduler's timestep.
        prediction: flow, epsilon or v_prediction.
        table: flow times of the timesteps 0, 1, … of a diffusion model.
    """

    offset: float
    slope: float
    prediction: str
    table: np.ndarray | None = None
    train_timesteps: int = 1000

    def timestep(self, t: Tensor) -> Tensor:
        """The scheduler's timestep of flow times."""
        if self.table is None:
            return t.float() * self.train_timesteps
        steps = np.interp(t.cpu().double().numpy(), self.table, np.arange(len(self.table)))
        return torch.from_numpy(steps).to(t.device, torch.float32)

    def flow_time(self, timestep: float) -> float:
        """The flow time of a scheduler's timestep."""
        if self.table is None:
            return timestep / self.train_timesteps
        return float(np.interp(timestep, np.arange(len(self.table)), self.table))

    def state(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network is shown of a flow state."""
        return x if self.prediction == "flow" else flow_to_vp(x, t)

    def velocity(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The flow velocity that its output means."""
        if self.prediction == "epsilon":
            return eps_to_velocity(x, output, t)
        return v_prediction_to_velocity(x, output, t) if self.prediction == "v_prediction" else output


@dataclass
class Network:
    """A pipeline's network as a velocity.

    Attributes:
        module: the transformer or UNet.
        conditions: the arguments of each prompt, then those of the unconditional branch.
        packing, clock: see there.
        sign: -1 where the pipeline turns the output round.
        embedded_guidance: the CFG scale is an argument.
        dtype: of the module.
        device: of states.
    """

    module: Any
    conditions: list[dict[str, Any]]
    packing: Packing
    clock: Clock
    embedded_guidance: bool
    name: str
    dtype: torch.dtype
    device: torch.device
    sign: float = 1.0

    def __call__(self, x: Tensor, t: Tensor, which: Tensor, scale: float) -> Tensor:
        """Velocities [N, C, *spatial]; prompts whose encodings differ in length are called one length at a time."""
        groups: dict[Any, list[int]] = {}
        for row, index in enumerate(which.tolist()):
            groups.setdefault(layout(self.conditions[index]), []).append(row)
        result = torch.empty_like(x)
        for rows in groups.values():
            result[rows] = self._call(x[rows], t[rows], [self.conditions[int(which[row])] for row in rows], scale)
        return result

    def _call(self, x: Tensor, t: Tensor, conditions: list[dict[str, Any]], scale: float) -> Tensor:
        arguments = {
            name: moved(join([condition[name] for condition in conditions]), self.device) for name in conditions[0]
        }
        if self.embedded_guidance:
            arguments["guidance"] = torch.full((len(x),), scale, device=x.device, dtype=torch.float32)
        shown = self.packing.pack(self.clock.state(x, t)).to(self.dtype)
        time = self.clock.offset + self.clock.slope * self.clock.timestep(t)
        output = self.module(**{**arguments, self.name: shown, "timestep": time, "return_dict": False})[0]
        if output.shape[1] == 2 * shown.shape[1] and not self.packing.packed:
            output = output.chunk(2, dim=1)[0]  # the second half is a learned variance
        return self.clock.velocity(x, self.sign * self.packing.unpack(output).to(x.dtype), t)


def keep_norm(packing: Packing) -> Combine:
    """CFG whose result has the conditional branch's norm (over a token, or a line): Qwen-Image's and Lumina 2's way."""

    def combine(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        c, u = packing.pack(conditional), packing.pack(unconditional)
        both = torch.lerp(u, c, scale)
        return packing.unpack(both * (c.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True)))

    return combine


def spatial_factor(pipeline: Any) -> int:
    """Pixels a latent, along a side."""
    for name in ("vae_scale_factor", "vae_scale_factor_spatial"):
        if isinstance(getattr(pipeline, name, None), int):
            return int(getattr(pipeline, name))
    return 8


def packing_of(pipeline: Any, state: Tensor, choice: BackboneChoice) -> Packing:
    """How the pipeline's states are laid out."""
    if state.ndim != 3:
        return Packing(int(state.shape[-2]), int(state.shape[-1]), packed=False)
    factor, tokens = 2 * spatial_factor(pipeline), state.shape[1]
    height = choice.height // factor or (tokens // (choice.width // factor) if choice.width else math.isqrt(tokens))
    if height * (tokens // height) != tokens:
        raise UsageError(f"--height {choice.height} and --width {choice.width} do not give {tokens} tokens.")
    return Packing(2 * height, 2 * (tokens // height), packed=True)


def clock_of(pipeline: Any, watch: Watch) -> Clock:
    """The network's time as a line through those it was given at the scheduler's first two timesteps.

    Raises:
        CheckpointError: it takes another kind of time, or the scheduler is of an unknown kind.
    """
    per_step = len(watch.calls) // len(watch.steps)
    given = [watch.calls[i * per_step]["timestep"] for i in range(2)]
    if any(isinstance(time, Tensor) and time.numel() > 2 for time in given):
        raise CheckpointError("The network takes a time for each token, which one SideNet cannot serve.")
    a, b = (float(torch.as_tensor(time).flatten()[0]) for time in given)
    s, r = watch.steps[0][1], watch.steps[1][1]
    slope = (a - b) / (s - r)
    config = pipeline.scheduler.config
    flow = "FlowMatch" in type(pipeline.scheduler).__name__ or config.get("use_flow_sigmas")
    prediction = "flow" if flow else config.get("prediction_type")
    table = None
    if prediction in ("epsilon", "v_prediction"):
        table = vp_alpha_to_time(pipeline.scheduler.alphas_cumprod.cpu().double()).numpy()
    elif prediction != "flow":
        raise CheckpointError(
            f"{type(pipeline.scheduler).__name__} predicts {prediction!r}; flow, epsilon and v_prediction are known."
        )
    # Rounding in half precision must not tilt the line; the slopes there are: 1, 1/1000, -1/1000, and a model's own.
    exact = float(f"{slope:.2g}")
    slope = exact if math.isclose(slope, exact, rel_tol=1e-2) else slope
    offset = a - slope * s
    offset = round(offset) if abs(offset - round(offset)) < 5e-2 else offset
    return Clock(offset, slope, prediction, table, int(config.get("num_train_timesteps", 1000)))


def shift_of(pipeline: Any, watch: Watch) -> float:
    """The time shift that the scheduler samples with.

    One with `shift_terminal` stretches its N shifted times so that the last is that, and steps from there to 0. But for
    that last step and the terminal time itself, this is a grid of N - 1 steps with the shift s N / (N + s - 1).
    """
    config = pipeline.scheduler.config
    shift = float(config.get("flow_shift") or config.get("shift") or 1.0)
    if config.get("use_dynamic_shifting") and watch.shift_exponent is not None:
        exponential = config.get("time_shift_type", "exponential") == "exponential"
        shift = math.exp(watch.shift_exponent) if exponential else float(watch.shift_exponent)
    if config.get("shift_terminal"):
        steps = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
        shift *= steps / (steps + shift - 1)
    return shift
