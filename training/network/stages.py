"""The network's training, from trajectories alone or by the published objective."""

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
from ...bas_core.sidenet import SideNet
from ..backbones import Backbone
from ..progress import say
from ..recording.replay import Replay
from ..recording.trajectories import Trajectories
from ..settings import UsageError
from .loop import LoopSettings, Microbatch, Numbers, train
from .losses import predicted, relative_loss, squared_errors
from .memory import passes_within, saved_bytes
from .options import Training
from .pairs import KINDS, Examples, QueryRange, draw_examples
from .published import CHAIN_STEPS, load_latents, published_loss

Result = TypeVar("Result")

TIME_BINS, STEP_BINS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.05, 0.1, 0.2, 1.0)
VALIDATION_SEED, VALIDATION_BATCH, VALIDATION_BATCHES = 10_007, 128, 16
# Of the samplings that could begin with an analytic first step, how many do in training: the others prepare the network
# for the noise of inversions.
ANALYTIC_SHARE = 0.85


@dataclass
class Job:
    """A training: its settings, its data, and its results so far.

    Attributes:
        training: settings.
        trajectories, validation: to train on, and to validate on.
        metadata: of the recording.
        device: of the SideNet.
        folder: of the unfinished training.
        backbone: for the stages that need it.
        prefixes: of more trajectories to train on, if they were recorded.
        mean: of the data, as a state, if the SideNet keeps it.
        nfe: model calls by stage, each for one sample.
    """

    training: Training
    trajectories: Trajectories
    validation: Trajectories
    metadata: dict[str, Any]
    device: torch.device
    folder: Path
    backbone: Backbone | None = None
    prefixes: Trajectories | None = None
    mean: Tensor | None = None
    nfe: Counter[str] = field(default_factory=Counter)

    def examples(
        self,
        trajectories: Trajectories,
        sidenet: SideNet,
        count: int,
        seed: torch.Generator,
        part: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> Examples:
        """A batch drawn from trajectories, or a part of it; for training, from the prefixes too."""
        default = QueryRange()
        ranges = QueryRange(
            nfe=self.training.nfe_range,
            # From uniform grids to well beyond the model's own shift.
            shift=(default.shift[0], max(default.shift[1], 1.5 * self.metadata["shift"])),
            part=(self.metadata["start"], self.metadata["end"]),
            analytic_first_step=0.0 if self.mean is None else ANALYTIC_SHARE,
        )
        prefixes = self.prefixes if trajectories is self.trajectories else None
        return draw_examples(trajectories, self.rule, sidenet.anchors, count, ranges, seed, prefixes, self.mean).read(
            part
        )

    @property
    def rule(self) -> Rule:
        """The quadrature rule that the SideNet is trained for."""
        return get_rule(self.training.rule)

    def replay(self, trajectories: Trajectories) -> Replay:
        """Trajectories beside the model.

        Raises:
            UsageError: there is no backbone.
        """
        if self.backbone is None:
            raise UsageError("This stage needs the backbone; give --backbone.")
        return Replay(self.backbone, trajectories, self.metadata, self.nfe)

    def within(self, work: Callable[[], Result]) -> Result:
        """Do work that calls the backbone, where the backbone can be called."""
        return work() if self.backbone is None else self.backbone.within(work)


@torch.inference_mode()
def variance_unexplained(sidenet: SideNet, job: Job) -> dict[str, dict[str, float]]:
    """Fraction of variance unexplained on validation trajectories: its squared error over that of a straight line.

    1 = no better than the multistep method.

    Returns:
        By kind of query, by time of the anchor and by size of the step.
    """
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    columns = []
    for _ in range(VALIDATION_BATCHES):
        e = job.examples(job.validation, sidenet, VALIDATION_BATCH, generator).apply(lambda c: c.to(job.device))
        errors = squared_errors(predicted(sidenet, e, sidenet.anchors), e), squared_errors(e.straight_line(), e)
        columns.append(torch.stack([*errors, e.kinds.float(), e.t, e.h.abs()]).float().cpu())
    ours, line, kinds, t, h = torch.cat(columns, 1)

    def fraction(chosen: Tensor) -> float:
        return round((ours[chosen].sum() / line[chosen].sum().clamp_min(1e-12)).item(), 4)

    def binned(values: Tensor, edges: tuple[float, ...]) -> dict[str, float]:
        pairs = itertools.pairwise(edges)
        chosen = {f"{lo:g}-{hi:g}": (values > lo) & (values <= hi) for lo, hi in pairs}
        return {name: fraction(rows) for name, rows in chosen.items() if rows.any()}

    by_kind = {kind: fraction(kinds == i) for i, kind in enumerate(KINDS) if (kinds == i).any()}
    return {"kind": by_kind, "time": binned(t, TIME_BINS), "step": binned(h, STEP_BINS)}


LossOf = Callable[[SideNet, torch.Generator, Microbatch], Tensor]


def run_stage(job: Job, sidenet: SideNet, name: str, loop: LoopSettings, loss_of: LossOf) -> SideNet:
    """Train the network, or continue; the weights with the best mean fraction of variance unexplained are taken."""

    def loss_at(step: int, microbatch: Microbatch) -> Tensor:
        return loss_of(sidenet, loop.generator(step), microbatch)

    def report(average: SideNet, step: int) -> Numbers:
        table = variance_unexplained(average, job)["kind"]
        return {**table, "score": sum(table.values()) / len(table)}

    return train(sidenet, loss_at, loop, name, job.folder / f"{name}.pt", report, job.folder)


def all_pairs_stage(job: Job, sidenet: SideNet) -> SideNet:
    """Train on pairs of the trajectories' points."""
    loop = job.training.loop()
    free = job.backbone.make_room() if job.backbone else None
    if job.training.accumulate == 0 and free is not None:
        drawn = job.examples(job.trajectories, sidenet, 2, torch.Generator().manual_seed(0))
        drawn = drawn.apply(lambda c: c.to(job.device))
        each = saved_bytes(lambda: relative_loss(sidenet, drawn, sidenet.anchors)) / 2
        loop = dataclasses.replace(loop, accumulate=passes_within(loop.batch, each, free))
        say(f"A training step takes {each * loop.batch / loop.accumulate / 1e6:.3g} MB beside the weights.")

    def loss(network: SideNet, generator: torch.Generator, microbatch: Microbatch) -> Tensor:
        examples = job.examples(job.trajectories, network, loop.batch, generator, microbatch.of)
        return relative_loss(network, examples.apply(lambda c: c.to(job.device)), network.anchors)

    return run_stage(job, sidenet, "all_pairs", loop, loss)


def published_stage(job: Job, sidenet: SideNet) -> SideNet:
    """Train by the published objective, from data and with the backbone."""
    backbone, path, loop = job.backbone, job.training.latents, job.training.loop()
    if backbone is None or path is None:
        raise UsageError("The published objective needs --backbone and --latents.")
    latents = load_latents(path, backbone)

    def loss(network: SideNet, generator: torch.Generator, microbatch: Microbatch) -> Tensor:
        job.nfe["published"] += (CHAIN_STEPS + 1) * loop.batch if microbatch.index == 0 else 0
        return published_loss(network, backbone, latents, loop.batch, generator, microbatch)

    return run_stage(job, sidenet, "published", loop, loss)
