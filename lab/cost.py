"""Time and memory of a sampling with a SideNet, beside Euler's and UniPC's with as many model calls."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from ..bas_core.grids import time_grid
from ..bas_core.guidance import Field
from ..bas_core.schedule import Schedule
from ..bas_core.sidenet import SideNet
from ..bas_core.solver import solve
from ..training.baselines import run_baseline

STEPS = 7


def sidenet_share(field: Field, sidenet: SideNet, noise: Tensor) -> float:
    """Floating-point operations of the SideNet, evaluated once a step, over those of the model calls."""
    with torch.inference_mode():
        with FlopCounterMode(display=False) as model:
            field.velocity(noise, 0.5)
        with FlopCounterMode(display=False) as sampling:
            solve(field, sidenet, noise, time_grid(STEPS), rule="lobatto2")
    return sampling.get_total_flops() / (STEPS * model.get_total_flops()) - 1


def median_seconds(sample: Callable[[], Tensor]) -> float:
    """Median wall time of seven samplings, after one to warm up; `Timer` waits for a GPU."""
    timer = Timer("sample()", globals={"sample": sample}, num_threads=torch.get_num_threads())
    return statistics.median([timer.timeit(1).median for _ in range(8)][1:])


def peak_bytes(sample: Callable[[], Tensor], device: torch.device) -> int:
    """Largest sum of live tensor memory that a sampling adds at any one time."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        sample()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        sample()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes), default=0)


def cost(field: Field, sidenet: SideNet, noise: Tensor, schedule: Schedule) -> dict[str, float]:
    """Wall time and peak memory of a sampling from noise [B, C, *spatial] by a schedule; the other solvers get a
    uniform grid of as many model calls."""
    times, device = time_grid(round(schedule.nfe)) * schedule.grid[0], noise.device
    samplings: dict[str, Callable[[], Tensor]] = {
        "euler": lambda: run_baseline("euler", field, noise, times),
        "unipc": lambda: run_baseline("unipc", field, noise, times),
        "ba_solver": lambda: solve(field, sidenet, noise, schedule),
    }
    with torch.inference_mode():
        seconds = {name: median_seconds(sample) for name, sample in samplings.items()}
        memory = {name: peak_bytes(samplings[name], device) for name in ("euler", "ba_solver")}
        return {
            "nfe": schedule.nfe,
            "batch": len(noise),
            **{f"seconds_{name}": value for name, value in seconds.items()},
            "time_over_unipc": seconds["ba_solver"] / seconds["unipc"],
            "peak_memory_over_euler": memory["ba_solver"] / memory["euler"],
            "sidenet_flops_over_model": sidenet_share(field, sidenet, noise),
        }
