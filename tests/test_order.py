"""Convergence orders, cost, sensitivity to the predictor's error, and the step callback."""

from itertools import pairwise

import pytest
import torch
from ba_solver.bas_core import solve
from ba_solver.training.baselines import BASELINES, run_baseline
from checks import (
    check_baseline_calls,
    check_baseline_order,
    check_calls,
    check_oracle_order,
    check_order,
    run_oracle,
)
from problems import Oracle, exact_field, flow_map, run_named, smooth_grid, state, uneven_grid, velocity

# Steps are as fine as float64 allows: the last error stays above 1e-13.
BI_ANCHOR = [
    ("lobatto3", 4, (16, 32)),
    ("simpson38", 4, (16, 32)),
    ("chebyshev4", 4, (16, 32)),
    ("lobatto4", 6, (8, 16)),
    ("lobatto5", 8, (6, 12)),
]
SINGLE_ANCHOR = [(1, (32, 64)), (2, (16, 32)), (3, (8, 16)), (4, (6, 12)), (5, (2, 4))]
INTERIOR = (0.9, 0.1)


@pytest.mark.parametrize("back", [False, True], ids=["descending", "ascending"])
@pytest.mark.parametrize("name", [name for name in BASELINES if name != "unipc"])
def test_order_of_the_baselines(name, back):
    """On grids with unequal steps; on interior ones where a solver treats the ends in its own way."""
    ends = INTERIOR if name in ("dpmpp_2m", "dpm_2", "res_multistep", "deis", "unipc") else (1.0, 0.0)
    check_baseline_order(BASELINES[name], ends[::-1] if back else ends)


@pytest.mark.parametrize("ends", [INTERIOR, INTERIOR[::-1]], ids=["descending", "ascending"])
def test_unipc_gains_an_order_by_its_corrector(ends):
    check_order(run_named("unipc"), 3, [uneven_grid(n, *ends) for n in (80, 160)])


@pytest.mark.parametrize("name", ["adams_bashforth3", "adams_bashforth4"])
def test_self_started_adams_bashforth_is_of_order_2(name):
    """A first step of order 1 limits them, as their docstring says."""
    check_order(run_named(name), 2, [uneven_grid(n) for n in (80, 160)])


@pytest.mark.parametrize("anchors", [1, 2])
@pytest.mark.parametrize(("rule", "order", "steps"), BI_ANCHOR, ids=[case[0] for case in BI_ANCHOR])
def test_order_of_bi_anchor_integration(rule, order, steps, anchors):
    check_oracle_order(rule, order, steps, anchors)


@pytest.mark.parametrize(("count", "steps"), SINGLE_ANCHOR, ids=[f"legendre{k}" for k, _ in SINGLE_ANCHOR])
def test_order_of_single_anchor_integration(count, steps):
    check_oracle_order(f"legendre{count}", 2 * count, steps, method="single_anchor")


@pytest.mark.parametrize(
    ("rule", "order", "method"),
    [("lobatto3", 4, "bi_anchor"), ("lobatto4", 6, "bi_anchor"), ("legendre2", 4, "single_anchor")],
)
def test_order_of_inversion(rule, order, method):
    """From data to noise, on an ascending grid."""
    check_oracle_order(rule, order, (16, 32), method=method, ends=(0.0, 1.0))


@pytest.mark.parametrize(
    ("run", "order", "steps"),
    [
        (run_named("predictor_corrector"), 2, (160, 320)),
        (run_oracle("lobatto3"), 4, (8, 16)),
        (run_oracle("lobatto4"), 6, (8, 16)),
        (run_oracle("lobatto4", anchors=2), 6, (8, 16)),
    ],
    ids=["predictor_corrector", "lobatto3", "lobatto4", "lobatto4, two anchors"],
)
def test_there_and_back_returns_to_the_start_at_the_solvers_order(run, order, steps):
    """Down one grid and up one twice as fine: on the same grid the leading errors would cancel."""
    grids = [torch.cat([smooth_grid(n), uneven_grid(2 * n, 0.0, 1.0)]) for n in steps]

    def there_and_back(x, times):
        down, up = times.split([(len(times) + 1) // 3, len(times) - (len(times) + 1) // 3])
        return run(run(x, down), up)

    check_order(there_and_back, order, grids)


@pytest.mark.parametrize("method", ["bi_anchor", "single_anchor"])
@pytest.mark.parametrize("sidenet", [None, Oracle(1), Oracle(2)], ids=["none", "one anchor", "two anchors"])
@pytest.mark.parametrize("intervals", [1, 2, 5])
def test_n_intervals_cost_n_calls(sidenet, method, intervals):
    check_calls(sidenet, method, intervals)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_cost_what_they_declare(name):
    check_baseline_calls(BASELINES[name], 6)


@pytest.mark.parametrize("anchors", [1, 2])
@pytest.mark.parametrize("rule", ["lobatto3", "lobatto4"])
def test_excess_error_is_proportional_to_the_predictors_error(rule, anchors):
    """Errors of 1e-7 ... 1e-2 times h injected into every prediction move the end point in proportion."""
    x, times = state(), smooth_grid(6)
    exact = run_oracle(rule, anchors)(x, times)
    injected = [10.0**-k for k in range(7, 1, -1)]
    moved = [(run_oracle(rule, anchors, error=e)(x, times) - exact).norm().log10().item() for e in injected]
    slopes = [after - before for before, after in pairwise(moved)]
    assert slopes == pytest.approx([1.0] * len(slopes), abs=0.1)


@pytest.mark.parametrize(
    ("run", "calls"),
    [
        (lambda f, x, t, c: solve(f, Oracle(), x, t, callback=c), [2, 3, 4, 4]),
        (lambda f, x, t, c: solve(f, Oracle(), x, t, method="single_anchor", callback=c), [1, 2, 3, 4]),
        (lambda f, x, t, c: run_baseline("heun", f, x, t, c), [2, 4, 6, 8]),
        (lambda f, x, t, c: run_baseline("predictor_corrector", f, x, t, c), [2, 3, 4, 4]),
    ],
    ids=["bi_anchor", "single_anchor", "heun", "predictor_corrector"],
)
def test_the_callback_sees_every_step(run, calls):
    """Each step starts where the one before ended; its velocity is the field's there, up to the anchor's mismatch."""
    x, times, steps = state(), smooth_grid(4), []
    end = run(exact_field(), x, times, steps.append)
    assert [(s.index, s.total, s.calls) for s in steps] == [(i, 4, calls[i]) for i in range(4)]
    assert [s.time for s in steps] == times[:-1].tolist() and [s.next_time for s in steps] == times[1:].tolist()
    assert torch.equal(steps[0].x, x) and torch.equal(steps[-1].x_next, end)
    for before, after in pairwise(steps):
        assert torch.equal(before.x_next, after.x)
    for step in steps:
        torch.testing.assert_close(step.velocity, velocity(step.x, step.time), rtol=0.05, atol=0)
        torch.testing.assert_close(step.denoised, step.x - step.time * step.velocity)
    assert torch.equal(steps[0].velocity, velocity(x, 1.0))


@pytest.mark.parametrize(
    "run",
    [lambda f, x, t, c: solve(f, None, x, t, callback=c), lambda f, x, t, c: run_baseline("euler", f, x, t, c)],
    ids=["solve", "euler"],
)
def test_the_callback_may_raise_to_stop(run):
    """The exception arrives as it was raised, and the backbone is not called again."""

    class Stop(Exception):
        pass

    def stop_at_second(step):
        if step.index == 1:
            raise Stop

    field = exact_field()
    with pytest.raises(Stop):
        run(field, state(), smooth_grid(6), stop_at_second)
    assert field.calls <= 3


def test_the_problem_is_solved_by_its_flow_map():
    """The reference the orders are measured against: its time derivative is the velocity."""
    x = state()
    t = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.functional.jacobian(lambda end: flow_map(x, 1.0, end), t)
    torch.testing.assert_close(slope, velocity(flow_map(x, 1.0, 0.6), 0.6))
    torch.testing.assert_close(flow_map(flow_map(x, 1.0, 0.2), 0.2, 1.0), x)
