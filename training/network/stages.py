"""The stages that train the network: from trajectories alone, as published, and with the real solver in the loop."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...bas_core.quadrature import Rule, get_rule
from ...bas_core.schedule import Schedule
from ...bas_core.sidenet import SideNet
from ..backbones import Backbone
from ..progress import say
from ..recording.replay import Replay
from ..recording.trajectories import Trajectories
from ..settings import UsageError
from .loop import LoopSettings, Numbers, Share, train
from .losses import predicted, relative_loss, squared_errors
from .memory import passes_within, saved_bytes
from .options import Training
from .pairs import KINDS, Examples, QueryRange, draw_examples
from .published import CHAIN_STEPS, load_latents, published_loss

Result = TypeVar("Result")

TIME_BINS, STEP_BINS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.05, 0.1, 0.2, 1.0)

VALIDATION_BATCH, VALIDATION_BATCHES = 128, 16

# Of the runs that could save the call at t = 1, how many do in training: the others are for noise of inversions.
ANALYTIC_SHARE = 0.85


@dataclass
class Job:
    """One training: what it works with, and what it has come to.

    Attributes:
        training: settings.
        trajectories, validation: to train on, and to validate on.
        starts: first stretches of more runs to train on, if they were recorded.
        mean: of the data, as states, if the SideNet keeps it.
        about: what the trajectories say of themselves.
        device: where the SideNet is trained.
        folder: of the unfinished run.
        backbone: for the stages that need it.
        spent: backbone calls by stage.
        runs: that were fitted, by number of calls.
    """

    training: Training
    trajectories: Trajectories
    validation: Trajectories
    about: dict[str, Any]
    device: torch.device
    folder: Path
    backbone: Backbone | None = None
    starts: Trajectories | None = None
    mean: Tensor | None = None
    spent: Counter[str] = field(default_factory=Counter)
    runs: dict[int, Schedule] = field(default_factory=dict)

    @property
    def ranges(self) -> QueryRange:
        """Which queries to draw: for grids from uniform to well beyond the model's own shift."""
        usual = QueryRange()
        highest = max(usual.shift[1], 1.5 * self.about["shift"])
        return dataclasses.replace(usual, calls=self.training.nfe_range, shift=(usual.shift[0], highest))

    def examples(
        self, trajectories: Trajectories, sidenet: SideNet, count: int, generator: torch.Generator
    ) -> Examples:
        """A batch drawn from trajectories; for training, from the starts too."""
        starts = self.starts if trajectories is self.trajectories else None
        ranges = self.ranges if self.mean is None else dataclasses.replace(self.ranges, analytic_share=ANALYTIC_SHARE)
        return draw_examples(trajectories, self.rule, sidenet.anchors, count, ranges, generator, starts, self.mean)

    @property
    def rule(self) -> Rule:
        """The quadrature rule that the SideNet is trained for."""
        return get_rule(self.training.rule)

    def replay(self, trajectories: Trajectories) -> Replay:
        """Recorded runs, to be run again.

        Raises:
            UsageError: there is no backbone.
        """
        if self.backbone is None:
            raise UsageError("This stage needs the backbone; give --backbone.")
        return Replay(self.backbone, trajectories, self.about, self.spent)

    def within(self, work: Callable[[], Result], gradients: bool = False) -> Result:
        """Do work that calls the backbone, where the backbone wants it done."""
        return work() if self.backbone is None else self.backbone.within(work, gradients)


@torch.inference_mode()
def residual_table(sidenet: SideNet, job: Job) -> dict[str, dict[str, float]]:
    """Held-out residual variance left: the SideNet's squared error over the straight line's, by kind of query, by
    time of the anchor and by size of the step. 1 = no better than the multistep method."""
    generator = torch.Generator().manual_seed(10_007)
    rows = []
    for _ in range(VALIDATION_BATCHES):
        e = job.examples(job.validation, sidenet, VALIDATION_BATCH, generator).share(lambda c: c.to(job.device))
        errors = squared_errors(predicted(sidenet, e, sidenet.anchors), e), squared_errors(e.straight_line(), e)
        rows.append(torch.stack([*errors, e.kinds.float(), e.t, e.h.abs()]).float().cpu())
    ours, line, kinds, t, h = torch.cat(rows, 1)

    def left(chosen: Tensor) -> float:
        return round((ours[chosen].sum() / line[chosen].sum().clamp_min(1e-12)).item(), 4)

    def binned(values: Tensor, edges: tuple[float, ...]) -> dict[str, float]:
        pairs = itertools.pairwise(edges)
        chosen = {f"{lo:g}-{hi:g}": (values > lo) & (values <= hi) for lo, hi in pairs}
        return {name: left(rows) for name, rows in chosen.items() if rows.any()}

    by_kind = {kind: left(kinds == i) for i, kind in enumerate(KINDS) if (kinds == i).any()}
    return {"kind": by_kind, "time": binned(t, TIME_BINS), "step": binned(h, STEP_BINS)}


LossOf = Callable[[SideNet, torch.Generator, Share], Tensor]


def run_stage(job: Job, sidenet: SideNet, name: str, loop: LoopSettings, loss_of: LossOf) -> SideNet:
    """Train one stage, or go on with it. The weights with the best held-out score are kept: the mean over the kinds of
    query of the residual variance left."""

    def loss_at(step: int, share: Share) -> Tensor:
        return loss_of(sidenet, loop.generator(step), share)

    def report(average: SideNet, step: int) -> Numbers:
        table = residual_table(average, job)["kind"]
        return {**table, "score": sum(table.values()) / len(table)}

    trained = train(sidenet, loss_at, loop, name, job.folder / f"{name}.pt", report, job.folder)
    return trained.train().requires_grad_(True)


def bytes_each(job: Job, sidenet: SideNet) -> float:
    """How much memory training keeps for the backward pass, for one example."""
    drawn = job.examples(job.trajectories, sidenet, 2, torch.Generator().manual_seed(0)).share(
        lambda c: c.to(job.device)
    )
    return saved_bytes(lambda: relative_loss(sidenet, drawn, sidenet.anchors)) / 2


def all_pairs_stage(job: Job, sidenet: SideNet) -> SideNet:
    """Stage 1: from trajectories alone."""
    loop = job.training.loop(job.training.steps, job.training.batch)
    free = job.backbone.make_room() if job.backbone else None
    if job.training.accumulate == 0 and free is not None:
        each = bytes_each(job, sidenet)
        loop = dataclasses.replace(loop, accumulate=passes_within(loop.batch, each, free))
        say(f"A training step takes {each * loop.batch / loop.accumulate / 1e6:.3g} MB beside the weights.")

    def loss(network: SideNet, generator: torch.Generator, share: Share) -> Tensor:
        examples = job.examples(job.trajectories, network, loop.batch, generator)
        return relative_loss(network, examples.share(lambda c: share.of(c).to(job.device)), network.anchors)

    return run_stage(job, sidenet, "all_pairs", loop, loss)


def published_stage(job: Job, sidenet: SideNet) -> SideNet:
    """Stage 1, as published: from data, with the backbone."""
    backbone, path = job.backbone, job.training.latents
    if backbone is None or path is None:
        raise UsageError("The published objective needs --backbone and --latents.")
    latents = load_latents(path, backbone)
    loop = job.training.loop(job.training.steps, job.training.batch)

    def loss(network: SideNet, generator: torch.Generator, share: Share) -> Tensor:
        job.spent["published"] += (CHAIN_STEPS + 1) * loop.batch if share.index == 0 else 0
        return published_loss(network, backbone, latents, loop.batch, generator, share)

    return run_stage(job, sidenet, "published", loop, loss)
