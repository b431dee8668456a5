"""Record the demo backbone and train its SideNets; the best on held-out noises becomes the shipped one.

    python -m ba_solver.training.demo.sidenet --out runs/demo_sidenet

records chains once (later runs reuse them), trains a one-anchor and a two-anchor SideNet, rolls both out on held-out
noises, and writes `demo_sidenet.safetensors`. Ctrl-C saves; the same command goes on. About half an hour on two cores.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ...bas_core.checkpoint import SideNetCard, fingerprint, load_sit, save_sidenet, write_text
from ...bas_core.sidenet import SideNet, SideNetConfig
from ...bas_core.sit import SiT
from ..chains import Chains, load_chains, record_chains, save_chains
from ..evaluate import UNIFORM, converged_reference, endpoint_errors, search_grid, sidenet_sampler
from ..train import TrainSettings, train_sidenet
from .assets import DEMO_CFG, SIT_FILE, demo_noise, guided_field

VALIDATION_SEED = 3_000_000
VALIDATION_CALLS = (5, 7, 10)
HELD_OUT = 64


@dataclass(frozen=True)
class DemoSideNetSettings:
    """How the demo SideNet is made.

    Attributes:
        out: folder for chains, unfinished runs and results.
        backbone: the demo SiT.
        chains: sampling runs to record, held-out ones included.
        points: points a chain, and as many guided backbone calls.
        train: see `TrainSettings`.
        seed: of the chains.
    """

    out: Path = Path("runs/demo_sidenet")
    backbone: Path = SIT_FILE
    chains: int = 1024
    points: int = 48
    train: TrainSettings = field(default_factory=TrainSettings)
    seed: int = 1


def demo_sidenet_config(anchors: int) -> SideNetConfig:
    """Under a tenth of the demo backbone's parameters and compute."""
    return SideNetConfig(
        in_channels=3,
        base_channels=64,
        embedding_dim=64,
        num_layers=4,
        num_classes=10,
        patch_size=4,
        kernel_size=3,
        anchors=anchors,
    )


def recorded(settings: DemoSideNetSettings, sit: SiT) -> Chains:
    """The chains in the output folder, recorded first if they are not there."""
    about: dict[str, object] = {
        "backbone": fingerprint(sit.state_dict()),
        "cfg": DEMO_CFG,
        "chains": settings.chains,
        "points": settings.points,
        "seed": settings.seed,
    }
    path = settings.out / "chains.safetensors"
    if path.exists():
        chains, found = load_chains(path)
        if found != about:
            raise ValueError(f"{path} was recorded with {found}, but {about} is asked for. Choose another --out.")
        return chains
    labels = torch.arange(settings.chains) % 10
    chains = record_chains(
        lambda rows: guided_field(sit, rows, DEMO_CFG), labels, (3, 32, 32), settings.points, settings.seed
    )
    save_chains(path, chains, about)
    return chains


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
    sit = load_sit(settings.backbone)
    train_chains, held_out = recorded(settings, sit).split(HELD_OUT)
    results: dict[int, tuple[float, SideNet, SideNetCard]] = {}
    for anchors in (1, 2):
        start = time.perf_counter()
        state = settings.out / f"run_{anchors}_anchor.pt"
        config = demo_sidenet_config(anchors)
        sidenet, left = train_sidenet(config, train_chains, held_out, settings.train, state)
        seconds = time.perf_counter() - start
        errors = rollout_errors(sit, sidenet)
        card = SideNetCard(
            velocity="guided",
            guidance_range=(DEMO_CFG, DEMO_CFG),
            backbone={"name": "demo SiT", "kind": "sit", "fingerprint": fingerprint(sit.state_dict())},
            training={
                "objective": "all pairs, relative to the straight line",
                "chains": len(train_chains),
                "backbone_calls": settings.chains * settings.points,
                "settings": asdict(settings.train),
                "seconds": round(seconds),
                "torch": torch.__version__,
            },
            evaluation={"validation_endpoint_error": errors, "residual_variance": left},
            licence="MIT",
        )
        save_sidenet(settings.out / f"sidenet_{anchors}_anchor.safetensors", sidenet, card)
        results[anchors] = (sum(errors["best"].values()), sidenet, card)
        print(f"{anchors} anchor(s): {json.dumps(card.evaluation)}")
    _, best, card = min(results.values(), key=lambda result: result[0])
    comparison = {f"{anchors} anchor": card.evaluation for anchors, (_, _, card) in results.items()}
    write_text(settings.out / "comparison.json", json.dumps(comparison, indent=1))
    path = settings.out / "demo_sidenet.safetensors"
    save_sidenet(path, best, card)
    return path


if __name__ == "__main__":
    import tyro

    make_demo_sidenet(tyro.cli(DemoSideNetSettings))
