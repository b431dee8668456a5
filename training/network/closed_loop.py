"""The second stage: roll the real sampler with the backbone in the loop, and train on what happens there.

`interval_loss` compares the end of every interval, provisional and accepted, with the recorded chain; gradients pass
through the SideNet's calls of that interval alone, so memory is that of training on pairs. `end_point_loss` compares
the last state, with gradients through the whole run, the frozen backbone included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ...bas_core.grids import starts_short
from ...bas_core.guidance import Field
from ...bas_core.quadrature import Rule
from ...bas_core.runs import run_over
from ...bas_core.solver import make_plan, solve
from ...bas_core.steps import Anchor, knows_mean, probe, refine
from ..recording.replay import RecomputedSideNet, Replay
from .loop import Share

# Share of the states' mean square that is added to the line's error; see `losses.RELATIVE_FLOOR`.
FLOOR = 1e-6


@dataclass(frozen=True)
class Rollout:
    """What a closed-loop step rolls.

    Attributes:
        replay: recorded runs, and the model.
        rule: quadrature.
        grids: the time grids to roll, descending from 1 to 0.
        batch: runs a step.
    """

    replay: Replay
    rule: Rule
    grids: Sequence[Tensor]
    batch: int

    def draw(self, generator: torch.Generator, share: Share) -> tuple[Field, Tensor, Tensor]:
        """A field for some runs of one CFG scale, their rows in the chains, and a grid."""
        runs, scales = self.replay.runs()
        alike = runs[scales == scales[torch.randint(len(runs), (), generator=generator)]]
        rows = share.of(alike[torch.randint(len(alike), (self.batch,), generator=generator)])
        grid = self.grids[int(torch.randint(len(self.grids), (), generator=generator))] * self.replay.backbone.start
        return self.replay.field_of(rows), rows, grid

    def count(self, stage: str, calls: int, share: Share) -> None:
        """Note what a step costs, once for all its shares."""
        self.replay.spent[stage] += calls * self.batch if share.index == 0 else 0


def relative(x: Tensor, line: Tensor, truth: Tensor) -> Tensor:
    """Mean over the batch of x's squared error over the straight line's."""
    own, other = ((end - truth).square().flatten(1).mean(1) for end in (x, line))
    return (own / (other + FLOOR * truth.square().flatten(1).mean(1))).mean()


def interval_loss(sidenet: nn.Module, rollout: Rollout, step_generator: torch.Generator, share: Share) -> Tensor:
    """Mean over the intervals of one run, and over provisional and accepted ends, of the relative squared error.

    The last interval, forward only, is one of them, and the largest.
    """
    field, rows, grid = rollout.draw(step_generator, share)
    rollout.count("closed loop", len(grid) - 1, share)
    ours = make_plan(field, sidenet, rollout.rule, skip_first=starts_short(grid))
    line = make_plan(field, None, rollout.rule)
    branches = len(field.conditions)

    def anchor(x: Tensor, t: Tensor) -> Anchor:
        with torch.no_grad():
            return Anchor(x, field(x, t, branches), t)

    with torch.no_grad():
        left, previous = ours.first_anchor(rollout.replay.noise(rows), grid[0], branches), None
    losses = []
    for index, (_, t1) in enumerate(pairwise(grid)):
        truth = rollout.replay.truth(rows, t1)
        end, velocities = probe(ours, left, previous, t1)
        # Both anchors known, the line is the same for one-anchor SideNets: it is the measure, not the starting point.
        line_end, line_velocities = probe(line, left, previous, t1)
        losses.append(relative(end, line_end, truth))
        if index == len(grid) - 2:
            break
        right = anchor(end.detach(), t1)
        end, _ = refine(ours, left, right, velocities)
        losses.append(relative(end, refine(line, left, right, line_velocities)[0], truth))
        previous, left = left, right._replace(x=end.detach())
    return torch.stack(losses).mean()


def end_point_loss(sidenet: nn.Module, rollout: Rollout, step_generator: torch.Generator, share: Share) -> Tensor:
    """Mean over the batch of the end point's squared error over that of the solver without a SideNet."""
    field, rows, grid = rollout.draw(step_generator, share)
    noise, truth = rollout.replay.noise(rows), rollout.replay.truth(rows, grid[-1])
    rollout.count("end point", 2 * (len(grid) - 1), share)
    with torch.no_grad():
        line = solve(field, None, noise, grid, rule=rollout.rule)
    run = run_over(grid, knows_mean=knows_mean(sidenet))
    return relative(solve(field, RecomputedSideNet(sidenet), noise, run, rule=rollout.rule), line, truth)
