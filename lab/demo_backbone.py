"""Train the demo's backbone: a small class-conditional SiT on drawn shapes.

    python -m ba_solver.lab.demo_backbone --out runs/demo_backbone

writes `demo_sit.safetensors` (the averaged weights, in half precision) into the output folder. Ctrl-C saves;
the same command goes on from there. About an hour on two CPU cores.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..bas_core.checkpoint import save_sit
from ..bas_core.flow import interpolate
from ..bas_core.sit import SiT, SiTConfig
from ..training.network.loop import LoopSettings, Microbatch, train
from .shapes import CLASS_NAMES, IMAGE_SIZE, draw_shapes

DEMO_CONFIG = SiTConfig(
    input_size=IMAGE_SIZE, patch_size=4, in_channels=3, hidden_size=192, depth=4, num_heads=6, num_classes=10
)
LOOP = LoopSettings(steps=6500, batch=64, learning_rate=2e-3, warmup=200, muon=True, ema=0.999, save_every=250)
# Microbatch of samples that see the null class, for CFG.
CLASS_DROPOUT = 0.1


def training_batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, noise, times and labels of one step."""
    generator, batch = LOOP.generator(step), LOOP.batch
    shapes = draw_shapes(generator, batch)
    noise = torch.randn(shapes.images.shape, generator=generator)
    # Half logit-normal (most of the difficulty is mid-path), half uniform (the solver visits every time).
    t = torch.rand(batch, generator=generator)
    t[::2] = torch.randn(t[::2].shape, generator=generator).sigmoid()
    dropped = torch.rand(batch, generator=generator) < CLASS_DROPOUT
    return shapes.images, noise, t, torch.where(dropped, len(CLASS_NAMES), shapes.labels)


def train_backbone(out: Path = Path("runs/demo_backbone"), device: str = "cpu") -> Path:
    """Train the demo's backbone, or resume its training.

    Args:
        out: folder for the weights and the state of an unfinished training.
        device: where to train.

    Returns:
        The path of the weights.
    """
    torch.manual_seed(LOOP.seed)
    model = SiT(DEMO_CONFIG).initialize_weights().to(device)
    path = out / "demo_sit.safetensors"

    def loss_at(step: int, share: Microbatch) -> Tensor:
        images, noise, t, labels = (share.of(part).to(device) for part in training_batch(step))
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            velocity = model(interpolate(images, noise, t), t, labels)
        return (velocity.float() - (noise - images)).square().mean()

    def save(average: SiT, step: int) -> dict[str, float]:
        weights = {name: value.half() for name, value in average.state_dict().items()}
        training = asdict(LOOP) | {"step": step, "class_dropout": CLASS_DROPOUT}
        save_sit(path, weights, DEMO_CONFIG, {"classes": list(CLASS_NAMES), "training": training, "license": "MIT"})
        return {}

    average = train(model, loss_at, LOOP, "backbone", out / "run.pt", save)
    save(average, LOOP.steps)
    return path


if __name__ == "__main__":
    import tyro

    tyro.cli(train_backbone)
