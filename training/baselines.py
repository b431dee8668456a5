"""Training-free solvers to compare with: each a short step `(velocity, x, t0, t1, history) -> (x at t1, history)`.

`velocity(x, t)` is the guided velocity; `history` holds the (time, velocity) pairs of earlier steps, latest last.
The converged reference is taken from `torchdiffeq` (see `training/measuring`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..bas_core.flow import velocity_to_x0
from ..bas_core.grids import as_grid
from ..bas_core.guidance import Field
from ..bas_core.solver import Callback, StepResult, as_state, run_steps, solve

Velocity = Callable[[Tensor, Tensor], Tensor]
History = tuple[tuple[Tensor, Tensor], ...]
Stepper = Callable[[Velocity, Tensor, Tensor, Tensor, History], tuple[Tensor, History]]


def _evaluate(velocity: Velocity, x: Tensor, t: Tensor, history: History, keep: int) -> tuple[Tensor, History]:
    v = velocity(x, t)
    return v, (*history, (t, v))[-keep:]


def euler(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
    """Order 1."""
    v, history = _evaluate(velocity, x, t0, history, 1)
    return x + (t1 - t0) * v, history


def heun(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
    """Explicit trapezoid, order 2."""
    v0, history = _evaluate(velocity, x, t0, history, 1)
    v1 = velocity(x + (t1 - t0) * v0, t1)
    return x + (t1 - t0) / 2 * (v0 + v1), history


def midpoint(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
    """Explicit midpoint, order 2."""
    v0, history = _evaluate(velocity, x, t0, history, 1)
    half = (t1 - t0) / 2
    return x + (t1 - t0) * velocity(x + half * v0, t0 + half), history


def rk4(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
    """The classical Runge-Kutta method, order 4."""
    step, half = t1 - t0, (t1 - t0) / 2
    a, history = _evaluate(velocity, x, t0, history, 1)
    b = velocity(x + half * a, t0 + half)
    c = velocity(x + half * b, t0 + half)
    d = velocity(x + step * c, t1)
    return x + step / 6 * (a + 2 * b + 2 * c + d), history


def adams_weights(times: list[float], t0: float, t1: float) -> list[float]:
    """Weights that integrate over [t0, t1] the polynomial through velocities at `times`."""
    # Powers of (t - t0) / (t1 - t0): well scaled whatever the step.
    s = (np.asarray(times) - t0) / (t1 - t0)
    powers = np.arange(len(s))
    return list(np.linalg.solve(s[None] ** powers[:, None], (t1 - t0) / (powers + 1.0)))


def _adams_step(x: Tensor, history: History, t0: Tensor, t1: Tensor, sign: int = 1) -> Tensor:
    """x moved by the integral over [t0, t1] of the polynomial through all velocities of the history; or back."""
    weights = adams_weights([float(t) for t, _ in history], float(t0), float(t1))
    return _weighted(x, history, [sign * weight for weight in weights])


def _weighted(x: Tensor, history: History, weights: Sequence[float]) -> Tensor:
    """x plus the weighted velocities of the history."""
    for weight, (_, v) in zip(weights, history, strict=True):
        x = torch.add(x, v, alpha=weight)
    return x


def _adams_bashforth(order: int) -> Stepper:
    def step(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
        _, history = _evaluate(velocity, x, t0, history, order)
        return _adams_step(x, history, t0, t1), history

    step.__name__ = f"adams_bashforth{order}"
    step.__doc__ = f"Adams-Bashforth with variable steps, order {order}; lower while the history is short."
    return step


PREDICTOR_ORDER = 3


def adams_pec(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
    """Adams-Bashforth 3 predicts, Adams-Moulton 4 corrects with the velocity at what was predicted: order 4.

    One call a step, as the corrected state is not evaluated again (PEC; Hairer, Norsett and Wanner, section III.1): a
    step begins and ends at predicted states, and corrects the one that it began at after the call.
    """
    _, history = _evaluate(velocity, x, t0, history, PREDICTOR_ORDER + 1)
    if len(history) > 1:
        before = history[-2][0]
        x = _adams_step(x, history[-1 - PREDICTOR_ORDER : -1], before, t0, -1)
        x = _adams_step(x, history, before, t0)
    return _adams_step(x, history[-PREDICTOR_ORDER:], t0, t1), history


IPNDM_ORDER = 4


def ipndm(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
    """Improved PNDM (Zhang and Chen 2022, arXiv 2204.13902): Adams-Bashforth 4 with the weights of equal steps.

    Whatever the steps are; so it is of order 1 on most grids. The last step, onto t = 0, is Euler's, as in ComfyUI.
    """
    _, history = _evaluate(velocity, x, t0, history, IPNDM_ORDER)
    known = history if float(t1) else history[-1:]
    equal = adams_weights(list(range(1 - len(known), 1)), 0, 1)
    return _weighted(x, known, [weight * float(t1 - t0) for weight in equal]), history


DEIS_ORDER = 3
# DEIS interpolates in the time of a variance-preserving schedule. It is that of EDM (Karras et al. 2022, appendix C.1)
# whose sigmas go from .002 at time .001 to 80 at time 1, as ComfyUI has it.
VP_BETA_D = 2 * (np.log1p(80**2) - np.log1p(0.002**2) / 0.001) / (1 - 0.001)
VP_BETA_MIN = np.log1p(80**2) - VP_BETA_D / 2
DEIS_NODES = 12


def _vp_time(t: np.ndarray) -> np.ndarray:
    return (np.sqrt(VP_BETA_MIN**2 + 2 * VP_BETA_D * np.log1p(t**2)) - VP_BETA_MIN) / VP_BETA_D


def deis(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
    """DEIS, tAB (Zhang and Chen 2022, arXiv 2204.13902, section 3): Adams-Bashforth 3 in a variance-preserving time.

    Its first step is Euler's, and the last one onto t = 0, as in ComfyUI's sampler of this name.
    """
    _, history = _evaluate(velocity, x, t0, history, DEIS_ORDER)
    known = history if float(t1) else history[-1:]
    times = _vp_time(np.array([float(t) for t, _ in known]))
    nodes, shares = np.polynomial.legendre.leggauss(DEIS_NODES)
    length = float(t1) - float(t0)
    at = _vp_time(float(t0) + length * (nodes + 1) / 2)
    weights = []
    for j, time in enumerate(times):
        others = np.delete(times, j)
        polynomial = np.prod((at[:, None] - others) / (time - others), axis=1)
        weights.append(float(length / 2 * shares @ polynomial))
    return _weighted(x, known, weights), history


def dpm_2(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
    """DPM-Solver-2 (Lu et al. 2022; k-diffusion's `sample_dpm_2`): the midpoint in log t, order 2.

    A step onto t = 0 has its midpoint there, and is of order 1.
    """
    v, history = _evaluate(velocity, x, t0, history, 1)
    between = (t0 * t1).sqrt()
    return x + (t1 - t0) * velocity(x + (between - t0) * v, between), history


def res_multistep(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
    """Refined exponential solver, multistep, order 2 (Zhang et al. 2023, arXiv 2308.02157): exponential in -log t.

    The first step, and the last one onto t = 0, are Euler's, as in ComfyUI's sampler of this name.
    """
    if float(t0) == 0:
        raise ValueError("The exponential solver predicts the data and cannot leave t = 0; start the grid above 0.")
    v = velocity(x, t0)
    data = velocity_to_x0(x, v, t0)
    memory = ((t0, data),)
    if not history or float(t1) == 0:
        return x + (t1 - t0) * v, memory
    earlier, previous = history[-1]
    step = torch.log(t0.double() / t1.double())
    phi1 = -torch.expm1(-step) / step
    phi2 = (1 - phi1) / step
    share = phi2 / (torch.log(earlier.double() / t0.double()) / step)
    guess = step * ((phi1 + share) * data - share * previous)
    return (t1 / t0) * x + guess.to(x.dtype), memory


def _half_log_snr(t: Tensor) -> Tensor:
    """log((1 - t) / t), finite at the ends."""
    # 1e-4 from either end, as ComfyUI offsets the first sigma of flow models.
    t = t.double().clamp(1e-4, 1 - 1e-4)
    return torch.log1p(-t) - torch.log(t)


def dpmpp_2m(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) on the flow path: alpha = 1 - t, sigma = t; data prediction.

    The last step, onto t = 0, is of first order, as in the authors' code for few steps; so is the first.
    """
    if float(t0) == 0:
        raise ValueError("DPM-Solver++ predicts the data and cannot leave t = 0; start the time grid above 0.")
    data = velocity_to_x0(x, velocity(x, t0), t0)
    lam, lam_next = _half_log_snr(t0), _half_log_snr(t1)
    guess = data
    if history and float(t1) > 0:
        earlier, previous = history[-1]
        ratio = (lam - _half_log_snr(earlier)) / (lam_next - lam)
        guess = data + ((data - previous) / (2 * ratio)).to(x.dtype)
    # exp(-(lam_next - lam)) times alpha, written so that it is exact at both ends.
    shrink = (1 - t1) - (1 - t0) * t1 / t0
    return t1 / t0 * x + shrink * guess, ((t0, data),)


def unipc(velocity: Velocity, x: Tensor, t0: Tensor, t1: Tensor, history: History) -> tuple[Tensor, History]:
    """UniPC (Zhao et al. 2023, algorithms 7 and 8) on the flow path: UniP-2 with UniC-2, data prediction, "bh2".

    A step corrects the state that it begins at, after the call, and predicts the next one. The last step, onto t = 0,
    is of first order, as in diffusers' scheduler of this name. On interior times it is of order 3.
    """
    if float(t0) == 0:
        raise ValueError("UniPC predicts the data and cannot leave t = 0; start the time grid above 0.")
    data = velocity_to_x0(x, velocity(x, t0), t0)
    known = [(_log_odds(t), each) for t, each in history[:-1]]
    lam, lam_next = _log_odds(t0), _log_odds(t1)
    if history:
        time, before = history[-1]
        lam_before, data_before = known[-1]
        x = _exponential_euler(before, data_before, time, t0)
        shares = _unipc_corrector(lam - lam_before, [lam_before - each for each, _ in known[:-1]])
        scale = float(1 - t0) * -float(np.expm1(lam_before - lam))
        for share, other in zip(shares, [*(d for _, d in known[:-1]), data], strict=True):
            x = x + scale * share * (other - data_before)
    x_next = _exponential_euler(x, data, t0, t1)
    if history and float(t1) > 0:
        ratio = (lam - known[-1][0]) / (lam_next - lam)
        scale = float(1 - t1) * -float(np.expm1(lam - lam_next))
        x_next = x_next + scale / (2 * ratio) * (data - known[-1][1])
    return x_next, (*history[-2:-1], (t0, data), (t0, x))


def _log_odds(t: Tensor) -> float:
    """log((1 - t) / t), the half log SNR; at t = 1 that of 1 - 1e-6, as in diffusers."""
    noise = min(max(float(t), 1e-6), 1 - 1e-6)
    return float(np.log(1 - noise) - np.log(noise))


def _exponential_euler(x: Tensor, data: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    """The step to t1 along which the predicted data stays."""
    return t1 / t0 * x + ((1 - t1) - (1 - t0) * t1 / t0) * data


def _unipc_corrector(step: float, earlier: Sequence[float]) -> list[float]:
    """Weights of the differences of data, at an earlier time if there is one and at the step's end (UniPC, section 3).

    Args:
        step: h, in half log SNR.
        earlier: how far before the step's start the earlier time lies.
    """
    if not earlier:
        return [0.5]
    total = float(np.expm1(-step))
    first = -total / step - 1
    moments = first / total, 2 * (-first / step - 0.5) / total
    ratio = -earlier[0] / step
    share = (moments[1] - moments[0]) / (ratio - 1)
    return [share / ratio, moments[0] - share]


@dataclass(frozen=True)
class Baseline:
    """A training-free solver.

    Attributes:
        name: what users call it.
        label: what tables and plots call it.
        order: of convergence.
        calls_per_step: backbone calls a step.
        first_calls: backbone calls before the first step, beside its own.
        step: see the module's docstring; None for the one that is `solve` without a SideNet.
    """

    name: str
    label: str
    order: int
    calls_per_step: int
    step: Stepper | None
    first_calls: int = 0


BASELINES: dict[str, Baseline] = {
    b.name: b
    for b in (
        Baseline("euler", "Euler", 1, 1, euler),
        Baseline("heun", "Heun", 2, 2, heun),
        Baseline("midpoint", "midpoint", 2, 2, midpoint),
        Baseline("rk4", "RK4", 4, 4, rk4),
        Baseline("adams_bashforth2", "Adams-Bashforth 2", 2, 1, _adams_bashforth(2)),
        Baseline("adams_bashforth3", "Adams-Bashforth 3", 3, 1, _adams_bashforth(3)),
        Baseline("adams_bashforth4", "Adams-Bashforth 4", 4, 1, _adams_bashforth(4)),
        Baseline("adams_pec", "Adams PEC", 4, 1, adams_pec),
        Baseline("predictor_corrector", "AB2 + trapezoid", 2, 1, None),
        Baseline("dpmpp_2m", "DPM-Solver++(2M)", 2, 1, dpmpp_2m),
        Baseline("deis", "DEIS", 3, 1, deis),
        Baseline("dpm_2", "DPM-Solver-2", 2, 2, dpm_2),
        Baseline("ipndm", "iPNDM", 1, 1, ipndm),
        Baseline("unipc", "UniPC", 2, 1, unipc),
        Baseline("res_multistep", "RES multistep", 2, 1, res_multistep),
    )
}


def get_baseline(name: str) -> Baseline:
    """A baseline by name.

    Raises:
        ValueError: unknown name; the message lists the valid ones.
    """
    if name not in BASELINES:
        raise ValueError(f"Unknown solver {name!r}. Valid solvers: {', '.join(BASELINES)}.")
    return BASELINES[name]


def run_baseline(
    solver: Baseline | str, field: Field, x: Tensor, times: Tensor, callback: Callback | None = None
) -> Tensor:
    """Integrate the field over a time grid with a training-free solver.

    Args:
        solver: a baseline or its name.
        field: the velocity field.
        x: [B, C, *spatial] state at `times[0]`.
        times: [N + 1] strictly descending or ascending, within [0, 1].
        callback: sees every finished step; may raise to stop.

    Returns:
        [B, C, *spatial] state at `times[-1]`.

    Raises:
        ValueError: an argument does not fit.
        NonFiniteError: the backbone returned NaN or infinity.
    """
    solver = get_baseline(solver) if isinstance(solver, str) else solver
    if solver.step is None:
        return solve(field, None, x, times, callback=callback)
    x = as_state(x)
    grid = [t.to(x.dtype) for t in as_grid(times)]
    take = solver.step

    def step(index: int, x: Tensor, history: History | None) -> StepResult:
        evaluated: list[Tensor] = []

        def velocity(at: Tensor, t: Tensor) -> Tensor:
            evaluated.append(field.velocity(at, t))
            return evaluated[-1]

        x_next, history = take(velocity, x, grid[index], grid[index + 1], history or ())
        return StepResult(x_next, evaluated[0], history)

    return run_steps(step, field, x, [float(t) for t in grid], callback)
