"""Solvers by name, and the paper's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...bas_core.prediction import SideNetProtocol
from ...bas_core.schedule import Schedule
from ...bas_core.solver import METHODS, solve
from ..baselines import BASELINES
from ..schedules.solvers import Solver, baseline_solver, sidenet_solver
from ..settings import UsageError, parse_nfe

MULTISTEP = "multistep"
NAMES = (*METHODS, MULTISTEP, *BASELINES)


@dataclass(frozen=True)
class Preset:
    """Settings of the paper's tables (arXiv 2601.21542, section 4): class-conditional ImageNet, SiT-XL/2 + REPA.

    Attributes:
        calls: model calls, on the uniform grid.
        guidance: CFG scale.
        interval: guidance applies where lo < t <= hi.
    """

    calls: int
    guidance: float = 1.5
    interval: tuple[float, float] = (0.0, 0.7)


PRESETS = {f"paper-{calls}": Preset(calls) for calls in (5, 7, 8, 10, 15)}


def solver_named(name: str, sidenet: SideNetProtocol | None, schedules: Mapping[int, Schedule], start: float) -> Solver:
    """A solver by name.

    Args:
        name: one of NAMES.
        sidenet: for those that need one.
        schedules: of the SideNet, for bi_anchor; may be empty.
        start: time of the model's noise.

    Raises:
        UsageError: an unknown name, or a solver that needs a SideNet without one.
    """
    if name not in NAMES:
        raise UsageError(f"There is no solver {name!r}. Valid ones: {', '.join(NAMES)}.")
    if name in BASELINES:
        return baseline_solver(name, start)
    if name == MULTISTEP:
        return Solver(name, name, lambda field, x, times: solve(field, None, x, times), start=start)
    if sidenet is None:
        raise UsageError(f"The solver {name} needs a SideNet. Give --sidenet FILE, or --method {MULTISTEP}.")
    solver = sidenet_solver(sidenet, name, name, start, method=name)
    return replace(solver, schedules=schedules) if schedules and name == METHODS[0] else solver


def parse_rival(text: str) -> tuple[str, int]:
    """'euler:50' to a solver's name and its calls.

    Raises:
        UsageError: it is not of that form.
    """
    name, colon, calls = text.partition(":")
    if not colon:
        raise UsageError(f"--compare must be a solver, a colon and its calls, such as euler:50; got {text!r}.")
    return name, parse_nfe(calls, "--compare")[0]
