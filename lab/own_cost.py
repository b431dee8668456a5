"""What the solver itself costs: time a step, transfers, and memory by number of steps, for a model that costs nothing.

    python -m ba_solver.lab.own_cost
    python -m ba_solver.lab.own_cost --shape 64,3,32,32 --sidenet weights/demo_sidenet.safetensors

Beside k-diffusion's Euler and DPM-Solver++(2M), in turn in one run, on the CPU. Transfers a step are counted on a
stand-in of an accelerator (`counted_device.py`); memory is the peak by number of steps, in states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..bas_core.checkpoint import load_sidenet
from ..bas_core.grids import time_grid
from ..bas_core.guidance import CFGMode, Field, Guidance
from ..bas_core.prediction import SideNetProtocol
from ..bas_core.schedule import Schedule
from ..bas_core.sidenet import SideNet, SideNetConfig
from ..bas_core.solver import solve
from ..training.progress import say
from .cost import peak_bytes
from .counted_device import CountedDevice

Model = Callable[[Tensor, Tensor], Tensor]
Sample = Callable[[Tensor, int], Tensor]
GUIDANCE = Guidance(2.0)


# --- k-diffusion's formulas, with a denoising model(x, sigma [B]) -----------------------------------------------------


def sample_euler(model: Model, x: Tensor, sigmas: Tensor) -> Tensor:
    """Karras et al. (2022), algorithm 2 without noise; k-diffusion's `sample_euler`."""
    ones = x.new_ones([len(x)])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones)
        d = (x - denoised) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


def sample_dpmpp_2m(model: Model, x: Tensor, sigmas: Tensor) -> Tensor:
    """Lu et al. (2022), algorithm 2; k-diffusion's `sample_dpmpp_2m`."""
    ones, old = x.new_ones([len(x)]), None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones)
        t, t_next = -sigmas[i].log(), -sigmas[i + 1].log()
        h = t_next - t
        guess = denoised
        if old is not None and i + 2 < len(sigmas):
            r = (t + sigmas[i - 1].log()) / h
            guess = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old
        x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * guess
        old = denoised
    return x


# --- what is measured -------------------------------------------------------------------------------------------------


def k_diffusion(sampler: Callable[[Model, Tensor, Tensor], Tensor]) -> Sample:
    """A sampler of k-diffusion on a uniform grid, with a model that returns what it has."""

    def sample(x: Tensor, steps: int) -> Tensor:
        return sampler(lambda x, sigma: x, x, time_grid(steps).to(x.device))

    return sample


def free_field(x: Tensor, guidance: Guidance, mode: CFGMode) -> Field:
    """Velocities that are there already: a field of two branches, or of one without guidance."""
    branches = 2 if guidance.scale != 1 else 1
    v = x.expand(branches, *x.shape)
    return Field(lambda x, t, k: v[:k], (None,) * branches, guidance, combined=mode == "combined")


def coefficients(steps: int) -> Schedule:
    """A schedule whose coefficients weight all velocities so far, as fitted ones do."""
    lengths = [2 + i // 2 + 2 * (i % 2) for i in range(2 * steps - 1)]
    return Schedule(time_grid(steps).tolist(), [[1e-3 * (j + 1) for j in range(n)] for n in lengths], rule="lobatto2")


def conditional_only(steps: int) -> Schedule:
    """The same with two conditional-only calls, as fitted ones have."""
    rows: list[list[float]] = [[] for _ in range(steps)]
    rows[-3], rows[-1] = [1e-3] * (2 * (steps - 3)), [1e-3] * (2 * (steps - 1) - 1)
    whole = coefficients(steps)
    return Schedule(whole.times, whole.coefficients, rows, rule=whole.rule)


def ours(
    sidenet: SideNetProtocol | None = None,
    schedule: Callable[[int], Schedule | Tensor] = time_grid,
    guidance: Guidance = Guidance(),  # noqa: B008
    mode: CFGMode = "per_branch",
    rule: str | None = None,
) -> Sample:
    """The bi-anchor solver on a free field."""
    made: dict[int, Schedule | Tensor] = {}

    def sample(x: Tensor, steps: int) -> Tensor:
        over = made[steps] if steps in made else made.setdefault(steps, schedule(steps))
        return solve(free_field(x, guidance, mode), sidenet, x, over, rule=rule)

    return sample


def samplings(sidenet: SideNetProtocol) -> dict[str, Sample]:
    """What is measured, by name; the first two are k-diffusion's."""
    return {
        "Euler (k-diffusion)": k_diffusion(sample_euler),
        "DPM++ 2M (k-diffusion)": k_diffusion(sample_dpmpp_2m),
        "no network": ours(),
        "no network, lobatto2": ours(rule="lobatto2"),
        "no network, coefficients": ours(schedule=coefficients),
        "no network, CFG per branch": ours(guidance=GUIDANCE),
        "no network, CFG combined": ours(guidance=GUIDANCE, mode="combined"),
        "… with conditional-only calls": ours(schedule=conditional_only, guidance=GUIDANCE, mode="combined"),
        "network": ours(sidenet),
        "network, coefficients": ours(sidenet, coefficients),
        "network, CFG per branch": ours(sidenet, guidance=GUIDANCE),
        "network, CFG combined": ours(sidenet, guidance=GUIDANCE, mode="combined"),
        "network, conditional-only calls": ours(sidenet, conditional_only, GUIDANCE, "combined"),
    }


def seconds_a_step(samples: Sequence[Sample], x: Tensor, steps: int, repeats: int) -> list[float]:
    """Of each sampling the least of some, made in turn, over its steps."""
    least = [float("inf")] * len(samples)
    for repeat in range(repeats + 1):
        for i, sample in enumerate(samples):
            began = time.perf_counter()
            sample(x, steps)
            if repeat:  # the first warms up
                least[i] = min(least[i], (time.perf_counter() - began) / steps)
    return least


def transfers_a_step(sample: Sample, x: Tensor, steps: int) -> tuple[float, float]:
    """To the host, and to the device; a network in the sampling has to be there (`CountedDevice.put_module`)."""
    with torch.no_grad(), CountedDevice() as device:
        state = device.put(x)
        sample(state, steps)  # which sends tables that stay
        to_host, to_device = device.to_host, device.to_device
        sample(state, steps)
    return (device.to_host - to_host) / steps, (device.to_device - to_device) / steps


@dataclass(frozen=True, kw_only=True)
class OwnCostSettings:
    """Measure what the solver itself costs.

    Attributes:
        shape: of the states, B,C,H,W.
        sidenet: file of a SideNet; left out, a small untrained one.
        steps: of the samplings that are timed.
        memory_steps: of those whose memory is measured, separated by commas.
        repeats: of a timing; the least counts.
    """

    shape: str = "1,16,64,64"
    sidenet: Path | None = None
    steps: int = 20
    memory_steps: str = "5,10,20,40"
    repeats: int = 20


def small_network(channels: int) -> SideNet:
    """An untrained SideNet of the size that *full* makes for a small model."""
    config = SideNetConfig(
        in_channels=channels, base_channels=24, embedding_dim=16, num_layers=3, num_classes=0, anchors=2,
        architecture="local",
    )  # fmt: skip
    return SideNet(config).eval().requires_grad_(False)


def run(settings: OwnCostSettings) -> str:
    """Measure, and return the table in Markdown."""
    shape = tuple(map(int, settings.shape.split(",")))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    path = settings.sidenet

    def make() -> SideNet:
        return small_network(shape[1]) if path is None else load_sidenet(path)[0]

    measured, counts = samplings(make()), [int(n) for n in settings.memory_steps.split(",")]
    with torch.inference_mode():
        seconds = seconds_a_step(list(measured.values()), x, settings.steps, settings.repeats)
        memory = [
            [peak_bytes(lambda s=s, n=n: s(x, n), x.device) / (4 * x.numel()) for n in counts]  # type: ignore[misc]
            for s in measured.values()
        ]
    network = make()
    with CountedDevice() as device:
        device.put_module(network)
    columns = ["", "µs a step", "over Euler", "over DPM++ 2M", "to host", "to device", *(f"{n} steps" for n in counts)]
    lines = [" | ".join(columns), "|".join(["---"] * len(columns))]
    for i, (name, sample) in enumerate(samplings(network).items()):
        times = [f"{1e6 * seconds[i]:.0f}", f"{seconds[i] / seconds[0]:.2f}", f"{seconds[i] / seconds[1]:.2f}"]
        sent = [f"{count:.2f}" for count in transfers_a_step(sample, x, settings.steps)]
        lines.append(" | ".join([name, *times, *sent, *(f"{peak:.1f}" for peak in memory[i])]))
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    import tyro

    say(run(tyro.cli(OwnCostSettings)))
