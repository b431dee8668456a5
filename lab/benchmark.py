"""The project's figures on the demo model, in one run: errors on uniform and best grids, cost, memory, accuracy.

    python -m ba_solver.lab.benchmark --out runs/benchmark            # about ten minutes on two cores
    python -m ba_solver.lab.benchmark --out runs/benchmark --search all         # first search the best grids
    python -m ba_solver.lab.benchmark --out runs/benchmark --search unipc       # of one solver alone

The search uses noises of its own and writes `weights/demo_grids.json`; the reported noises are never searched on.
With it, the error tables go into the shipped SideNet's file too, where `ba-solver info` and SideNet Info show them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..bas_core.baselines import run_baseline
from ..bas_core.checkpoint import save_sidenet
from ..bas_core.files import fingerprint, write_text
from ..bas_core.grids import time_grid
from ..bas_core.guidance import Field
from ..bas_core.runs import FittedRun
from ..bas_core.sidenet import SideNet, SideNetConfig
from ..bas_core.sit import SiT, SiTConfig
from ..bas_core.solver import solve
from ..bas_core.weighting import WeightedSideNet
from ..training.backbones import BackboneChoice, open_backbone
from ..training.demo.assets import (
    CLASSIFIER_FILE,
    DEMO_CFG,
    GRIDS_FILE,
    SIDENET_FILE,
    SIT_FILE,
    Demo,
    Grids,
    demo_noise,
    guided_field,
    load_demo,
)
from ..training.measuring.reference import reference_paths
from ..training.measuring.rivals import (
    converged_reference,
    line_up,
    measure,
    more_rivals,
    rivals,
    unipc,
    with_first_call_saved,
)
from ..training.measuring.score import search_shapes
from ..training.progress import progress
from ..training.runs.samplers import Sampler, endpoint_errors, sidenet_sampler
from .classifier import accuracy, load_classifier
from .kept import kept, write_report

SEARCH_SEED = 2_000_000
REPORT_SEED = 4_000_000
# Of the paths that grids are searched and step weights are fitted on.
REFERENCE_POINTS = 192


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured.

    Attributes:
        out: folder for `benchmark.json` and `benchmark.md`.
        search: names of the solvers whose best grids are searched anew and stored with the package; or all.
            BA-solver's are in its SideNet's file.
        nfe: numbers of backbone calls.
        noises: noises a seed.
        seeds: independent sets of noises that are reported.
        search_noises: noises that the grids are searched on.
        large: also time a random SiT-XL/2 with a paper-sized SideNet (wants a GPU).
        device: where to run.
    """

    out: Path = Path("runs/benchmark")
    search: tuple[str, ...] = ()
    nfe: tuple[int, ...] = (4, 5, 7, 10)
    noises: int = 64
    seeds: int = 3
    search_noises: int = 24
    large: bool = False
    device: str = "cpu"


def told_the_mean(sidenet: SideNet) -> list[Sampler]:
    """What the saved first call is worth by itself: the two best rivals, given it too."""
    best = next(sampler for sampler in rivals() if sampler.name == "unipc")
    line = WeightedSideNet(sidenet, lambda t: 0.0)  # of the SideNet nothing but the mean
    return [
        with_first_call_saved(best, sidenet),
        sidenet_sampler(line, "predictor_corrector_mean", "AB2 + trapezoid, told the mean"),
    ]


def search_grids(settings: BenchmarkSettings, demo: Demo, samplers: list[Sampler]) -> Demo:
    """The demo with the asked solvers' best grids on the search noises, which are written; ours are in its file."""
    backbone = open_backbone(BackboneChoice(backbone=f"sit:{SIT_FILE}", device=settings.device))
    asked = [
        sampler for sampler in samplers if {"all", sampler.name} & set(settings.search) and sampler.name != "ba_solver"
    ]
    grids: Grids = dict(demo.grids)
    with torch.inference_mode():
        noise, labels = (part.to(settings.device) for part in demo_noise(SEARCH_SEED, settings.search_noises))
        paths = reference_paths(demo.field(labels), noise, backbone, REFERENCE_POINTS)
        shapes = search_shapes([(sampler, calls) for sampler in asked for calls in settings.nfe], paths)
    for (name, calls), shape in shapes.items():
        grids[name] = {**grids.get(name, {}), calls: shape}
    write_text(GRIDS_FILE, json.dumps({"cfg": DEMO_CFG, "grids": grids}, indent=1))
    return replace(demo, grids=grids)


def errors_of_seed(settings: BenchmarkSettings, demo: Demo, samplers: list[Sampler], seed: int) -> dict[str, Any]:
    """Mean end-point errors from one set of noises, by grid, label and calls; and how far the reference may be off."""
    noise, labels = (part.to(settings.device) for part in demo_noise(REPORT_SEED + seed, settings.noises))
    field = demo.field(labels)
    errors: dict[str, float] = {}
    with torch.inference_mode():
        reference = converged_reference(field, noise)
        off = endpoint_errors(reference, converged_reference(field, noise, 1e-6)).mean().item() if seed == 0 else 0.0
        for sampler, calls, grid in progress(line_up(samplers, settings.nfe), f"seed {seed}"):
            on_grid, shape = demo.on_grid(sampler, calls, grid)
            row, _ = measure(on_grid, field, noise, reference, calls, shape, grid)
            errors[f"{grid}/{sampler.label}/{calls}"] = row.error
    return {"reference_error": off, "errors": errors}


def error_tables(settings: BenchmarkSettings, demo: Demo, samplers: list[Sampler]) -> dict[str, Any]:
    """Mean end-point error of every sampler by grid and calls, with the spread over seeds."""
    key = {
        "nfe": settings.nfe,
        "noises": settings.noises,
        "grids": demo.grids,
        "ours": {calls: asdict(run) for calls, run in demo.card.runs.items()},
        "sidenet": fingerprint(demo.sidenet.state_dict()),
    }
    found: dict[str, list[float]] = {}
    convergence = 0.0
    for seed in range(settings.seeds):
        path = settings.out / f"seed{seed}.json"
        one = kept(path, key, partial(errors_of_seed, settings, demo, samplers, seed))
        convergence = max(convergence, one["reference_error"])
        for name, error in one["errors"].items():
            found.setdefault(name, []).append(error)
    return {
        "reference_error": convergence,
        "errors": {k: {"mean": statistics.fmean(v), "sd": statistics.pstdev(v)} for k, v in found.items()},
    }


def error_rows(tables: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables as a SideNet's file keeps them."""
    rows = []
    for key, found in tables["errors"].items():
        grid, label, calls = key.split("/")
        rows.append({"label": label, "grid": grid, "calls": int(calls), "error": found["mean"], "spread": found["sd"]})
    return rows


def store_errors(tables: dict[str, Any], settings: BenchmarkSettings, demo: Demo) -> None:
    """Write the error tables into the shipped SideNet's file."""
    evaluation = {
        **{k: v for k, v in demo.card.evaluation.items() if k == "residual_variance"},
        "guidance": DEMO_CFG,
        "noises": settings.noises * settings.seeds,
        "endpoint_error": error_rows(tables),
    }
    save_sidenet(SIDENET_FILE, demo.sidenet, replace(demo.card, evaluation=evaluation))


def compute_share(demo: Demo) -> dict[str, float]:
    """Parameters and multiply-adds of the SideNet over the backbone's."""
    noise, labels = demo_noise(0, 8)
    field = guided_field(demo.sit, labels)
    with torch.inference_mode():
        call = flops(lambda: field.velocity(noise, 0.5))
        t = torch.full((8,), 0.5)
        one = flops(lambda: demo.sidenet(noise, noise, t, t / 5, labels))
        run = flops(lambda: solve(field, demo.sidenet, noise, time_grid(7)))
    return {
        "parameters": count_parameters(demo.sidenet) / count_parameters(demo.sit),
        "backbone_parameters": count_parameters(demo.sit),
        "sidenet_parameters": count_parameters(demo.sidenet),
        "one_sidenet_call_over_one_guided_call": one / call,
        "all_sidenet_calls_of_7_steps_over_7_guided_calls": (run - 7 * call) / (7 * call),
    }


def count_parameters(module: torch.nn.Module) -> int:
    """Numbers in a module's parameters."""
    return sum(p.numel() for p in module.parameters())


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of some work, which may be on the meta device."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Median wall time of `work`, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Largest sum of live tensor memory that `work` adds at any one time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def cost(field: Field, sidenet: SideNet, noise: Tensor, run: FittedRun) -> dict[str, float]:
    """Wall time and peak memory of a run beside UniPC's and Euler's on as many calls, for the same batch."""
    times, device = time_grid(round(run.cost)), noise.device
    with torch.inference_mode():
        euler = median_seconds(lambda: run_baseline("euler", field, noise, times), device)
        theirs = median_seconds(lambda: unipc(field, noise, times), device)
        ours = median_seconds(lambda: solve(field, sidenet, noise, run), device)
        memory_euler = peak_bytes(lambda: run_baseline("euler", field, noise, times), device)
        memory_ours = peak_bytes(lambda: solve(field, sidenet, noise, run), device)
        memory_chunked = peak_bytes(lambda: solve(field, sidenet, noise, run, chunk=len(noise)), device)
    return {
        "calls": run.cost,
        "batch": len(noise),
        "seconds_euler": euler,
        "seconds_unipc": theirs,
        "seconds_ba_solver": ours,
        "time_over_unipc": ours / theirs,
        "peak_memory_over_euler": memory_ours / memory_euler,
        "peak_memory_over_euler_chunked": memory_chunked / memory_euler,
        "peak_mib_euler": memory_euler / 2**20,
    }


def large_cost(device: torch.device) -> dict[str, float]:
    """The same for a random SiT-XL/2 at 256x256 with the published SideNet, in bfloat16, in guided mode."""
    sit = SiT(SiTConfig.named("XL/2"), device=device, dtype=torch.bfloat16).eval().requires_grad_(False)
    sidenet = SideNet(SideNetConfig(), device=device, dtype=torch.bfloat16).eval().requires_grad_(False)
    batch = 64
    labels = torch.arange(batch, device=device)
    noise = torch.randn(batch, 4, 32, 32, device=device)
    return cost(guided_field(sit, labels, 1.5), sidenet, noise, FittedRun(time_grid(7)))


def sample_accuracy(demo: Demo, device: torch.device, count: int = 500) -> dict[str, float]:
    """Share of samples that the classifier takes for the asked class, by the solver that made them."""
    classifier = load_classifier(CLASSIFIER_FILE).to(device)
    noise, labels = (part.to(device) for part in demo_noise(REPORT_SEED + 1000, count))
    parts: dict[str, list[Tensor]] = {"converged": [], "ba_solver_5": [], "ba_solver_7": [], "euler_7": []}
    with torch.inference_mode():
        for x, y in progress(list(zip(noise.split(100), labels.split(100), strict=True)), "accuracy"):
            field = demo.field(y)
            ours = sidenet_sampler(demo.sidenet)
            parts["converged"].append(converged_reference(field, x, 1e-4))
            parts["euler_7"].append(run_baseline("euler", field, x, time_grid(7)))
            for calls in (5, 7):
                on_grid, shape = demo.on_grid(ours, calls, "best")
                parts[f"ba_solver_{calls}"].append(on_grid.sample(field, x, calls, shape))
    return {name: accuracy(classifier, torch.cat(images), labels) for name, images in parts.items()}


def markdown(result: dict[str, Any], settings: BenchmarkSettings) -> str:
    """The tables as Markdown."""
    errors = result["tables"]["errors"]
    labels = list(dict.fromkeys(key.split("/")[1] for key in errors))
    lines = []
    for grid in ("uniform", "best"):
        lines += [f"\n### {grid} grid\n", "| solver | " + " | ".join(map(str, settings.nfe)) + " |"]
        lines.append("|---" * (len(settings.nfe) + 1) + "|")
        for label in labels:
            cells = [errors[f"{grid}/{label}/{calls}"] for calls in settings.nfe]
            lines.append(f"| {label} | " + " | ".join(f"{c['mean']:.4f} ± {c['sd']:.4f}" for c in cells) + " |")
    long = errors["uniform/Euler/100"]
    lines.append(f"\nEuler, 100 calls: {long['mean']:.4f} ± {long['sd']:.4f}")
    lines += [
        f"\n### {name}\n\n```json\n{json.dumps(result[name], indent=1)}\n```" for name in result if name != "tables"
    ]
    return "\n".join(lines) + "\n"


def run_benchmark(settings: BenchmarkSettings) -> dict[str, Any]:
    """Measure everything, and write it as JSON and Markdown."""
    device = torch.device(settings.device)
    demo = load_demo(device)
    others = [*rivals(), *more_rivals(), *told_the_mean(demo.sidenet)]
    if settings.search:
        demo = search_grids(settings, demo, [*others, sidenet_sampler(demo.sidenet)])
    samplers = [*others, sidenet_sampler(demo.sidenet)]
    noise, labels = (part.to(device) for part in demo_noise(REPORT_SEED, settings.noises))
    result: dict[str, Any] = {
        "settings": {k: str(v) for k, v in asdict(settings).items()},
        "tables": error_tables(settings, demo, samplers),
        "size": compute_share(load_demo()),
        "cost": cost(demo.field(labels), demo.sidenet, noise, demo.card.runs[7]),
        "accuracy": sample_accuracy(demo, device),
    }
    if settings.search:
        store_errors(result["tables"], settings, demo)
    if settings.large:
        result["cost_sit_xl_2"] = large_cost(device)
    text = markdown(result, settings)
    write_report(settings.out / "benchmark", result, text)
    return result


if __name__ == "__main__":
    import tyro

    run_benchmark(tyro.cli(BenchmarkSettings))
