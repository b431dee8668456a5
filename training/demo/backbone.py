"""Train the demo's backbone: a small class-conditional SiT on drawn shapes.

    python -m ba_solver.training.demo.backbone --out runs/demo_backbone

writes `demo_sit.safetensors` (the averaged weights, in half precision) into the output folder. Ctrl-C saves;
the same command goes on from there. About an hour on two CPU cores.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...bas_core.checkpoint import save_sit
from ...bas_core.flow import interpolate
from ...bas_core.sit import SiT, SiTConfig
from ..progress import progress
from ..state import load_run, save_run
from .shapes import CLASS_NAMES, IMAGE_SIZE, draw_shapes

DEMO_CONFIG = SiTConfig(
    input_size=IMAGE_SIZE, patch_size=4, in_channels=3, hidden_size=192, depth=4, num_heads=6, num_classes=10
)


@dataclass(frozen=True)
class BackboneSettings:
    """How the demo backbone is trained.

    Attributes:
        out: folder for the weights and the state of an unfinished run.
        steps: optimizer steps.
        batch: images a step, drawn afresh each time.
        learning_rate: peak of a linear warm-up followed by a cosine.
        class_dropout: share of samples that see the null class, for guidance.
        ema: decay of the averaged weights.
        save_every: steps between saves.
        compile: use torch.compile (needs a C++ compiler on a CPU).
        device: where to train.
    """

    out: Path = Path("runs/demo_backbone")
    steps: int = 10_000
    batch: int = 64
    learning_rate: float = 8e-4
    warmup: int = 300
    class_dropout: float = 0.1
    ema: float = 0.9992
    seed: int = 0
    save_every: int = 500
    compile: bool = False
    device: str = "cpu"


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 1 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def training_batch(settings: BackboneSettings, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, noise, times and labels of one step; a function of the step, so that a resumed run repeats nothing."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    shapes = draw_shapes(generator, settings.batch)
    noise = torch.randn(shapes.images.shape, generator=generator)
    # Half logit-normal (most of the difficulty is mid-path), half uniform (the solver visits every time).
    t = torch.rand(settings.batch, generator=generator)
    t[::2] = torch.randn(t[::2].shape, generator=generator).sigmoid()
    dropped = torch.rand(settings.batch, generator=generator) < settings.class_dropout
    return shapes.images, noise, t, torch.where(dropped, len(CLASS_NAMES), shapes.labels)


def train_backbone(settings: BackboneSettings) -> Path:
    """Train, or go on with, the demo backbone; returns the path of the finished weights."""
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    model = SiT(DEMO_CONFIG).initialize_weights().to(device)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=_ema(settings.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings.steps, settings.warmup)
    )
    parts: dict[str, nn.Module | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler] = {
        "model": model,
        "average": average,
        "optimizer": optimizer,
        "schedule": schedule,
    }
    state_path = settings.out / "run.pt"
    start = 0
    if state_path.exists():
        run = load_run(state_path)
        for name, part in parts.items():
            part.load_state_dict(run[name])
        start = run["step"]

    def save(step: int) -> Path:
        save_run(state_path, {"step": step, **{name: part.state_dict() for name, part in parts.items()}})
        path = settings.out / "demo_sit.safetensors"
        training = {k: str(v) for k, v in asdict(settings).items() if k not in ("out", "device", "save_every")}
        weights = {k: v.half() for k, v in average.module.state_dict().items()}
        save_sit(path, weights, DEMO_CONFIG, {"classes": list(CLASS_NAMES), "training": {**training, "step": step}})
        return path

    network = torch.compile(model) if settings.compile else model
    step = start
    try:
        with progress(range(start, settings.steps), "backbone", initial=start, total=settings.steps) as steps:
            for step in steps:
                images, noise, t, labels = (part.to(device) for part in training_batch(settings, step))
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    velocity = network(interpolate(images, noise, t), t, labels)
                loss = (velocity.float() - (noise - images)).square().mean()
                if not loss.isfinite():
                    raise FloatingPointError(f"The loss is not finite at step {step}; the last save is kept.")
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                average.update_parameters(model)
                if (step + 1) % settings.save_every == 0:
                    steps.set_postfix(loss=f"{loss.item():.4f}")
                    save(step + 1)
    except KeyboardInterrupt:
        save(step)
        raise
    return save(settings.steps)


def _ema(decay: float):  # noqa: ANN202 - the optimizer's own callback type is private
    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        # A young average trusts the present more.
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, weight)

    return update


if __name__ == "__main__":
    import tyro

    train_backbone(tyro.cli(BackboneSettings))
