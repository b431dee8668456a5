"""The errors that a search found on its validation trajectories, as lines of a table."""

from __future__ import annotations

from collections.abc import Mapping

from ..schedules.judging import Found
from .rivals import Measurement

KNOWN = "best known method"


def validation_rows(found: Mapping[int, Found]) -> list[Measurement]:
    """For each NFE the schedule's line, and that of the best known method on its best grid, as the surrogate has it."""
    rows = []
    for n, each in found.items():
        rows.append(Measurement("ba_solver", "BA-solver", "best", (0.0, 0.0), n, each.error, each.standard_error,
                                each.seconds))  # fmt: skip
        rows.append(Measurement("known", KNOWN, "best", (0.0, 0.0), n, each.known_error, 0.0, each.seconds))
    return rows
