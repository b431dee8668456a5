"""Record the demo backbone and train its SideNets; the best on held-out noises becomes the shipped one.

    python -m ba_solver.training.demo.sidenet --out runs/demo_sidenet

records chains once (later runs reuse them), trains a one-anchor and a two-anchor SideNet, rolls both out on held-out
noises, and writes the better one as `demo_sidenet.safetensors`. Ctrl-C saves; the same command goes on. About an hour
on two cores.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...bas_core.checkpoint import SideNetCard, fingerprint, load_sit, save_sidenet, write_text
from ...bas_core.sidenet import SideNet, SideNetConfig
from ...bas_core.sit import SiT
from ..chains import LAST_TIME, Chains, FieldOf, load_chains, record_chains, save_chains
from ..evaluate import UNIFORM, converged_reference, endpoint_errors, search_grid, sidenet_sampler
from ..train import TrainSettings, train_sidenet
from .assets import DEMO_CFG, SIT_FILE, demo_noise, guided_field

VALIDATION_SEED = 3_000_000
VALIDATION_CALLS = (5, 7, 10)
HELD_OUT = 64
# The first interval of a run of 4 calls or more on the grids that are drawn lies above this time, or nearly so.
OPENING_END = 0.69


@dataclass(frozen=True)
class DemoSideNetSettings:
    """How the demo SideNet is made.

    Attributes:
        out: folder for chains, unfinished runs and results.
        backbone: the demo SiT.
        chains: sampling runs to record, held-out ones included.
        points: points a chain, and as many guided backbone calls.
        openings, opening_points: more runs, of which only the stretch from noise to `OPENING_END` is recorded.
        train: see `TrainSettings`.
        seed: of the chains.
    """

    out: Path = Path("runs/demo_sidenet")
    backbone: Path = SIT_FILE
    chains: int = 1024
    points: int = 48
    openings: int = 12288
    opening_points: int = 10
    train: TrainSettings = field(default_factory=TrainSettings)
    seed: int = 1


def demo_sidenet_config(anchors: int) -> SideNetConfig:
    """Under a tenth of the demo backbone's parameters and compute."""
    return SideNetConfig(
        in_channels=3,
        base_channels=96,
        embedding_dim=48,
        num_layers=2,
        num_classes=10,
        patch_size=4,
        kernel_size=1,
        anchors=anchors,
        body="tokens",
    )


def recorded(path: Path, sit: SiT, runs: int, points: int, until: float, seed: int) -> Chains:
    """The chains in a file, recorded first if it is not there.

    Raises:
        ValueError: the file holds other chains than asked for.
    """
    about: dict[str, object] = {
        "backbone": fingerprint(sit.state_dict()),
        "cfg": DEMO_CFG,
        "chains": runs,
        "points": points,
        "until": until,
        "seed": seed,
    }
    if path.exists():
        chains, found = load_chains(path)
        if found != about:
            raise ValueError(f"{path} was recorded with {found}, but {about} is asked for. Choose another --out.")
        return chains
    chains = record_chains(field_of(sit), torch.arange(runs) % 10, (3, 32, 32), points, seed, until)
    save_chains(path, chains, about)
    return chains


def field_of(sit: SiT) -> FieldOf:
    """Labels to the guided field that the SideNet is trained on."""
    return lambda labels: guided_field(sit, labels, DEMO_CFG)


def rollout_errors(sit: SiT, sidenet: SideNet, count: int = 24) -> dict[str, dict[str, float]]:
    """End-point errors of the sampler on validation noises, on the uniform grid and on the best of the family."""
    noise, labels = demo_noise(VALIDATION_SEED, count)
    sampler = sidenet_sampler(sidenet)
    errors: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        velocity = guided_field(sit, labels)
        reference = converged_reference(velocity, noise)
        for calls in VALIDATION_CALLS:
            best = search_grid(sampler, velocity, noise, reference, calls)
            for name, shape in (("uniform", UNIFORM), ("best", best)):
                x = sampler.sample(velocity, noise, calls, shape)
                errors.setdefault(name, {})[str(calls)] = round(endpoint_errors(x, reference).mean().item(), 5)
    return errors


def make_demo_sidenet(settings: DemoSideNetSettings) -> Path:
    """Record, train both kinds, compare, and write the better one; returns its path."""
    sit, out = load_sit(settings.backbone), settings.out
    start = time.perf_counter()
    whole = recorded(out / "chains.safetensors", sit, settings.chains, settings.points, LAST_TIME, settings.seed)
    openings = recorded(
        out / "openings.safetensors", sit, settings.openings, settings.opening_points, OPENING_END, settings.seed + 1
    )
    chains, held_out = whole.split(HELD_OUT)
    comparison: dict[str, Any] = {}
    trained: dict[str, SideNet] = {}
    for anchors in (1, 2):
        name = f"{anchors} anchor"
        trained[name], left = train_sidenet(
            demo_sidenet_config(anchors), chains, held_out, settings.train, out / f"run_{anchors}_anchor.pt", openings
        )
        errors = rollout_errors(sit, trained[name])
        comparison[name] = {"validation_error": errors, "residual_variance": {"kind": left}}
        print(f"{name}: {json.dumps(comparison[name])}")
    write_text(out / "comparison.json", json.dumps(comparison, indent=1))
    better = min(comparison, key=lambda name: sum(comparison[name]["validation_error"]["best"].values()))
    card = SideNetCard(
        velocity="guided",
        guidance_range=(DEMO_CFG, DEMO_CFG),
        backbone={"name": "demo SiT", "kind": "sit", "fingerprint": fingerprint(sit.state_dict())},
        training={
            "objective": "all pairs, relative to the straight line",
            "chains": len(chains),
            "openings": len(openings),
            "backbone_calls": settings.chains * settings.points + settings.openings * settings.opening_points,
            "settings": asdict(settings.train),
            "seconds": round(time.perf_counter() - start),
            "torch": torch.__version__,
        },
        evaluation=comparison[better],
        licence="MIT",
    )
    path = out / "demo_sidenet.safetensors"
    save_sidenet(path, trained[better], card)
    return path


if __name__ == "__main__":
    import tyro

    make_demo_sidenet(tyro.cli(DemoSideNetSettings))
