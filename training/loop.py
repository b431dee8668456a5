"""The one training loop: averaged weights, a schedule, a progress bar, atomic saves, and resume to the bit."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..bas_core.checkpoint import write_atomically
from .progress import progress

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LoopSettings:
    """What every training has in common.

    Attributes:
        steps: optimizer steps.
        batch: samples a step.
        learning_rate: peak, after a linear warm-up of `warmup` steps, of a cosine down to 1 %.
        weight_decay: of AdamW.
        muon: orthogonalise the updates of the blocks' matrices (Muon; needs torch 2.9), which a transformer
            learns about twice as fast with; the other parameters get half the learning rate, from AdamW.
        ema: decay of the averaged weights.
        seed: of weights and batches.
        save_every: steps between reports and saves.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.0
    muon: bool = False
    ema: float = 0.999
    seed: int = 0
    save_every: int = 500

    def factor(self, step: int) -> float:
        """The learning rate at a step, over the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))

    def generator(self, step: int) -> torch.Generator:
        """The source of a step's randomness, so that a resumed run draws what the whole run would have drawn."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)


def averaged(model: nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """An exponential moving average of a model's weights that trusts the present more while it is young."""

    @torch.no_grad()
    def update(averages: Any, current: Any, count: Tensor | int) -> None:
        seen = int(count)
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + seen) / (10 + seen)))

    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=update)


def make_optimizers(model: nn.Module, settings: LoopSettings) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the matrices of `blocks` and AdamW over the rest."""
    rate, decay = settings.learning_rate, settings.weight_decay
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if settings.muon and name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    if not matrices:
        return [torch.optim.AdamW(others, lr=rate, weight_decay=decay, betas=(0.9, 0.99))]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate / 2, weight_decay=decay, betas=(0.9, 0.99)),
    ]


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done (in the main thread, where Python delivers it)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending:
        raise KeyboardInterrupt


class Run(Generic[Model]):
    """Everything that changes during a training, so that it can be saved and gone on with."""

    def __init__(self, model: Model, settings: LoopSettings, path: Path | None) -> None:
        self.model, self.path, self.done = model, path, 0
        self.average = averaged(model, settings.ema)
        self.optimizers = make_optimizers(model, settings)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, settings.factor) for o in self.optimizers]
        if path is not None and path.exists():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in self._parts().items():
                part.load_state_dict(saved[name])
            self.done = saved["step"]

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "average": self.average}
        for i, (optimizer, schedule) in enumerate(zip(self.optimizers, self.schedules, strict=True)):
            parts |= {f"optimizer{i}": optimizer, f"schedule{i}": schedule}
        return parts

    @property
    def averaged_model(self) -> Model:
        result: Any = self.average.module
        return result

    def advance(self, loss: Tensor) -> None:
        """One optimizer step; Ctrl-C waits for its end, so that what is saved is never half a step."""
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        with interrupts_deferred():
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                optimizer.step()
                schedule.step()
            self.average.update_parameters(self.model)
            self.done += 1

    def save(self) -> None:
        """Write the run's state, atomically."""
        if self.path is not None:
            state = {"step": self.done, **{name: part.state_dict() for name, part in self._parts().items()}}
            write_atomically(self.path, lambda temporary: torch.save(state, temporary))


def train(
    model: Model,
    loss_at: Callable[[int], Tensor],
    settings: LoopSettings,
    what: str,
    state_path: Path | None = None,
    report: Callable[[Model, int], dict[str, float]] | None = None,
) -> Model:
    """Train `model` in place and return its averaged twin, frozen.

    Args:
        model: on its device.
        loss_at: the loss of a step; all its randomness comes from `settings.generator(step)`.
        settings: see there.
        what: the progress bar's name.
        state_path: where to keep the unfinished run; the same call goes on from it. None = keep nothing.
        report: called with the averaged model and the step before each save; its numbers join the progress bar.

    Raises:
        FloatingPointError: the loss is not finite; the last save is kept.
        KeyboardInterrupt: after saving.
    """
    run = Run(model, settings, state_path)
    try:
        with progress(range(run.done, settings.steps), what, initial=run.done, total=settings.steps) as bar:
            for step in bar:
                loss = loss_at(step)
                if not loss.isfinite():
                    raise FloatingPointError(f"The loss of {what} is not finite at step {step}; the last save is kept.")
                run.advance(loss)
                if run.done % settings.save_every == 0:
                    numbers = report(run.averaged_model, run.done) if report else {}
                    bar.set_postfix(loss=f"{loss.item():.4f}", **numbers)
                    run.save()
    except KeyboardInterrupt:
        run.save()
        raise
    return run.averaged_model.eval().requires_grad_(False)
