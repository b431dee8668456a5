"""A small classifier of the demo's shapes: whether a generated image shows the class that was asked for.

python -m ba_solver.lab.classifier --out runs/demo_classifier
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bas_core.files import check_format, check_tensors, read_safetensors, write_safetensors
from ..training.network.loop import LoopSettings, Microbatch, train
from .shapes import CLASS_NAMES, draw_shapes

CLASSIFIER_FORMAT = "ba-solver-demo-classifier"
LOOP = LoopSettings(steps=900, batch=96, learning_rate=3e-3, weight_decay=0.01, ema=0.99)


class Classifier(nn.Sequential):
    """Images [B, 3, 32, 32] in [-1, 1] to logits [B, 10]."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width in (24, 48, 96):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(), nn.MaxPool2d(2)]
            channels = width
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * 16, len(CLASS_NAMES)))


def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Microbatch of images that the classifier takes for their label."""
    with torch.inference_mode():
        guesses = torch.cat([classifier(part.clamp(-1, 1)).argmax(1) for part in images.split(256)])
    return (guesses == labels).float().mean().item()


def train_classifier(out: Path = Path("runs/demo_classifier")) -> Path:
    """Train the classifier on drawn shapes with a little noise; returns the path of the weights in the folder `out`."""
    torch.manual_seed(LOOP.seed)
    classifier = Classifier()

    def loss_at(step: int, share: Microbatch) -> Tensor:
        generator = LOOP.generator(step)
        shapes = draw_shapes(generator, LOOP.batch)
        noisy = shapes.images + 0.05 * torch.randn(shapes.images.shape, generator=generator)
        guesses = classifier(share.of(noisy).clamp(-1, 1))
        return F.cross_entropy(guesses, share.of(shapes.labels), label_smoothing=0.02)

    best = train(classifier, loss_at, LOOP, "classifier", out / "run.pt")
    path = out / "demo_classifier.safetensors"
    validation = draw_shapes(torch.Generator().manual_seed(987_654_321), 4000)
    metadata = {"format": CLASSIFIER_FORMAT, "format_version": "1", "license": "MIT"}
    metadata["validation_accuracy"] = f"{accuracy(best, validation.images, validation.labels):.4f}"
    write_safetensors(path, {name: value.half() for name, value in best.state_dict().items()}, metadata)
    return path


def load_classifier(path: Path) -> Classifier:
    """Load the classifier.

    Raises:
        CheckpointError: the file is damaged or another kind of file.
    """
    state, metadata = read_safetensors(path)
    check_format(metadata, CLASSIFIER_FORMAT, 1, path)
    classifier = Classifier()
    check_tensors(state, classifier.state_dict(), path)
    classifier.load_state_dict(state)
    return classifier.eval().requires_grad_(False)


if __name__ == "__main__":
    import tyro

    tyro.cli(train_classifier)
