"""Runs that take an image to its noise and bring it back, fitted together.

Each way by itself is a run like any other: weights by least squares, up to the states of an exact path and down to
those that the way up has been at. What they are for is the return, in which the errors of both ways can cancel: so both
are tuned together, by gradients of the return's error and of the noise's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ...bas_core.editing import START
from ...bas_core.flow import interpolate
from ...bas_core.grids import time_grid
from ...bas_core.guidance import Field
from ...bas_core.runs import FittedRun, Inversion
from ...bas_core.sidenet import SideNet
from ...bas_core.solver import Step, solve
from ..network.loop import LoopSettings
from ..progress import PROCESSES, progress
from ..recording.chains import check_alike, open_chains
from ..recording.replay import RecomputedSideNet, Replay
from ..recording.shards import save_shard
from ..recording.teacher import batch_generator, random_times, record_chain
from .fitting import Fitting, fit_run, on_runs
from .tuning import TunedRun, follow_gradients, times_as_parameters, tuned_or_kept, tuning_loop

# Images that runs are fitted on, and others that they are judged by; points of the exact paths from them.
FITTED, JUDGED, POINTS = 64, 16, 48
# Where the times begin, see `time_grid`: the best of nine for weights by least squares on the demo, at 7 calls.
SHAPE = (1.4, 0.5)
# Returns are a hundred times as exact as samplings: steps as long as in `tuning` would lead away from them.
LEARNING_RATE, BATCH = 0.005, 4
# What the noise's error counts for, of the return's; both as logarithms, as decibels are.
NOISE_SHARE = 0.3
# Of the noise that images are mixed with, and of the times of their paths.
START_SEED = 424_242


def paths_up(replay: Replay, count: int, folder: Path) -> Replay:
    """Exact paths from the ends of recorded runs to their noise, without guidance; the cost is added to `spent`.

    Every other image is mixed with a little noise first, as `editing.invert` mixes it: runs serve either.

    Args:
        replay: recorded runs.
        count: of how many.
        folder: for the paths, in shards; those that are there are not made again.
    """
    backbone = replay.backbone
    # A model that takes the scale as an input knows no call without guidance.
    scale = replay.about["guidance"][0] if backbone.embedded_guidance else 1.0
    about = replay.about | {"guidance": [scale, scale], "points": POINTS}
    unguided = dataclasses.replace(replay, chains=dataclasses.replace(replay.chains, scales=None), about=about)
    rows = replay.runs()[0][:count]
    for index, some in enumerate(progress(rows.split(about.get("record_batch") or len(rows)), "paths to noise")):
        path = folder / f"up-{index:05d}.safetensors"
        if not path.exists():
            save_shard(path, path_up(unguided, some, batch_generator(START_SEED, index)), about)
    found, said = open_chains((folder,))
    check_alike(about, said, str(folder), "asked for is")
    return dataclasses.replace(unguided, chains=found)


def path_up(replay: Replay, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The paths of some images, as shards hold them."""
    field, images = replay.field_of(rows), replay.chains.ends(rows).to(replay.backbone.device)
    times = START + (replay.backbone.start - START) * (1 - random_times(POINTS, generator, until=0.0))
    noise = torch.randn(images.shape, generator=generator).to(images)
    mixed = (torch.arange(len(rows)) % 2).view(-1, *[1] * (images.ndim - 1)).to(images)
    with torch.no_grad():
        states, velocities = record_chain(field, torch.lerp(images, interpolate(images, noise, START), mixed), times)
    replay.spent["inversions"] += field.calls * len(rows)
    labels = replay.chains.labels[rows]
    return {"times": times.expand(len(rows), -1), "states": states, "velocities": velocities, "labels": labels}


def fit_inversion(sidenet: SideNet, replay: Replay, calls: int) -> Inversion:
    """Weights by least squares each way, on the paths of `paths_up`."""
    up = on_runs(sidenet, replay, len(replay.chains))
    times = START + (up.start - START) * time_grid(calls, *SHAPE).flip(0)
    times[-1] = up.start
    visited: list[Step] = []
    with torch.inference_mode():
        noise, run = fit_run(up, FittedRun(times.tolist()), callback=visited.append)

        def been(t: Tensor) -> Tensor:
            return min(visited, key=lambda step: abs(step.time - float(t))).x

        down = Fitting(sidenet, up.field, noise, been, up.start)
        _, back = fit_run(down, FittedRun(times.flip(0).tolist()))
    replay.spent["inversions"] += up.field.calls * len(up.noise)
    return Inversion(run, back)


class TunedInversion(nn.Module):
    """An inversion whose numbers are parameters; the times are those of both ways.

    Args:
        inversion: where they begin.
    """

    def __init__(self, inversion: Inversion) -> None:
        super().__init__()
        self.up = TunedRun(inversion.up, held=1)
        self.back = nn.ParameterList([nn.Parameter(torch.tensor(row)) for row in inversion.down.step_weights])

    def inversion(self) -> Inversion:
        """As it stands, with gradients to the parameters."""
        up = self.up.run()
        return Inversion(up, FittedRun(self.up.times().flip(0), list(self.back), rule=up.rule))

    def forward(self, field: Field, image: Tensor, sidenet: SideNet) -> tuple[Tensor, Tensor]:
        """The image's noise and its return, [B, C, *spatial] each."""
        inversion, network = self.inversion(), RecomputedSideNet(sidenet)
        with times_as_parameters():
            noise = solve(field, network, image, inversion.up)
            return noise, solve(field, network, noise, inversion.down)


def log_error(x: Tensor, truth: Tensor) -> Tensor:
    """Mean over the batch of the logarithm of the mean squared error."""
    return (x - truth).square().flatten(1).mean(1).log().mean()


def tune_inversion(
    sidenet: SideNet, replay: Replay, inversion: Inversion, usual: LoopSettings, folder: Path
) -> Inversion:
    """Tune both ways together; what it cost is added to `spent`.

    Args:
        sidenet: left as it is.
        replay: of `paths_up`; the last JUDGED paths choose between what it comes to and where it began.
        inversion: where it begins.
        usual: what its loop is like; how many steps.
        folder: of the unfinished run, its log and its plot.
    """
    loop = dataclasses.replace(tuning_loop(usual), batch=math.lcm(BATCH, PROCESSES), learning_rate=LEARNING_RATE)
    rows = torch.arange(len(replay.chains))
    judged = max(1, min(JUDGED, len(rows) // 4))
    fitted, others = rows[:-judged], rows[-judged:]
    end = torch.tensor(replay.backbone.start)

    def error(tuned: TunedInversion, drawn: Tensor, counted: int) -> Tensor:
        field, image = replay.field_of(drawn), replay.noise(drawn)
        noise, back = tuned(field, image, sidenet)
        replay.spent["inversions"] += round(field.cost * counted)
        return log_error(back, image) + NOISE_SHARE * log_error(noise, replay.truth(drawn, end))

    begun = TunedInversion(inversion).to(replay.backbone.device)
    held_error = lambda tuned: error(tuned, others, len(others))  # noqa: E731
    path, what = folder / f"invert_{inversion.calls}.pt", f"the inversion in {inversion.calls} calls"
    tuned = follow_gradients(begun, (fitted, error), held_error, loop, path, what)
    if tuned is None:
        return inversion
    found = tuned.inversion()
    return Inversion(found.up.detached(), found.down.detached())


def learn_inversions(
    sidenet: SideNet, replay: Replay, calls: Sequence[int], usual: LoopSettings, paths: Path, folder: Path
) -> dict[int, Inversion]:
    """Inversions by the number of calls each way.

    Args:
        sidenet: left as it is.
        replay: recorded runs, whose ends are the images.
        calls: numbers of calls.
        usual: what the loop of a tuning is like; without steps there is none.
        paths: folder of the exact paths, see `paths_up`.
        folder: of the unfinished run.
    """
    up = paths_up(replay, FITTED + JUDGED, paths)
    found = {}
    for n in calls:
        found[n] = squares = fit_inversion(sidenet, up, n)
        if usual.steps:
            tuning = partial(tune_inversion, sidenet, up, squares, usual, folder)
            found[n] = tuned_or_kept(tuning, squares, f"the inversion in {n} calls")
    return found
