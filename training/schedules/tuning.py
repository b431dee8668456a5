"""A schedule tuned end to end: its times and coefficients, by gradients of the end-point error.

Least squares brings every state near its trajectory; what counts is the last one. A schedule has about a hundred
numbers, so that some hundred steps find better ones without overfitting. Gradients pass through all model calls, each
of which is made again in the backward pass.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...bas_core.grids import as_grid
from ...bas_core.guidance import Field
from ...bas_core.schedule import Schedule, ScheduleHook
from ...bas_core.sidenet import SideNet
from ...bas_core.solver import make_solver, run_bi_anchor
from ..network.loop import LoopSettings, Microbatch, Numbers, train
from ..processes import PROCESSES
from ..progress import say
from ..recording.replay import RecomputedSideNet, Replay
from .solvers import endpoint_errors

# Samples a step: the fewer, the more steps for the same model calls. On the demo 640 samples end at .0237 by
# eights, .0231 by fours, .0227 by twos.
BATCH = 2
LEARNING_RATE, EMA = 0.02, 0.9
REPORTS = 4
VALIDATION_TRAJECTORIES = 16
# Times that stay, from the first on: whether the first step is analytic, and so the NFE, depends on it.
FIXED_TIMES = 2


def tuning_loop(steps: int, precision: str = "fp32", seed: int = 1) -> LoopSettings:
    """The loop of a tuning."""
    return LoopSettings(
        steps=steps,
        batch=math.lcm(BATCH, PROCESSES),
        learning_rate=LEARNING_RATE,
        warmup=0,
        ema=EMA,
        seed=seed,
        save_every=-(-steps // REPORTS),
        precision=precision,
    )


class TunedSchedule(nn.Module):
    """A schedule whose numbers are parameters.

    Args:
        schedule: where they begin.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        times = torch.stack(schedule.grid)
        self.begun, self.first = schedule, times[:FIXED_TIMES].tolist()
        self.log_steps = nn.Parameter(times[FIXED_TIMES - 1 :].diff().abs().log())
        self.coefficients = nn.ParameterList([nn.Parameter(torch.tensor(row)) for row in schedule.coefficients])
        self.cfg_coefficients = nn.ParameterList([nn.Parameter(torch.tensor(row)) for row in schedule.cfg_coefficients])

    def times(self) -> Tensor:
        """[N + 1] of them, from the first time to 0."""
        left = 1 - torch.softmax(self.log_steps, 0).cumsum(0)
        first = self.log_steps.new_tensor(self.first)
        return torch.cat([first, first[-1] * left[:-1], first.new_zeros(1)])

    def schedule(self) -> Schedule:
        """The schedule with the parameters' values."""
        return dataclasses.replace(
            self.begun,
            times=self.times().tolist(),
            coefficients=[row.tolist() for row in self.coefficients],
            cfg_coefficients=[row.tolist() for row in self.cfg_coefficients],
        )

    def forward(self, field: Field, noise: Tensor, sidenet: SideNet, start: float) -> Tensor:
        """The ends [B, C, *spatial] of samplings from noise at the time `start`."""
        hook = ScheduleHook(list(self.coefficients), list(self.cfg_coefficients), self.begun.steps)
        analytic = self.begun.analytic_first_step and start == 1
        network: Any = RecomputedSideNet(sidenet)
        solver = make_solver(field, network, self.begun.rule, hook, analytic_first_step=analytic)
        with warnings.catch_warnings():
            # The solver branches on times by their value, which is meant.
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar")
            return run_bi_anchor(solver, noise, tuple(as_grid(self.times() * start)))


def tune(
    sidenet: SideNet, parts: tuple[Replay, Replay], schedule: Schedule, nfe: int, loop: LoopSettings, folder: Path
) -> Schedule:
    """Tune a schedule; the model calls are added to the replays' `nfe`.

    Args:
        sidenet: left as it is.
        parts: trajectories to draw from, and validation trajectories, which choose between the results.
        schedule: where it begins.
        nfe: of the schedule, for the file names.
        loop: see `tuning_loop`.
        folder: of the training's state, log and plot; the same call continues from there.

    Returns:
        The tuned schedule, or the given one where tuning does not help on validation trajectories or there is too
        little memory for gradients.
    """
    replay, validation = parts
    rows, validation_rows = (
        replay.median_cfg_rows(len(replay.trajectories)),
        validation.median_cfg_rows(VALIDATION_TRAJECTORIES),
    )
    begun = TunedSchedule(schedule).to(replay.backbone.device)
    parameters = copy.deepcopy(begun)

    def error(tuned: TunedSchedule, source: Replay, drawn: Tensor, counted: int) -> Tensor:
        field = source.field_of(drawn)
        ends = tuned(field, source.noise(drawn), sidenet, source.backbone.start)
        source.nfe["tuning"] += round(field.nfe * counted)
        return endpoint_errors(ends, source.truth(drawn, torch.tensor(0.0))).mean()

    def loss_at(step: int, microbatch: Microbatch) -> Tensor:
        drawn = rows[torch.randint(len(rows), (loop.batch,), generator=loop.generator(step))]
        return error(parameters, replay, microbatch.of(drawn), loop.batch if microbatch.index == 0 else 0)

    def score(tuned: TunedSchedule, step: int) -> Numbers:
        with torch.no_grad():
            return {"score": error(tuned, validation, validation_rows, len(validation_rows)).item()}

    name = f"tune_{nfe}"
    try:
        tuned = train(parameters, loss_at, loop, name, folder / f"{name}.pt", score, folder)
        before, after = (score(each, 0)["score"] for each in (begun, tuned))
    except torch.OutOfMemoryError:
        say(
            f"There is not enough memory for a call with gradients: the schedule of {nfe} calls is not tuned. "
            "--tune 0 leaves tuning out."
        )
        return schedule
    if after < before:
        return tuned.schedule()
    say(f"Tuning {nfe} calls for {loop.steps} steps did not help (validation {before:.4f} -> {after:.4f}); undone.")
    return schedule
