"""The second stage: roll the real sampler with the backbone in the loop, and train on what happens there.

`interval_loss` compares the end of every interval, provisional and accepted, with the recorded chain; gradients pass
through the SideNet's calls of that interval alone, so memory is that of training on pairs. `end_point_loss` compares
the last state, with gradients through the whole run, the frozen backbone included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..bas_core.grids import starts_short
from ..bas_core.guidance import Field
from ..bas_core.quadrature import Rule
from ..bas_core.solver import Anchor, Plan, StraightLine, probe, refine, solve
from .backbones import Backbone
from .chains import Chains
from .loop import Share

# Share of the states' mean square that is added to the line's error; see `losses.RELATIVE_FLOOR`.
FLOOR = 1e-6
# Held-out runs that the stages with the backbone in the loop are scored on.
SCORED_RUNS = 16


@dataclass(frozen=True)
class Rollout:
    """What a closed-loop step rolls.

    Attributes:
        backbone: the frozen model.
        chains: recorded runs, for noises and truth.
        about: what they say of themselves.
        rule: quadrature.
        grids: the time grids to roll, descending from 1 to 0.
        batch: runs a step.
        spent: backbone calls by stage, in calls a run times runs.
    """

    backbone: Backbone
    chains: Chains
    about: dict[str, Any]
    rule: Rule
    grids: Sequence[Tensor]
    batch: int
    spent: Counter[str] = field(default_factory=Counter)

    def draw(self, generator: torch.Generator, share: Share) -> tuple[Field, Tensor, Tensor]:
        """A field for some runs of one CFG scale, their rows in the chains, and a grid."""
        runs, scales = self.runs()
        alike = runs[scales == scales[torch.randint(len(runs), (), generator=generator)]]
        rows = share.of(alike[torch.randint(len(alike), (self.batch,), generator=generator)])
        grid = self.grids[int(torch.randint(len(self.grids), (), generator=generator))] * self.backbone.start
        return self.field_of(rows), rows, grid

    def runs(self) -> tuple[Tensor, Tensor]:
        """The rows of the chains that begin a run, and their CFG scales."""
        rows = torch.arange(0, len(self.chains), self.chains.branches)
        return rows, torch.zeros(len(rows)) if self.chains.scales is None else self.chains.scales[rows]

    def alike(self, count: int) -> Tensor:
        """The rows of so many runs of one CFG scale, the middle one, or of as many as there are."""
        rows, scales = self.runs()
        return rows[scales == scales.median()][:count]

    def field_of(self, rows: Tensor) -> Field:
        """The field that rows of chains were recorded from."""
        scale = float(self.chains.scales[rows[0]]) if self.chains.scales is not None else self.about["guidance"][0]
        interval = tuple(self.about["guidance_interval"])
        return self.backbone.field(self.chains.labels[rows], scale, interval, self.about["velocity"])

    def count(self, stage: str, calls: int, share: Share) -> None:
        """Note what a step costs, once for all its shares."""
        self.spent[stage] += calls * self.batch if share.index == 0 else 0

    def truth(self, rows: Tensor, t: Tensor) -> Tensor:
        """Recorded states at time t, on the backbone's device."""
        state = self.chains.ends(rows) if float(t) == 0 else self.chains.at(rows, t)
        return state.to(self.backbone.device)

    def noise(self, rows: Tensor) -> Tensor:
        """Where the runs began."""
        return self.chains.states[rows, torch.zeros_like(rows)].to(self.backbone.device)


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
    ours = Plan(field, sidenet, rollout.rule, None, starts_short(grid))
    line = Plan(field, StraightLine(), rollout.rule, None)
    branches = len(field.conditions)

    def anchor(x: Tensor, t: Tensor) -> Anchor:
        with torch.no_grad():
            return Anchor(x, field(x, t, branches), t)

    with torch.no_grad():
        left, previous = ours.first_anchor(rollout.noise(rows), grid[0], branches), None
    losses = []
    for index, (_, t1) in enumerate(pairwise(grid)):
        truth = rollout.truth(rows, t1)
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
    noise, truth = rollout.noise(rows), rollout.truth(rows, grid[-1])
    rollout.count("end point", 2 * (len(grid) - 1), share)
    with torch.no_grad():
        line = solve(field, None, noise, grid, rule=rollout.rule)
    return relative(solve(field, sidenet, noise, grid, rule=rollout.rule, skip_first=True), line, truth)
