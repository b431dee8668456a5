"""A run tuned end to end: its times, step weights and half calls, by gradients of the end-point error.

Least squares brings every state of a run near the path; what counts is the last one. A run has some hundred numbers at
most, so that a few dozen steps on ever new recorded runs find better ones and learn none of the runs by heart.
Gradients pass through all calls of the backbone: each keeps its activations, and takes about three times as long.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..bas_core.guidance import Field
from ..bas_core.half_calls import HalfCallField
from ..bas_core.sidenet import SideNet
from ..bas_core.solver import Proposal, solve
from ..bas_core.step_weights import add_terms, place, terms
from .closed_loop import Rollout
from .evaluate import endpoint_errors, sidenet_sampler
from .progress import progress
from .time_grids import Learned

LEARNING_RATE = 0.02


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


def tune(sidenet: SideNet, rollout: Rollout, learned: Learned, steps: int, seed: int) -> Learned:
    """Tune what was learned for every number of calls; what it cost is added to `rollout.spent`.

    Args:
        sidenet: left as it is.
        rollout: the backbone, and the recorded runs to draw from, `rollout.batch` a step.
        learned: where it begins.
        steps: of Adam, for each number of calls; the rate falls to nothing.
        seed: of the runs that are drawn.
    """
    rows = rollout.alike(len(rollout.chains))
    skips = sidenet_sampler(sidenet, start=rollout.backbone.start).skip_first
    tuned = Learned()
    generator = torch.Generator().manual_seed(seed)
    for calls, grid in learned.time_grids.items():
        run = TunedRun(grid, learned.step_weights[calls], learned.half_calls.get(calls))
        optimizer = torch.optim.Adam(run.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in progress(range(steps), f"tune {calls} calls"):
            drawn = rows[torch.randint(len(rows), (rollout.batch,), generator=generator)]
            field = rollout.field_of(drawn)
            ends = run(field, rollout.noise(drawn), sidenet, rollout, skips)
            loss = endpoint_errors(ends, rollout.truth(drawn, torch.tensor(0.0))).mean()
            optimizer.zero_grad()
            loss.backward(inputs=list(run.parameters()))  # some backbones' weights would take gradients too
            optimizer.step()
            schedule.step()
            rollout.spent["tuning"] += field.calls * len(drawn)
        tuned.time_grids[calls] = run.times().tolist()
        tuned.step_weights[calls] = [row.tolist() for row in run.step_weights]
        if run.half_calls:
            tuned.half_calls[calls] = [row.tolist() for row in run.half_calls]
    return tuned
