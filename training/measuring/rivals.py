"""The solvers that BA-solver is measured against, and one line of a table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...bas_core.guidance import Field
from ..schedules.solvers import GridShape, Solver, baseline_solver, endpoint_errors


def rivals(start: float = 1.0) -> list[Solver]:
    """The training-free solvers that BA-solver is measured against."""
    return [
        baseline_solver("euler", start),
        baseline_solver("heun", start),
        baseline_solver("adams_bashforth2", start),
        baseline_solver("dpmpp_2m", start),
        baseline_solver("unipc", start),
        baseline_solver("predictor_corrector", start),
    ]


def line_up(solvers: Sequence[Solver], numbers: Sequence[int]) -> list[tuple[Solver, int, str]]:
    """What a table compares: every solver at every NFE on both grids, and Euler with 100 calls."""
    jobs = [(solver, n, grid) for n in numbers for solver in solvers for grid in ("uniform", "best")]
    return [*jobs, (baseline_solver("euler", solvers[0].start), 100, "uniform")]


def converged_reference(field: Field, noise: Tensor, tolerance: float = 1e-5) -> Tensor:
    """The end of the path by adaptive Dormand-Prince 5 of `torchdiffeq`, relative and absolute tolerance alike."""
    from torchdiffeq import odeint

    ends = torch.tensor([1.0, 0.0], device=noise.device)
    return odeint(lambda t, x: field.velocity(x, t), noise, ends, rtol=tolerance, atol=tolerance, method="dopri5")[-1]


@dataclass(frozen=True)
class Measurement:
    """One line of a table.

    Attributes:
        solver, label: names of the solver.
        grid: "uniform" or "best".
        shape: (shift, cosine) of the grid.
        nfe: model calls, counted; a conditional-only call counts one half.
        error: mean over the noises of the end-point RMSE.
        spread: standard error of that mean.
        seconds: per image.
    """

    solver: str
    label: str
    grid: str
    shape: GridShape
    nfe: int
    error: float
    spread: float
    seconds: float


def measure(
    solver: Solver, field: Field, noise: Tensor, reference: Tensor, nfe: int, shape: GridShape, grid: str
) -> tuple[Measurement, Tensor]:
    """Sample, compare with the reference, and time it.

    Returns:
        The table's line, and the samples [B, C, *spatial].
    """
    before = field.nfe
    start = time.perf_counter()
    x = solver.sample(field, noise, nfe, shape)
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / len(noise)
    errors = endpoint_errors(x, reference)
    spread = (errors.std() / len(noise) ** 0.5).item() if len(noise) > 1 else 0.0
    line = Measurement(
        solver.name, solver.label, grid, shape, round(field.nfe - before), errors.mean().item(), spread, seconds
    )
    return line, x
