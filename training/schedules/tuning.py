"""A run tuned end to end: its times, step weights and half calls, by gradients of the end-point error.

Least squares brings every state of a run near the path; what counts is the last one. A run has some hundred numbers at
most, so that some hundred steps on recorded runs find better ones and learn none of the runs by heart.
Gradients pass through all calls of the backbone: each is made again on the way back, and takes four times as long.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...bas_core.grids import as_grid
from ...bas_core.guidance import Field
from ...bas_core.schedule import Schedule, ScheduleHook
from ...bas_core.sidenet import SideNet
from ...bas_core.solver import make_solver, run_bi_anchor
from ..network.loop import LoopSettings, Model, Numbers, Share, train
from ..processes import PROCESSES
from ..progress import say
from ..recording.replay import SCORED_RUNS, RecomputedSideNet, Replay
from .solvers import endpoint_errors

Found = TypeVar("Found")

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
    )


def tuned_or_kept(tuning: Callable[[], Found], found: Found, what: str) -> Found:
    """What tuning comes to; what was found before, where the memory for it is not there."""
    try:
        return tuning()
    except torch.OutOfMemoryError:
        say(
            f"There is not enough memory for a call with gradients, which tuning takes: times and weights of {what} "
            "stay as they were found. With --tune 0 it is not tried."
        )
        return found


@contextmanager
def times_as_parameters() -> Iterator[None]:
    """The solver asks times for their value to decide by, which is meant: torch need not warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar")
        yield


class TunedSchedule(nn.Module):
    """A schedule whose times and coefficients are parameters.

    Args:
        schedule: the starting values.
        fixed: how many of its times stay, from the first on, beside the last one. The first step stays: its length
            decides whether it is analytic, and so the NFE.
    """

    def __init__(self, schedule: Schedule, fixed: int = 2) -> None:
        super().__init__()
        times = torch.stack(schedule.grid)
        self.schedule = schedule
        self.fixed, self.last = times[:fixed].tolist(), float(times[-1])
        self.log_steps = nn.Parameter(times[fixed - 1 :].diff().abs().log())
        self.coefficients = nn.ParameterList([nn.Parameter(torch.tensor(row)) for row in schedule.coefficients])
        self.cfg_coefficients = nn.ParameterList([nn.Parameter(torch.tensor(r)) for r in schedule.cfg_coefficients])

    def times(self) -> Tensor:
        """[N + 1], in the direction of the schedule."""
        left = 1 - torch.softmax(self.log_steps, 0).cumsum(0)
        fixed, last = self.log_steps.new_tensor(self.fixed), self.log_steps.new_tensor([self.last])
        return torch.cat([fixed, last + (fixed[-1] - last) * left[:-1], last])

    def found(self) -> Schedule:
        """The schedule with the parameters' values."""
        return dataclasses.replace(
            self.schedule,
            times=self.times().tolist(),
            coefficients=[row.tolist() for row in self.coefficients],
            cfg_coefficients=[row.tolist() for row in self.cfg_coefficients],
        )

    def forward(self, field: Field, noise: Tensor, sidenet: SideNet, start: float) -> Tensor:
        """The ends [B, C, *spatial] of samplings from noise at the time `start`."""
        hook = ScheduleHook(list(self.coefficients), list(self.cfg_coefficients), self.schedule.steps)
        analytic = self.schedule.analytic_first_step and start == 1
        network: Any = RecomputedSideNet(sidenet)
        solver = make_solver(field, network, self.schedule.rule, hook, analytic_first_step=analytic)
        with times_as_parameters():
            return run_bi_anchor(solver, noise, tuple(as_grid(self.times() * start)))


def tune(
    sidenet: SideNet, parts: tuple[Replay, Replay], run: Schedule, calls: int, loop: LoopSettings, folder: Path
) -> Schedule:  # fmt: skip
    """Tune a run; what it cost is added to the replays' `spent`.

    Args:
        sidenet: left as it is.
        parts: the recorded runs to draw from, and those that were held out, on which to choose between what it comes
            to on the way and where it began.
        run: where it begins.
        calls: that it costs, for the file names.
        loop: see `tuning_loop`.
        folder: of the unfinished run, its log and its plot; the same call goes on from there.
    """
    replay, validation = parts
    rows, scored = replay.alike(len(replay.trajectories)), validation.alike(SCORED_RUNS)
    backbone = replay.backbone

    def error(tuned: TunedSchedule, source: Replay, drawn: Tensor, counted: int) -> Tensor:
        field = source.field_of(drawn)
        ends = tuned(field, source.noise(drawn), sidenet, backbone.start)
        source.spent["tuning"] += round(field.nfe * counted)
        return endpoint_errors(ends, source.truth(drawn, torch.tensor(0.0))).mean()

    begun = TunedSchedule(run).to(backbone.device)
    drawn_error = lambda tuned, drawn, counted: error(tuned, replay, drawn, counted)  # noqa: E731
    held_error = lambda tuned: error(tuned, validation, scored, len(scored))  # noqa: E731
    tuned = follow_gradients(
        begun, (rows, drawn_error), held_error, loop, folder / f"tune_{calls}.pt", f"{calls} calls"
    )
    return run if tuned is None else tuned.found()


def follow_gradients(
    begun: Model,
    fitted: tuple[Tensor, Callable[[Model, Tensor, int], Tensor]],
    held_error: Callable[[Model], Tensor],
    loop: LoopSettings,
    path: Path,
    what: str,
) -> Model | None:
    """Tune a module by gradients of an error; None where that does not help what was held out.

    Args:
        begun: left as it is.
        fitted: rows to draw from, and the error of some of them, with how many samples' calls are to be counted.
        held_error: the error of what was held out.
        loop: see `tuning_loop`.
        path: of the unfinished run; its log and its plot lie beside it.
        what: is tuned, in words.
    """
    rows, error = fitted
    parameters = copy.deepcopy(begun)

    def loss_at(step: int, share: Share) -> Tensor:
        drawn = torch.randint(len(rows), (loop.batch,), generator=loop.generator(step))
        return error(parameters, share.of(rows[drawn]), loop.batch if share.index == 0 else 0)

    def score(tuned: Model, step: int) -> Numbers:
        with torch.no_grad():
            return {"score": held_error(tuned).item()}

    tuned = train(parameters, loss_at, loop, path.stem, path, score, path.parent)
    before, after = (score(each, 0)["score"] for each in (begun, tuned))
    if after < before:
        return tuned
    say(f"Tuning {what} for {loop.steps} steps did not help (held out {before:.4f} -> {after:.4f}); undone.")
    return None
