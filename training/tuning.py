"""A run tuned end to end: its times, step weights and half calls, by gradients of the end-point error.

Least squares brings every state of a run near the path; what counts is the last one. A run has some hundred numbers at
most, so that some hundred steps on recorded runs find better ones and learn none of the runs by heart.
Gradients pass through all calls of the backbone: each keeps its activations, and takes about three times as long.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bas_core.guidance import Field
from ..bas_core.half_calls import HalfCallField
from ..bas_core.sidenet import SideNet
from ..bas_core.solver import Proposal, solve
from ..bas_core.step_weights import add_terms, place, terms
from .closed_loop import SCORED_RUNS, Rollout
from .evaluate import endpoint_errors, sidenet_sampler
from .loop import LoopSettings, Numbers, Share, train
from .progress import PROCESSES, say
from .time_grids import Learned

# Runs a step: the fewer, the more steps the same calls buy. On the demo 640 runs of 7 calls come to an error of
# .0237 by eights, .0231 by fours, .0227 by twos.
BATCH = 2
LEARNING_RATE, EMA = 0.02, 0.9
REPORTS = 4


def tuning_loop(usual: LoopSettings) -> LoopSettings:
    """The loop of a tuning, in a training whose loops are like `usual`."""
    return dataclasses.replace(
        usual,
        batch=math.lcm(BATCH, PROCESSES),
        learning_rate=LEARNING_RATE,
        warmup=0,
        weight_decay=0.0,
        muon=False,
        ema=EMA,
        save_every=-(-usual.steps // REPORTS),
        accumulate=1,
        patience=0,
        compile=False,
    )


class TunedRun(nn.Module):
    """The numbers of one run as parameters.

    The first time stays: whether its call is saved depends on it, and so what the run costs.

    Args:
        grid, step_weights, half_calls: where they begin.
    """

    def __init__(
        self, grid: Sequence[float], step_weights: list[list[float]], half_calls: list[list[float]] | None
    ) -> None:
        super().__init__()
        self.first = grid[1]
        self.log_steps = nn.Parameter(torch.tensor(grid[1:]).diff().neg().log())
        self.step_weights = nn.ParameterList([nn.Parameter(torch.tensor(row)) for row in step_weights])
        self.half_calls = nn.ParameterList([nn.Parameter(torch.tensor(row)) for row in half_calls or []])

    def times(self) -> Tensor:
        """[N + 1] from 1 to 0."""
        left = 1 - torch.softmax(self.log_steps, 0).cumsum(0)
        first = self.log_steps.new_tensor([1.0, self.first])
        return torch.cat([first, self.first * left[:-1], first.new_zeros(1)])

    def learned(self, calls: int) -> Learned:
        """The numbers, for so many calls."""
        halves = [row.tolist() for row in self.half_calls]
        weights = [row.tolist() for row in self.step_weights]
        return Learned({calls: self.times().tolist()}, {calls: weights}, {calls: halves} if halves else {})

    def forward(self, field: Field, noise: Tensor, sidenet: SideNet, rollout: Rollout, skip_first: bool) -> Tensor:
        """The end [B, C, *spatial] of a run from noise."""
        times = self.times() * rollout.backbone.start
        halves = list(self.half_calls)

        def correct(proposal: Proposal) -> Tensor:
            return add_terms(proposal.x, terms(proposal), self.step_weights[place(proposal)])

        with warnings.catch_warnings():
            # The solver asks times for their value to decide by, which is meant.
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar")
            return solve(
                HalfCallField(field, times, halves) if halves else field,
                sidenet,
                noise,
                times,
                rule=rollout.rule,
                skip_first=skip_first,
                correct=correct,
            )


def tune(
    sidenet: SideNet,
    rollout: Rollout,
    held_out: Rollout,
    learned: Learned,
    calls: int,
    loop: LoopSettings,
    folder: Path,
) -> Learned:
    """Tune what was learned for one number of calls; what it cost is added to `rollout.spent`.

    Args:
        sidenet: left as it is.
        rollout: the backbone, and the recorded runs to draw from.
        held_out: runs on which to choose between what it comes to on the way, and where it began.
        learned: where it begins.
        calls: which of its numbers of calls.
        loop: see `tuning_loop`.
        folder: of the unfinished run, its log and its plot; the same call goes on from there.
    """
    rows, scored = rollout.alike(len(rollout.chains)), held_out.alike(SCORED_RUNS)
    skips = sidenet_sampler(sidenet, start=rollout.backbone.start).skip_first

    def error(run: TunedRun, runs: Rollout, drawn: Tensor, counted: int) -> Tensor:
        field = runs.field_of(drawn)
        ends = run(field, runs.noise(drawn), sidenet, runs, skips)
        runs.spent["tuning"] += round(field.cost * counted)
        return endpoint_errors(ends, runs.truth(drawn, torch.tensor(0.0))).mean()

    def loss_at(step: int, share: Share) -> Tensor:
        drawn = torch.randint(len(rows), (loop.batch,), generator=loop.generator(step))
        return error(run, rollout, share.of(rows[drawn]), loop.batch if share.index == 0 else 0)

    def score(run: TunedRun, step: int) -> Numbers:
        with torch.no_grad():
            return {"score": error(run, held_out, scored, len(scored)).item()}

    begun = TunedRun(learned.time_grids[calls], learned.step_weights[calls], learned.half_calls.get(calls))
    run = copy.deepcopy(begun).to(rollout.backbone.device)
    name = f"tune_{calls}"
    tuned = train(run, loss_at, loop, name, folder / f"{name}.pt", score, folder)
    before, after = (score(each, 0)["score"] for each in (begun.to(rollout.backbone.device), tuned))
    if after < before:
        return tuned.learned(calls)
    say(f"Tuning {calls} calls for {loop.steps} steps did not help (held out {before:.4f} -> {after:.4f}); undone.")
    return learned.only(calls)
