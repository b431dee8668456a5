"""Problems with known answers, an exact predictor, and small random networks for the tests."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from ba_solver.bas_core import Field, SideNet, SideNetConfig, SiT, SiTConfig, model_field, time_grid
from ba_solver.training.baselines import run_baseline
from torch import Tensor

# Two threads on a busy machine wait for each other longer than these small tensors take: minutes instead of seconds.
torch.set_num_threads(1)

RATE = 3.0
NULL = 3


def spread(t, x: Tensor) -> Tensor:
    """Times, numbers or [B], broadcast over x."""
    t = torch.as_tensor(t, dtype=x.dtype)
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (x.ndim - 1))


# --- dx/dt = -x^2 exp(-3 (1 - t)): nonlinear, time-dependent, and exactly solvable ------------------------------------
# Its derivatives do not change sign, so that the errors of single steps add up and orders show on coarse grids.


def velocity(x: Tensor, t) -> Tensor:
    return -x.square() * torch.exp(-RATE * (1 - spread(t, x)))


def flow_map(x: Tensor, start, end) -> Tensor:
    """The state at `end` of the path through x at `start`: d(1/x)/dt = exp(-3 (1 - t))."""
    passed = torch.exp(-RATE * (1 - spread(end, x))) - torch.exp(-RATE * (1 - spread(start, x)))
    return 1 / (1 / x + passed / RATE)


def exact_field() -> Field:
    return model_field(velocity)


def state(batch: int = 3) -> Tensor:
    """[batch, 1, 2, 2] starting values between 0.5 and 1.2, no two alike."""
    return torch.linspace(0.5, 1.2, batch * 4, dtype=torch.float64).reshape(batch, 1, 2, 2)


def smooth_grid(intervals: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    return end + (start - end) * time_grid(intervals, 1.3, 0.2, torch.float64)


def uneven_grid(intervals: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """A grid whose neighbouring steps differ by a factor that does not tend to 1 as it is refined.

    On smooth grids the wrong multistep weights go unnoticed, for there neighbouring steps grow equal.
    """
    times = smooth_grid(intervals, start, end)
    times[1:-1:2] -= 0.3 * (times[2::2] - times[1:-1:2])
    return times


def endpoint_error(run: Callable[[Tensor, Tensor], Tensor], times: Tensor) -> float:
    """Root-mean-square error of `run(x, times)` against the exact flow map."""
    x = state()
    return (run(x, times) - flow_map(x, times[0], times[-1])).square().mean().sqrt().item()


class Oracle:
    """The exact change of velocity along the path, in the SideNet's place, with an error `error * h` if asked for."""

    cfg_input = has_data_mean = False

    def __init__(self, anchors: int = 1, error: float = 0.0) -> None:
        self.anchors = anchors
        self.error = error

    def __call__(self, *, x: Tensor, v: Tensor, t: Tensor, h: Tensor, **_) -> Tensor:
        there = velocity(flow_map(x, t, t - h), t - h)
        return there - v + self.error * spread(h, x) * torch.cos(4 * x)

    def analytic_velocity(self, x: Tensor, t: Tensor) -> Tensor:
        raise ValueError("no data mean")


class FunctionSideNet(Oracle):
    """A function of what the solver passes, in the SideNet's place."""

    def __init__(self, function: Callable[..., Tensor], anchors: int = 1) -> None:
        super().__init__(anchors)
        self.function = function

    def __call__(self, **inputs) -> Tensor:
        return self.function(**inputs)


def seeded_multistep(step: Callable, order: int, x: Tensor, times: Tensor) -> Tensor:
    """Run a multistep method whose history is exact, so that the start-up costs it no order."""
    history = tuple((t, velocity(flow_map(x, times[0], t), t)) for t in times[: order - 1])
    x = flow_map(x, times[0], times[order - 1])
    for t0, t1 in zip(times[order - 1 : -1], times[order:], strict=True):
        x, history = step(velocity, x, t0, t1, history)
    return x


def run_named(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, times: run_baseline(name, exact_field(), x, times)


# --- a class-conditional field, and random networks -------------------------------------------------------------------


def class_velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Bounded, nonlinear, time-dependent, and different for every class; elementwise."""
    return torch.sin(2 * x + 3 * spread(t, x) + spread(y, x))


def labels(batch: int) -> tuple[Tensor, Tensor]:
    """Conditional and null classes for a batch."""
    return torch.arange(batch) % NULL, torch.full((batch,), NULL)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomise(module, std: float = 0.2, seed: int = 0):
    """Random parameters everywhere, so that no part of a network is idle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module.requires_grad_(False)


def small_sidenet(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> SideNet:
    small = {"in_channels": 2, "base_channels": 8, "embedding_dim": 8, "num_layers": 3, "num_heads": 2}
    return randomise(SideNet(SideNetConfig(**{**small, "num_classes": NULL, **changes}), dtype=dtype), seed=seed)


def small_sit(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> SiT:
    small = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2}
    sit = SiT(SiTConfig(**{**small, "num_classes": NULL, **changes}), dtype=dtype)
    table = sit.pos_embed.clone()
    randomise(sit, seed=seed).pos_embed.copy_(table)
    return sit


def observed_order(errors: list[float]) -> list[float]:
    """Slopes of the error between successive halvings of the step."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
