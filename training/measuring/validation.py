"""End-point errors on validation trajectories: a short evaluation that needs no new reference solutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ...bas_core.schedule import Schedule
from ...bas_core.sidenet import SideNet
from ..progress import progress
from ..recording.replay import Replay
from ..schedules.solvers import baseline_solver, sidenet_solver
from .rivals import Measurement, measure

# On so many trajectories.
VALIDATED = 8
# The best solvers that need nothing fitted and are in every program.
RIVALS = ("adams_bashforth2", "dpmpp_2m")


def score_validation(sidenet: SideNet, schedules: Mapping[int, Schedule], replay: Replay) -> list[Measurement]:
    """Schedules beside multistep solvers on the grid that the model is usually sampled on, at one CFG scale; the model
    calls are added to `replay.nfe`."""
    rows = replay.median_cfg_rows(VALIDATED)
    ends, noise, start = replay.truth(rows, torch.zeros(())), replay.noise(rows), replay.backbone.start
    ours = replace(sidenet_solver(sidenet, start=start), schedules=schedules)
    shifted = (replay.backbone.shift, 0.0)
    jobs = [(solver, n) for n in schedules for solver in (ours, *(baseline_solver(name, start) for name in RIVALS))]
    found = []
    with torch.inference_mode():
        for solver, n in progress(jobs, "measure"):
            field = replay.field_of(rows)
            grid = "best" if solver is ours else "uniform"
            found.append(measure(solver, field, noise, ends, n, shifted, grid)[0])
            replay.nfe["validation"] += round(field.nfe * len(rows))
    return found
