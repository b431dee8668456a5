"""The numerical checks, as functions of the thing checked, so that `test_power.py` can give them damaged ones."""

from collections.abc import Callable

import torch
from ba_solver.bas_core import Baseline, Guidance, get_rule, model_field, run_baseline, solve
from problems import (
    Oracle,
    class_velocity,
    endpoint_error,
    exact_field,
    labels,
    noise,
    observed_order,
    seeded_multistep,
    small_sidenet,
    smooth_grid,
    state,
    uneven_grid,
)
from reference import naive_bi_anchor
from torch import Tensor

TOLERANCE = 0.15
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def check_order(run: Callable[[Tensor, Tensor], Tensor], order: int, grids: list[Tensor]) -> None:
    """The order between the finest two of the grids, each of which halves the steps of the one before."""
    errors = [endpoint_error(run, times) for times in grids]
    measured = observed_order(errors)[-1]
    assert abs(measured - order) <= TOLERANCE, f"order {measured:.2f} instead of {order}; errors {errors}"


def check_baseline_order(solver: Baseline, ends: tuple[float, float] = (1.0, 0.0)) -> None:
    """Multistep methods above order 2 are given their history, for a first step of order 1 limits them to 2."""

    def run(x: Tensor, times: Tensor) -> Tensor:
        if solver.order > 2 and solver.name.startswith("adams"):
            return seeded_multistep(solver.step, solver.order, x, times)
        return run_baseline(solver, exact_field(), x, times)

    check_order(run, solver.order, [uneven_grid(n, *ends) for n in (40, 80)])


def run_oracle(rule: str, anchors: int = 1, method: str = "bi_anchor", error: float = 0.0) -> Callable:
    return lambda x, times: solve(exact_field(), Oracle(anchors, error), x, times, rule=rule, method=method)


def check_oracle_order(rule: str, order: int, steps: tuple[int, ...], anchors: int = 1, **options) -> None:
    """With exact velocities in the SideNet's place, the order is the quadrature's degree of exactness plus one."""
    ends = options.pop("ends", (1.0, 0.0))
    check_order(run_oracle(rule, anchors, **options), order, [smooth_grid(n, *ends) for n in steps])


def check_calls(sidenet, method: str, intervals: int) -> None:
    """N intervals cost exactly N backbone calls."""
    field = exact_field()
    solve(field, sidenet, state(), smooth_grid(intervals), method=method)
    assert field.calls == intervals


def check_baseline_calls(solver: Baseline, intervals: int) -> None:
    field = exact_field()
    run_baseline(solver, field, state(), smooth_grid(intervals, 0.9, 0.1))
    assert field.calls == intervals * solver.calls_per_step


def guided_field(batch: int, guidance: Guidance, mode: str = "branch"):
    return model_field(class_velocity, *labels(batch), guidance=guidance, mode=mode)


def check_independence(sidenet) -> None:
    """A batch is solved as its items are one by one."""
    x, (cond, uncond), guidance = noise(3, 2, 4, 4), labels(3), Guidance(2.0, (0.0, 0.7))
    together = solve(model_field(class_velocity, cond, uncond, guidance), sidenet, x, smooth_grid(4))
    for i in range(3):
        item = slice(i, i + 1)
        alone = solve(model_field(class_velocity, cond[item], uncond[item], guidance), sidenet, x[item], smooth_grid(4))
        torch.testing.assert_close(together[item], alone, **TIGHT)


def check_chunking(sidenet, chunk: int) -> None:
    """The result does not depend on how the SideNet calls are cut up."""
    x, guidance = noise(3, 2, 4, 4), Guidance(2.0, (0.0, 0.7))
    whole, cut = (solve(guided_field(3, guidance), sidenet, x, smooth_grid(3), chunk=size) for size in (None, chunk))
    torch.testing.assert_close(cut, whole, **TIGHT)


def check_matches_naive(rule: str, anchors: int, times: Tensor, guidance: Guidance, seed: int = 0) -> None:
    """The solver computes what PAPER.md section 2 says, written out without batching or savings."""
    sidenet = small_sidenet(seed, anchors=anchors)
    x, classes = noise(2, 2, 4, 4, seed=seed), labels(2)
    got = solve(guided_field(2, guidance), sidenet, x, times, rule=rule)
    quadrature = get_rule(rule)
    expected = naive_bi_anchor(
        class_velocity,
        sidenet,
        x,
        times.tolist(),
        (quadrature.nodes, quadrature.weights),
        classes,
        (guidance.scale, guidance.interval),
    )
    torch.testing.assert_close(got, expected, **TIGHT)


def check_test_field_tells_branches_apart() -> None:
    """The classes and branches of the test field differ, or the checks above would show nothing."""
    x, (cond, uncond) = noise(3, 2, 4, 4), labels(3)
    t = torch.full((3,), 0.5, dtype=torch.float64)
    apart = (class_velocity(x, t, cond) - class_velocity(x, t, uncond)).abs().mean((1, 2, 3))
    assert apart.min() > 0.1
