"""What the network is worth beside models of several sizes: SiTs on richer pictures, each with and without it.

    python -m ba_solver.lab.scale --out runs/scale                      # three small ones, half an hour on two cores
    python -m ba_solver.lab.scale --out runs/scale --pixels 64 --sizes 192x6 384x10 512x12 --backbone-steps 12000 \\
        --effort thorough --device cuda                                 # up to 58 million parameters

Every backbone is trained on drawn pictures of several shapes. For each, two SideNets are made by `ba-solver make`'s own
way, from the same recordings and at the same effort: one with a network, and one whose network adds nothing. Both are
measured on noises of their own beside UniPC and Adams-Bashforth 2 on their best grids and the learned multistep solver.
What is finished is not done again. At the end: the network's share of a guided call, also beside a SiT-XL/2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..bas_core.checkpoint import load_sidenet, load_sit
from ..bas_core.files import write_text
from ..bas_core.sidenet import SideNet, SideNetConfig
from ..bas_core.sit import SiT, SiTConfig
from ..training.backbones import Backbone, open_backbone
from ..training.demo.assets import DEMO_CFG
from ..training.efforts import with_effort
from ..training.make import MakeSettings
from ..training.measuring.reference import Paths, draw_paths
from ..training.measuring.rivals import rivals
from ..training.measuring.score import learned_multistep
from ..training.network.loop import LoopSettings
from ..training.progress import progress
from ..training.recording.record import record
from ..training.runs.samplers import Sampler, endpoint_errors, search_grid, sidenet_sampler
from ..training.train import train_from
from .benchmark import count_parameters, flops
from .demo_backbone import BackboneSettings, train_backbone
from .kept import kept, write_report
from .shapes import CLASS_NAMES, draw_shapes

CALLS = (5, 7, 10)
REPORT_SEED, SEARCH_SEED = 21_000_000, 22_000_000
# Small shapes behind the one of the class, and positions of a model along a side.
BEHIND, POSITIONS = 3, 8
HEAD = 32
WITH, WITHOUT = "BA-solver", "the same without its network"
RIVALS = ("unipc", "adams_bashforth2")


@dataclass(frozen=True)
class ScaleSettings:
    """What is trained and measured.

    Attributes:
        out: folder for backbones, recordings, SideNets, `scale.json` and `scale.md`.
        sizes: of the backbones, width x depth.
        pixels: of their pictures along a side.
        backbone_steps: of each one's training.
        effort: of `ba-solver make`.
        steps: of each network's training.
        noises: measured on.
        search_noises: on which the rivals' grids are searched.
        device: where to run.
    """

    out: Path = Path("runs/scale")
    sizes: tuple[str, ...] = ("64x3", "128x4", "192x6")
    pixels: int = 32
    backbone_steps: int = 1500
    effort: str = "standard"
    steps: int = 1500
    noises: int = 48
    search_noises: int = 12
    device: str = "cpu"


def backbone_config(size: str, pixels: int) -> SiTConfig:
    """A SiT of so many positions, whatever the pictures' size."""
    width, depth = map(int, size.split("x"))
    return SiTConfig(
        input_size=pixels,
        patch_size=pixels // POSITIONS,
        in_channels=3,
        hidden_size=width,
        depth=depth,
        num_heads=max(2, width // HEAD),
        num_classes=len(CLASS_NAMES),
    )


def trained_backbone(settings: ScaleSettings, size: str) -> Path:
    """The file of a backbone, which is trained unless it is there."""
    folder = settings.out / size
    path = folder / "sit.safetensors"
    if not (folder / "done").exists():
        loop = LoopSettings(
            steps=settings.backbone_steps,
            batch=64,
            learning_rate=2e-3,
            warmup=200,
            muon=True,
            ema=0.995,
            save_every=250,
        )
        draw = partial(draw_shapes, size=settings.pixels, behind=BEHIND)
        job = BackboneSettings(folder, loop, device=settings.device)
        train_backbone(job, backbone_config(size, settings.pixels), draw, "sit")
        write_text(folder / "done", f"{settings.backbone_steps} steps")
    return path


def recipe(settings: ScaleSettings, sit: Path, name: str, steps: int) -> MakeSettings:
    """What `ba-solver make` is told: the effort, and nothing of the SideNet's size but that it is a small one."""
    told = MakeSettings(
        backbone=f"sit:{sit}",
        guidance=(DEMO_CFG,),
        out=sit.with_name(f"{name}.safetensors"),
        effort=settings.effort,
        nfe=",".join(map(str, CALLS)),
        grid_nfe=",".join(map(str, CALLS)),
        steps=steps,
        num_layers=2,
        embedding_dim=48,
        device=settings.device,
        resume=True,
    )
    # An effort leaves alone what was asked for; that no steps were is asked for too.
    return dataclasses.replace(with_effort(told, settings.effort), steps=steps)


def errors_of(samplers: list[Sampler], paths: Paths, search: Paths) -> dict[str, dict[int, float]]:
    """Mean end-point errors by label and calls; those without runs of their own on their best grids."""
    found: dict[str, dict[int, float]] = {}
    for sampler in progress(samplers, "measure"):
        for calls in CALLS:
            shape = (1.0, 0.0)
            if sampler.given is None:
                shape = search_grid(sampler, search.field, search.noise, search.ends, calls)
            ends = sampler.sample(paths.field, paths.noise, calls, shape)
            found.setdefault(sampler.label, {})[calls] = endpoint_errors(ends, paths.ends).mean().item()
    return found


def measured(settings: ScaleSettings, backbone: Backbone, chains: Path, files: dict[str, Path]) -> dict[str, Any]:
    """Errors of everything on one backbone."""

    def field_of(rows: torch.Tensor) -> Any:
        return backbone.field(rows, DEMO_CFG)

    with torch.inference_mode():
        paths = draw_paths(backbone, field_of, REPORT_SEED, settings.noises, 192)
        search = draw_paths(backbone, field_of, SEARCH_SEED, settings.search_noises, 96)
        multistep = learned_multistep((chains,), backbone, search, DEMO_CFG, "guided")
        samplers = [sampler for sampler in rivals() if sampler.name in RIVALS]
        for label, path in files.items():
            sidenet, card = load_sidenet(path, backbone.device)
            samplers.append(dataclasses.replace(sidenet_sampler(sidenet, label=label), given=card.runs))
        return errors_of([*samplers, *([multistep] if multistep else [])], paths, search)


def one_size(settings: ScaleSettings, size: str) -> dict[str, Any]:
    """Train, make and measure for one backbone."""
    sit = trained_backbone(settings, size)
    jobs = {WITH: recipe(settings, sit, "with", settings.steps), WITHOUT: recipe(settings, sit, "without", 0)}
    backbone, chains = open_backbone(jobs[WITH]), sit.with_name("chains")
    record(jobs[WITH], jobs[WITH], chains, backbone)
    for job in jobs.values():
        if not job.out.exists():
            train_from(job, job, (chains,), job.out, job, backbone)
    sidenet, card = load_sidenet(jobs[WITH].out)
    errors = measured(settings, backbone, chains, {label: job.out for label, job in jobs.items()})
    best = {n: min(row[n] for label, row in errors.items() if label not in jobs) for n in CALLS}
    return {
        "parameters": count_parameters(load_sit(sit)),
        "residual variance left": card.evaluation["residual_variance"]["kind"],
        "errors": errors,
        "best rival / ours": {n: best[n] / errors[WITH][n] for n in CALLS},
        "the network's share": {n: 1 - errors[WITH][n] / errors[WITHOUT][n] for n in CALLS},
        "a step's SideNet over a guided call": share_of_a_call(load_sit(sit).config, sidenet.config),
    }


def share_of_a_call(sit: SiTConfig, sidenet: SideNetConfig, asked: int = 1) -> float:
    """What a step asks of the SideNet, over a guided call of the backbone; by arithmetic, so that nothing runs."""
    with torch.device("meta"):
        x, t = torch.empty(1, sit.in_channels, sit.input_size, sit.input_size), torch.empty(1)
        label = torch.zeros(1, dtype=torch.long)
        model, net = SiT(sit), SideNet(sidenet)
        told = {"cond": label if sidenet.num_classes else None}
        if sidenet.anchors == 2:
            told |= {"slope": x, "span": t}
        one = flops(lambda: net(x=x, v=x, t=t, h=t, **told))
        call = 2 * flops(lambda: model(x, t, label))
    return asked * one / call


def paper_shares() -> dict[str, float]:
    """The same beside the paper's SiT-XL/2 at 256x256, for our usual SideNet and for the published one."""
    xl = SiTConfig.named("XL/2")
    usual = MakeSettings(backbone="", out=Path("x.safetensors"))
    names = {field.name for field in dataclasses.fields(SideNetConfig)} & {f.name for f in dataclasses.fields(usual)}
    sizes = {name: getattr(usual, name) for name in names} | {"patch_size": xl.patch_size, "in_channels": 4}
    return {
        "ours, asked once a step": share_of_a_call(xl, SideNetConfig(**sizes, num_classes=1000)),
        "the published one, lobatto4": share_of_a_call(xl, SideNetConfig(), 5),
    }


def markdown(result: dict[str, Any]) -> str:
    """A table for every size, and what the network costs."""
    lines = []
    for size, one in result["sizes"].items():
        lines += [f"\n### {size}: {one['parameters']:,} parameters\n", "| | " + " | ".join(map(str, CALLS)) + " |"]
        lines.append("|---" * (len(CALLS) + 1) + "|")
        for label, row in {
            **one["errors"],
            **{k: one[k] for k in ("best rival / ours", "the network's share")},
        }.items():
            lines.append(f"| {label} | " + " | ".join(f"{row[key]:.4f}" for key in row) + " |")
        left = ", ".join(f"{kind} {value:.2f}" for kind, value in one["residual variance left"].items())
        share = one["a step's SideNet over a guided call"]
        lines.append(f"\nResidual variance left: {left}. A step's SideNet costs {100 * share:.1f} % of a guided call.")
    shares = ", ".join(f"{name} {100 * share:.2f} %" for name, share in result["SiT-XL/2"].items())
    return "\n".join([*lines, f"\nBeside a guided call of SiT-XL/2: {shares}."]) + "\n"


def run_scale(settings: ScaleSettings) -> dict[str, Any]:
    """Do all of it, and write it as JSON and Markdown."""
    key = {name: str(value) for name, value in dataclasses.asdict(settings).items() if name not in ("out", "sizes")}
    sizes = {
        size: kept(settings.out / size / "errors.json", key, partial(one_size, settings, size))
        for size in settings.sizes
    }
    result = {"sizes": sizes, "SiT-XL/2": paper_shares()}
    write_report(settings.out / "scale", result, markdown(result))
    return result


if __name__ == "__main__":
    import tyro

    run_scale(tyro.cli(ScaleSettings))
