"""Train the demo's backbone: a small class-conditional SiT on drawn shapes.

    python -m ba_solver.lab.demo_backbone --out runs/demo_backbone

writes `demo_sit.safetensors` (the averaged weights, in half precision) into the output folder. Ctrl-C saves;
the same command goes on from there. About an hour on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..bas_core.checkpoint import load_sit, save_sit
from ..bas_core.flow import interpolate
from ..bas_core.sit import SiT, SiTConfig
from ..training.network.loop import LoopSettings, Share, train
from .shapes import CLASS_NAMES, IMAGE_SIZE, ShapeBatch, draw_shapes

DEMO_CONFIG = SiTConfig(
    input_size=IMAGE_SIZE, patch_size=4, in_channels=3, hidden_size=192, depth=4, num_heads=6, num_classes=10
)


@dataclass(frozen=True)
class BackboneSettings:
    """How the demo backbone is trained.

    Attributes:
        out: folder for the weights and the state of an unfinished run.
        loop: steps, batch, learning rate.
        class_dropout: share of samples that see the null class, for guidance.
        start_from: weights to start from instead of fresh ones.
        compile: use torch.compile (needs a C++ compiler on a CPU).
        device: where to train.
    """

    out: Path = Path("runs/demo_backbone")
    loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(
            steps=6500, batch=64, learning_rate=2e-3, warmup=200, muon=True, ema=0.999, save_every=250
        )
    )
    class_dropout: float = 0.1
    start_from: Path | None = None
    compile: bool = False
    device: str = "cpu"


Draw = Callable[[torch.Generator, int], ShapeBatch]


def training_batch(settings: BackboneSettings, draw: Draw, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, noise, times and labels of one step."""
    generator, batch = settings.loop.generator(step), settings.loop.batch
    shapes = draw(generator, batch)
    noise = torch.randn(shapes.images.shape, generator=generator)
    # Half logit-normal (most of the difficulty is mid-path), half uniform (the solver visits every time).
    t = torch.rand(batch, generator=generator)
    t[::2] = torch.randn(t[::2].shape, generator=generator).sigmoid()
    dropped = torch.rand(batch, generator=generator) < settings.class_dropout
    return shapes.images, noise, t, torch.where(dropped, len(CLASS_NAMES), shapes.labels)


def train_backbone(
    settings: BackboneSettings, config: SiTConfig = DEMO_CONFIG, draw: Draw = draw_shapes, name: str = "demo_sit"
) -> Path:
    """Train, or go on with, the demo's backbone or another on such pictures; returns the path of the weights."""
    torch.manual_seed(settings.loop.seed)
    device = torch.device(settings.device)
    model = SiT(config).initialize_weights().to(device)
    if settings.start_from:
        model.load_state_dict(load_sit(settings.start_from).state_dict())
    network = torch.compile(model) if settings.compile else model
    path = settings.out / f"{name}.safetensors"

    def loss_at(step: int, share: Share) -> Tensor:
        images, noise, t, labels = (share.of(part).to(device) for part in training_batch(settings, draw, step))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            velocity = network(interpolate(images, noise, t), t, labels)
        return (velocity.float() - (noise - images)).square().mean()

    def save(average: SiT, step: int) -> dict[str, float]:
        weights = {name: value.half() for name, value in average.state_dict().items()}
        training = asdict(settings.loop) | {"step": step, "class_dropout": settings.class_dropout}
        save_sit(path, weights, config, {"classes": list(CLASS_NAMES), "training": training, "licence": "MIT"})
        return {}

    average = train(model, loss_at, settings.loop, "backbone", settings.out / "run.pt", save)
    save(average, settings.loop.steps)
    return path


if __name__ == "__main__":
    import tyro

    train_backbone(tyro.cli(BackboneSettings))
