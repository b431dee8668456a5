"""What a network gains with its budget: trained end to end on fresh noises, beside runs tuned alike without one.

    python -m ba_solver.lab.budget --out runs/budget                       # 20,000 guided calls a width, ten minutes
    python -m ba_solver.lab.budget --out runs/budget --budget 400000 --widths 0 48 96 144 --device cuda

No noise is seen twice: of each the teacher says where it ends, and the runs of 5, 7 and 10 calls, times, weights, half
calls and network together, follow the gradient of their distance from there, through all their calls. Every width
begins with the shipped times, weights by least squares, and a network: the shipped one for its own width, for others
one with zero output; 0 = none. Errors are those of averaged weights on noises of their own. Ctrl-C loses what came
after the last mark.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bas_core.checkpoint import load_sidenet
from ..bas_core.files import read_pickled_tensors, write_atomically
from ..bas_core.runs import run_over
from ..bas_core.sidenet import SideNet, SideNetConfig
from ..training.backbones import Backbone, BackboneChoice, open_backbone
from ..training.demo.assets import DEMO_CFG, SIDENET_FILE, SIT_FILE
from ..training.measuring.reference import Paths, draw_paths
from ..training.network.fresh import SMALLEST
from ..training.network.loop import averaged
from ..training.progress import say
from ..training.recording.chains import Chains
from ..training.recording.teacher import random_times, record_chain
from ..training.runs.fitting import WEIGHT_RUNS, Fitting, fit_runs
from ..training.runs.samplers import endpoint_errors
from ..training.runs.tuning import TunedRun
from .benchmark import count_parameters
from .kept import write_report
from .sidenet import CALLS

REPORT_SEED, NOISE_SEED = 8_500_000, 31_337
TEACHER_POINTS = 20
MARKS = (5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 400_000)
# Of runs and of networks; both fall as the root of the steps after the first ones.
RUN_RATE, NETWORK_RATE, WARM, FLAT = 0.02, 7e-4, 20, 120


@dataclass(frozen=True)
class BudgetSettings:
    """What is trained.

    Attributes:
        out: folder for `budget.json`, `budget.md` and the unfinished runs.
        widths: of the networks; 0 = none.
        budget: guided calls of each, those with gradients counted once.
        batch: noises a step.
        noises: measured on.
        device: where to run.
    """

    out: Path = Path("runs/budget")
    widths: tuple[int, ...] = (0, 96)
    budget: int = 20_000
    batch: int = 4
    noises: int = 96
    device: str = "cpu"


class Whole(nn.Module):
    """A network and the runs of all numbers of calls, trained together."""

    def __init__(self, network: SideNet, runs: dict[str, TunedRun]) -> None:
        super().__init__()
        self.network, self.runs = network, nn.ModuleDict(runs)

    def ends(self, backbone: Backbone, noise: Tensor, labels: Tensor) -> Iterator[tuple[int, Tensor]]:
        """By number of calls, where its run leads."""
        for calls in CALLS:
            run: Any = self.runs[str(calls)]
            yield calls, run(backbone.field(labels, DEMO_CFG), noise, self.network, backbone.start)


def network_of(width: int) -> SideNet:
    """The shipped network for its own width, and for another a fresh one with zero output that knows the mean; without
    width one that is not to be trained."""
    shipped = load_sidenet(SIDENET_FILE, dtype=torch.float32)[0]
    if width == shipped.config.base_channels:
        return shipped.requires_grad_(True)
    sizes = SMALLEST if not width else {"base_channels": width}
    config: Any = {**vars(shipped.config), **sizes}
    torch.manual_seed(0)
    network = SideNet(SideNetConfig(**config)).zero_output()
    network.data_mean.copy_(shipped.data_mean)
    return network.requires_grad_(bool(width))


def teacher_ends(backbone: Backbone, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, Chains]:
    """Noises, labels and the teacher's runs from them."""
    noise = torch.randn((count, *backbone.shape), generator=generator).to(backbone.device)
    labels = torch.randint(backbone.conditions, (count,), generator=generator)
    times = random_times(TEACHER_POINTS, generator)
    with torch.no_grad():
        states, velocities = record_chain(backbone.field(labels, DEMO_CFG), noise, times)
    return noise, labels, Chains(times.expand(count, -1), states, velocities, labels)


def begun(backbone: Backbone, width: int) -> Whole:
    """The shipped times, with weights by least squares for this network."""
    network = network_of(width).to(backbone.device)
    noise, labels, chains = teacher_ends(backbone, torch.Generator().manual_seed(NOISE_SEED - 1), WEIGHT_RUNS)
    truth = partial(chains.truth, torch.arange(WEIGHT_RUNS))
    fitting = Fitting(network, backbone.field(labels, DEMO_CFG), noise, truth)
    shipped = load_sidenet(SIDENET_FILE)[1].runs
    with torch.no_grad():
        runs = fit_runs({n: run_over(shipped[n].times, knows_mean=True) for n in CALLS}, fitting)
    return Whole(network, {str(n): TunedRun(run) for n, run in runs.items()}).to(backbone.device)


def train_width(settings: BudgetSettings, backbone: Backbone, paths: Paths, width: int) -> list[dict[str, Any]]:
    """A row a mark: calls spent, and the errors by number of calls, measured on `paths`."""
    labels = torch.arange(settings.noises) % backbone.conditions
    whole = begun(backbone, width)
    average = averaged(whole, 0.99)
    groups = [{"params": list(whole.runs.parameters()), "peak": RUN_RATE, "weight_decay": 0.0}]
    groups += [{"params": list(whole.network.parameters()), "peak": NETWORK_RATE}] if width else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    path = settings.out / f"width{width}.pt"
    state: dict[str, Any] = {"step": 0, "rows": []}
    if path.exists():
        state = read_pickled_tensors(path)
        for name, part in (("whole", whole), ("average", average), ("optimizer", optimizer)):
            part.load_state_dict(state[name])
    a_step = settings.batch * (TEACHER_POINTS + sum(CALLS))

    def measure(model: Whole) -> dict[int, float]:
        with torch.inference_mode():
            found = model.ends(backbone, paths.noise, labels)
            return {calls: endpoint_errors(x, paths.ends).mean().item() for calls, x in found}

    if not state["step"]:
        state["rows"].append({"calls": 0, "errors": measure(whole)})
    while state["step"] * a_step < settings.budget:
        step = state["step"]
        rate = min(1.0, (step + 1) / WARM) * min(1.0, (FLAT / (step + 1)) ** 0.5)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        advance(whole, optimizer, backbone, settings.batch, step)
        average.update_parameters(whole)
        state["step"] += 1
        before, spent = step * a_step, state["step"] * a_step
        if any(before < mark <= spent for mark in (*MARKS, settings.budget)):
            trained: Any = copy.deepcopy(average.module)
            state["rows"].append({"calls": spent, "errors": measure(trained)})
            say(f"width {width}, {spent:,} calls: {state['rows'][-1]['errors']}")
            parts = {"whole": whole.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            write_atomically(path, partial(torch.save, state | parts))
    rows: list[dict[str, Any]] = state["rows"]
    return rows


def advance(whole: Whole, optimizer: torch.optim.Optimizer, backbone: Backbone, batch: int, step: int) -> None:
    """One step on fresh noises; the gradients of runs and network are clipped apart."""
    noise, labels, chains = teacher_ends(backbone, torch.Generator().manual_seed(NOISE_SEED + step), batch)
    ends = chains.truth(torch.arange(batch), torch.tensor(0.0))
    optimizer.zero_grad()
    for _, x in whole.ends(backbone, noise, labels):
        endpoint_errors(x, ends).mean().backward()
    for part in (*whole.runs.values(), whole.network):
        nn.utils.clip_grad_norm_(part.parameters(), 1.0)
    optimizer.step()


def run_budget(settings: BudgetSettings) -> dict[str, Any]:
    """All widths; written as JSON and Markdown."""
    backbone = open_backbone(BackboneChoice(backbone=f"sit:{SIT_FILE}", guidance=(DEMO_CFG,), device=settings.device))
    with torch.inference_mode():
        paths = draw_paths(backbone, lambda rows: backbone.field(rows, DEMO_CFG), REPORT_SEED, settings.noises, 192)
    result: dict[str, Any] = {}
    lines = ["| width | parameters | guided calls | " + " | ".join(map(str, CALLS)) + " |", "|---" * 6 + "|"]
    for width in settings.widths:
        size = count_parameters(network_of(width)) if width else 0
        rows = train_width(settings, backbone, paths, width)
        result[str(width)] = {"parameters": size, "rows": rows}
        for row in rows:
            errors = " | ".join(f"{error:.4f}" for error in row["errors"].values())
            lines.append(f"| {width} | {size:,} | {row['calls']:,} | {errors} |")
    write_report(settings.out / "budget", result, "\n".join(lines))
    return result


if __name__ == "__main__":
    import tyro

    run_budget(tyro.cli(BudgetSettings))
