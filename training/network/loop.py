"""The training loop: averaged weights, a learning rate schedule, a progress bar, atomic saves, and resume."""

from __future__ import annotations

import importlib.util
import json
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

from ...bas_core.files import CheckpointError, read_pickled_tensors, write_atomically, write_text
from ..processes import mean_over_processes, processes
from ..progress import progress, tell_history
from ..settings import UsageError

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LoopSettings:
    """Settings of a training loop.

    Attributes:
        steps: optimizer steps.
        batch: samples a step.
        learning_rate: peak, after a linear warm-up of `warmup` steps, of a cosine down to 1 %.
        weight_decay: of AdamW.
        muon: use Muon (needs torch 2.9) for the matrices of transformer blocks, which learn about twice as fast with
            it; the other parameters get half the learning rate, from AdamW.
        ema: decay of the averaged weights.
        seed: of weights and batches.
        save_every: steps between reports and saves.
        accumulate: backward passes a step, each over a part of the batch, when memory is short.
        precision: fp32 or bf16.
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
    accumulate: int = 1
    precision: str = "fp32"

    def factor(self, step: int) -> float:
        """The learning rate at a step, over the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))

    def check(self, processes: int) -> None:
        """Refuse an unknown precision, and a batch that so many processes cannot share.

        Raises:
            UsageError: saying which.
        """
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"--precision must be fp32 or bf16; got {self.precision!r}.")
        passes = processes * self.accumulate
        if self.accumulate < 1 or self.batch % passes:
            raise UsageError(
                f"--batch must be a multiple of processes times --accumulate, here {passes}, so that all do the same; "
                f"got {self.batch}."
            )

    def generator(self, step: int) -> torch.Generator:
        """The source of a step's randomness; a resumed training draws what an uninterrupted one would."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)


def averaged(model: nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """An exponential moving average of a model's weights with a smaller decay in its first steps."""

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


@dataclass(frozen=True)
class Microbatch:
    """The part of a step's batch that one backward pass of one process takes."""

    index: int = 0
    count: int = 1

    def of(self, rows: Tensor) -> Tensor:
        """Every `count`-th row from `index` on."""
        return rows[self.index :: self.count]


LossAt = Callable[[int, Microbatch], Tensor]
Numbers = dict[str, float]


class TrainingState(Generic[Model]):
    """Everything that changes during a training, so that it can be saved and resumed."""

    def __init__(self, model: Model, settings: LoopSettings, path: Path | None) -> None:
        self.model, self.settings, self.path, self.done = model, settings, path, 0
        self.device = next(model.parameters()).device
        self.rank, self.processes, _ = processes(self.device.type == "cpu")
        settings.check(self.processes)
        self.average = averaged(model, settings.ema)
        self.optimizers = make_optimizers(model, settings)
        self.rate_schedules = [torch.optim.lr_scheduler.LambdaLR(o, settings.factor) for o in self.optimizers]
        self.history: list[Numbers] = []
        self.best: dict[str, Tensor] | None = None
        if path is not None and path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        saved = read_pickled_tensors(path)
        try:
            for name, part in self._parts().items():
                part.load_state_dict(saved[name])
            self.done, self.history, self.best = saved["step"], saved["history"], saved["best"]
        except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is the state of another training ({str(error).splitlines()[0]}). Delete it to start anew, "
                "or use the settings it was made with."
            ) from error

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "average": self.average}
        for i, (optimizer, schedule) in enumerate(zip(self.optimizers, self.rate_schedules, strict=True)):
            parts |= {f"optimizer{i}": optimizer, f"schedule{i}": schedule}
        return parts

    @property
    def averaged_model(self) -> Model:
        result: Any = self.average.module
        return result

    def gradients(self, loss_at: LossAt) -> float:
        """One step's loss, with its gradients in place; all processes and passes share the batch."""
        passes = self.settings.accumulate
        self.model.zero_grad()
        total = torch.zeros((), device=self.device)
        for index in range(passes):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
                loss = loss_at(self.done, Microbatch(self.rank * passes + index, passes * self.processes)) / passes
            loss.backward()
            total += loss.detach().float()
        if self.processes > 1:
            self._share_gradients()
        return mean_over_processes(total).item()

    def _share_gradients(self) -> None:
        # In one message, by hand: wrappers want one call of the model a step, and a loss may make many.
        trained = [p for p in self.model.parameters() if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
        mean = mean_over_processes(flat)
        for p, gradient in zip(trained, mean.split([p.numel() for p in trained]), strict=True):
            p.grad = gradient.view_as(p).clone()

    def advance(self) -> None:
        """One optimizer step; Ctrl-C waits for its end, so that half a step is never saved."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        with interrupts_deferred():
            for optimizer, schedule in zip(self.optimizers, self.rate_schedules, strict=True):
                optimizer.step()
                schedule.step()
            self.average.update_parameters(self.model)
            self.done += 1

    def note(self, numbers: Numbers) -> None:
        """Add a line to the history, and keep the averaged weights if their score is the best so far."""
        if "score" in numbers:
            # The same on every process, so that all keep the same weights.
            numbers["score"] = float(mean_over_processes(torch.tensor(numbers["score"], device=self.device)))
            scores = [row["score"] for row in self.history if "score" in row]
            if not scores or numbers["score"] < min(scores):
                self.best = {name: value.clone() for name, value in self.averaged_model.state_dict().items()}
        self.history.append(numbers)

    def save(self) -> None:
        """Write the state, atomically."""
        if self.path is not None and self.rank == 0:
            state = {"step": self.done, "history": self.history, "best": self.best}
            state |= {name: part.state_dict() for name, part in self._parts().items()}
            write_atomically(self.path, lambda temporary: torch.save(state, temporary))

    def result(self) -> Model:
        """The averaged model, frozen: the best of those that were scored, or the last."""
        if self.best is not None:
            self.averaged_model.load_state_dict(self.best)
        return self.averaged_model.eval().requires_grad_(False)


Report = Callable[[Any, int], Numbers]


def train(
    model: Model,
    loss_at: LossAt,
    settings: LoopSettings,
    what: str,
    state_path: Path | None = None,
    report: Report | None = None,
    journal: Path | None = None,
) -> Model:
    """Train `model` in place and return its averaged twin, frozen.

    Args:
        model: on its device.
        loss_at: the loss of a step's microbatch; all its randomness comes from `settings.generator(step)`.
        settings: see there.
        what: the progress bar's name.
        state_path: file for the unfinished training; the same call continues from it. None = none.
        report: called with the averaged model and the step before each save; its numbers join the progress bar. A
            number called `score` (lower is better) decides which weights are returned.
        journal: folder for TensorBoard's log and a plot of the loss; None = neither.

    Raises:
        FloatingPointError: the loss is not finite; the last save is kept.
        BaseException: anything else, such as Ctrl-C; after saving.
        CheckpointError: the state is of another state.
    """
    state = TrainingState(model, settings, state_path)
    recent: list[float] = []
    try:
        with progress(range(state.done, settings.steps), what, initial=state.done, total=settings.steps) as bar:
            for step in bar:
                loss = state.gradients(loss_at)
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"The loss of {what} is not finite at step {step}; the last save is kept. Lower the learning "
                        "rate, or train in fp32."
                    )
                state.advance()
                recent.append(loss)
                if state.done % settings.save_every == 0 or state.done == settings.steps:
                    numbers = report(state.averaged_model, state.done) if report else {}
                    state.note({"step": state.done, "loss": sum(recent) / len(recent), **numbers})
                    recent.clear()
                    bar.set_postfix(
                        {name: f"{value:.4g}" for name, value in state.history[-1].items() if name != "step"}
                    )
                    state.save()
                    tell_history(what, state.history)
                    if journal is not None and state.rank == 0:
                        write_journal(journal, what, state.history)
    except FloatingPointError:
        raise
    except BaseException:  # Ctrl-C, ComfyUI's Cancel, full memory: all of them where no weight is half changed
        state.save()
        raise
    return state.result()


def write_journal(folder: Path, what: str, history: list[Numbers]) -> None:
    """All lines as JSON; and where the libraries are there, the latest for TensorBoard, and all as a plot."""
    write_text(folder / f"{what}_log.json", json.dumps(history, indent=1))
    if importlib.util.find_spec("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for name, value in history[-1].items():
                writer.add_scalar(f"{what}/{name}", value, int(history[-1]["step"]))
    if importlib.util.find_spec("matplotlib"):
        plot_history(folder / f"{what}_loss.png", what, history)


def plot_history(path: Path, what: str, history: list[Numbers]) -> None:
    """Loss and validation scores over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    names = [name for name in history[-1] if name != "step"]
    for name in names:
        known = [row for row in history if name in row]
        panel.plot([row["step"] for row in known], [row[name] for row in known], label=name, marker=".")
    positive = all(row.get(name, 1) > 0 for row in history for name in names)  # logarithms of errors are not
    panel.set(yscale="log" if positive else "linear", xlabel="step", title=what)
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
