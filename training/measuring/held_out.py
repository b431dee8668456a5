"""How far runs end from the recorded ends of noises that were held out: a short evaluation, with no new references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ...bas_core.runs import FittedRun
from ...bas_core.sidenet import SideNet
from ..progress import progress
from ..recording.replay import Replay
from ..runs.samplers import Sampler, baseline_sampler, sidenet_sampler
from .rivals import Measurement, measure

# On so many runs.
SCORED = 8
# The best of those that need nothing fitted, and are in every program.
RIVALS = ("adams_bashforth2", "dpmpp_2m")


def shifted(sampler: Sampler, calls: Sequence[int], shift: float) -> Sampler:
    """A sampler on the grids that people use: uniform, and shifted as the model is usually sampled."""
    return replace(sampler, given={n: sampler.times(n, (shift, 0.0)) for n in calls})


def score_held_out(sidenet: SideNet, runs: Mapping[int, FittedRun], replay: Replay) -> list[Measurement]:
    """Fitted runs beside multistep solvers, on held-out runs of one CFG scale; the cost is added to `replay.spent`."""
    rows = replay.alike(SCORED)
    ends, noise, start = replay.truth(rows, torch.zeros(())), replay.noise(rows), replay.backbone.start
    ours = replace(sidenet_sampler(sidenet, start=start), given=runs)
    others = [shifted(baseline_sampler(name, start), list(runs), replay.backbone.shift) for name in RIVALS]
    jobs = [(sampler, n, "best" if sampler is ours else "uniform") for n in runs for sampler in (ours, *others)]
    found = []
    with torch.inference_mode():
        for sampler, calls, grid in progress(jobs, "measure"):
            field = replay.field_of(rows)
            found.append(measure(sampler, field, noise, ends, calls, (1.0, 0.0), grid)[0])
            replay.spent["measured"] += round(field.cost * len(rows))
    return found
