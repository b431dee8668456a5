"""The shipped demo: a trained SiT, its SideNet, a classifier, and every solver's best time grid."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...bas_core.checkpoint import SideNetCard, load_sidenet, load_sit
from ...bas_core.files import CheckpointError
from ...bas_core.guidance import Field, Guidance, model_field
from ...bas_core.sidenet import SideNet
from ...bas_core.sit import SiT
from ..schedules.solvers import UNIFORM, GridShape, Solver

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
SIT_FILE = WEIGHTS / "demo_sit.safetensors"
SIDENET_FILE = WEIGHTS / "demo_sidenet.safetensors"
CLASSIFIER_FILE = WEIGHTS / "demo_classifier.safetensors"
GRIDS_FILE = WEIGHTS / "demo_grids.json"
DEMO_CFG = 2.0

Grids = dict[str, dict[int, GridShape]]


@dataclass(frozen=True)
class Demo:
    """The demo's model and SideNet.

    Attributes:
        sit: the backbone.
        sidenet: trained on its guided velocity.
        card: what the SideNet's file says of itself.
        grids: for every solver and number of calls the (shift, cosine) of its best time grid.
    """

    sit: SiT
    sidenet: SideNet
    card: SideNetCard
    grids: Grids

    def field(self, labels: Tensor, cfg: float = DEMO_CFG) -> Field:
        """The guided velocity field for class labels [B]."""
        return guided_field(self.sit, labels, cfg)

    def on_grid(self, solver: Solver, calls: int, kind: str) -> tuple[Solver, GridShape]:
        """A solver and its "uniform" or "best" grid for a number of calls.

        The best is the one in the SideNet's file for BA-solver, and the best known shape (that of the nearest number
        searched) for the others and for other numbers.
        """
        if kind == "uniform":
            return solver, UNIFORM
        if solver.name == "ba_solver" and calls in self.card.schedules_for(DEMO_CFG):
            return replace(solver, schedules=self.card.schedules_for(DEMO_CFG)), UNIFORM
        known = self.grids.get(solver.name)
        return solver, known[min(known, key=lambda n: abs(n - calls))] if known else UNIFORM


def guided_field(sit: SiT, labels: Tensor, cfg: float = DEMO_CFG) -> Field:
    """A SiT's guided velocity field for class labels [B]."""
    null = torch.full_like(labels, sit.null_class)
    return model_field(sit, labels, null, Guidance(cfg), mode="combined")


def load_demo(device: torch.device | str = "cpu") -> Demo:
    """Load the shipped files.

    Raises:
        FileNotFoundError, CheckpointError: the installation is damaged.
    """
    sidenet, card = load_sidenet(SIDENET_FILE, device, torch.float32)
    return Demo(load_sit(SIT_FILE, device=device), sidenet, card, load_grids())


def load_grids(path: Path = GRIDS_FILE) -> Grids:
    """Best grids by solver and number of calls.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text())
        return {
            solver: {int(calls): (float(shift), float(cosine)) for calls, (shift, cosine) in grids.items()}
            for solver, grids in content["grids"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Install ba-solver again.") from error


def demo_noise(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Noise [count, 3, 32, 32] and labels [count], all classes in turn, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    return torch.randn(count, 3, 32, 32, generator=generator), labels
