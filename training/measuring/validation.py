"""How far runs end from the recorded ends of noises that were held out: a short evaluation, with no new references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ...bas_core.schedule import Schedule
from ...bas_core.sidenet import SideNet
from ..progress import progress
from ..recording.replay import Replay
from ..schedules.solvers import Solver, baseline_solver, sidenet_solver
from .rivals import Measurement, measure

# On so many runs.
SCORED = 8
# The best of those that need nothing fitted, and are in every program.
RIVALS = ("adams_bashforth2", "dpmpp_2m")


def shifted(solver: Solver, calls: Sequence[int], shift: float) -> Solver:
    """A solver on the grids that people use: uniform, and shifted as the model is usually sampled."""
    return replace(solver, given={n: solver.times(n, (shift, 0.0)) for n in calls})


def score_validation(sidenet: SideNet, runs: Mapping[int, Schedule], replay: Replay) -> list[Measurement]:
    """Fitted runs beside multistep solvers, on held-out runs of one CFG scale; the cost is added to `replay.spent`."""
    rows = replay.alike(SCORED)
    ends, noise, start = replay.truth(rows, torch.zeros(())), replay.noise(rows), replay.backbone.start
    ours = replace(sidenet_solver(sidenet, start=start), given=runs)
    others = [shifted(baseline_solver(name, start), list(runs), replay.backbone.shift) for name in RIVALS]
    jobs = [(solver, n, "best" if solver is ours else "uniform") for n in runs for solver in (ours, *others)]
    found = []
    with torch.inference_mode():
        for solver, calls, grid in progress(jobs, "measure"):
            field = replay.field_of(rows)
            found.append(measure(solver, field, noise, ends, calls, (1.0, 0.0), grid)[0])
            replay.spent["measured"] += round(field.nfe * len(rows))
    return found
