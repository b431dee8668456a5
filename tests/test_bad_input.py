"""Bad input to the core: each error names the argument, what was required and what came."""

import re

import pytest
import torch
from ba_solver.bas_core import RULES, Field, Guidance, NonFiniteError, model_field, solve, time_grid, time_shift
from ba_solver.bas_core.solver import METHODS
from ba_solver.training.baselines import BASELINES, get_baseline, run_baseline
from problems import (
    FunctionSideNet,
    Oracle,
    class_velocity,
    exact_field,
    labels,
    noise,
    small_sidenet,
    smooth_grid,
    state,
    velocity,
)

NAN, INF = float("nan"), float("inf")
RUNS = [
    pytest.param(lambda x, times: solve(exact_field(), None, x, times), id="solve"),
    pytest.param(lambda x, times: run_baseline("euler", exact_field(), x, times), id="run_baseline"),
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("x", "came"),
    [
        (torch.ones(4, 4), r"got torch.float32 of shape \(4, 4\)"),
        (torch.ones(1, 4, 4), r"got torch.float32 of shape \(1, 4, 4\)"),
        (torch.ones(1, 1, 1, 1, 1, 1), r"got torch.float32 of shape \(1, 1, 1, 1, 1, 1\)"),
        (torch.ones(0, 1, 4, 4), r"got torch.float32 of shape \(0, 1, 4, 4\)"),
        (torch.ones(1, 1, 4, 4, dtype=torch.long), "got torch.int64"),
        ([[[[1.0]]]], "got list"),
        (None, "got NoneType"),
    ],
    ids=["2-D", "3-D", "6-D", "empty", "integer", "list", "None"],
)
def test_a_state_that_is_none_is_refused(run, x, came):
    with pytest.raises(ValueError, match=rf"x must be a float tensor \[B, C, H, W\].*{came}"):
        run(x, smooth_grid(3))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_state_that_is_not_finite_is_refused_before_the_first_call(run, value):
    x = state()
    x[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"x must be finite.*before the first step"):
        run(x, smooth_grid(3))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("times", "message"),
    [
        (torch.tensor([]), r"1-D float tensor of at least two times; got torch.float32 of shape \(0,\)"),
        (torch.tensor([1.0]), r"at least two times; got torch.float32 of shape \(1,\)"),
        (torch.ones(2, 2), r"1-D float tensor.*got torch.float32 of shape \(2, 2\)"),
        (torch.tensor([1, 0]), r"float tensor.*got torch.int64"),
        ([1.0, 0.0], "got list"),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), r"strictly descend.*or ascend.*got \[1.0, 0.5, 0.5, 0.0\]"),
        (torch.tensor([0.5, 1.0, 0.0]), r"strictly descend.*got \[0.5, 1.0, 0.0\]"),
        (torch.tensor([1.0, NAN, 0.0]), r"times must lie in \[0, 1\].*got \[1.0, nan, 0.0\]"),
        (torch.tensor([1.5, 0.0]), r"times must lie in \[0, 1\], 1 = noise; got \[1.5, 0.0\]"),
        (torch.tensor([1.0, -0.25]), r"times must lie in \[0, 1\].*got \[1.0, -0.25\]"),
        (torch.tensor([1000.0, 500.0]), r"times must lie in \[0, 1\].*got \[1000.0, 500.0\]"),
    ],
    ids=["empty", "one", "2-D", "integers", "list", "equal", "both ways", "nan", "above", "below", "train steps"],
)
def test_grids_that_cannot_be_integrated_over_are_refused(run, times, message):
    with pytest.raises(ValueError, match=f"times must .*{message}|{message}"):
        run(state(), times)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: time_grid(0), "intervals must be at least 1; got 0"),
        (lambda: time_grid(4, cosine=1.5), r"cosine must lie in \[-1, 1\]; got 1.5"),
        (lambda: time_grid(4, shift=0.0), "shift must be positive; got 0.0"),
        (lambda: time_shift(torch.ones(1), NAN), "shift must be positive; got nan"),
    ],
    ids=["intervals", "cosine", "shift", "nan"],
)
def test_impossible_grids_are_not_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "asked", "valid"),
    [
        (lambda: solve(exact_field(), None, state(), smooth_grid(3), rule="gauss"), "quadrature rule 'gauss'", RULES),
        (
            lambda: solve(exact_field(), None, state(), smooth_grid(3), method="tri_anchor"),
            "method 'tri_anchor'",
            METHODS,
        ),
        (lambda: run_baseline("dopri5", exact_field(), state(), smooth_grid(3)), "solver 'dopri5'", BASELINES),
        (lambda: get_baseline(""), "solver ''", BASELINES),
    ],
    ids=["rule", "method", "solver", "no solver"],
)
def test_unknown_names_list_the_valid_ones(call, asked, valid):
    with pytest.raises(ValueError, match=f"Unknown {asked}") as caught:
        call()
    assert all(name in str(caught.value) for name in valid)


def test_bi_anchor_refuses_a_rule_without_both_ends():
    with pytest.raises(ValueError, match="nodes include 0 and 1, such as lobatto4; got legendre3"):
        solve(exact_field(), None, state(), smooth_grid(3), rule="legendre3")


@pytest.mark.parametrize("chunk", [0, -3])
def test_chunks_of_nothing_are_refused(chunk):
    with pytest.raises(ValueError, match=f"chunk must be at least 1 sample, or None; got {chunk}"):
        solve(exact_field(), None, state(), smooth_grid(3), chunk=chunk)


# --- guidance and conditions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [(0.7, 0.3), (-0.1, 0.5), (0.0, 1.5), (NAN, 1.0)])
def test_cfg_intervals_outside_the_path_are_refused(interval):
    message = rf"CFG interval \(lo, hi\).*0 <= lo <= hi <= 1; got {re.escape(str(interval))}"
    with pytest.raises(ValueError, match=message):
        Guidance(2.0, interval)


@pytest.mark.parametrize("mode", ["per_branch", "combined"])
def test_guidance_without_an_unconditional_condition_is_refused(mode):
    with pytest.raises(ValueError, match=r"guidance.*needs uncond"):
        model_field(class_velocity, labels(2)[0], guidance=Guidance(2.0), mode=mode)


def test_a_field_of_one_branch_refuses_guidance():
    with pytest.raises(ValueError, match="Guidance needs an unconditional branch"):
        Field(lambda x, t, k: x[None], guidance=Guidance(2.0))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be one of per_branch, combined; got 'both'"):
        model_field(velocity, mode="both")


@pytest.mark.parametrize("mode", ["per_branch", "combined"])
@pytest.mark.parametrize(("cond", "uncond"), [(3, 2), (2, 3), (1, 1)])
def test_conditions_for_another_batch_are_refused(cond, uncond, mode):
    field = model_field(class_velocity, labels(cond)[0], labels(uncond)[1], Guidance(2.0), mode)
    with pytest.raises(ValueError, match=rf"batch size 2; got \[{cond}, {uncond}\]"):
        solve(field, None, noise(2, 2, 4, 4), smooth_grid(3))


def test_an_unconditional_condition_alone_is_refused():
    """The model would be given one condition for two branches."""
    with pytest.raises(ValueError, match="cond"):
        solve(model_field(class_velocity, None, labels(2)[1], Guidance(2.0)), None, noise(2, 2, 4, 4), smooth_grid(3))


@pytest.mark.parametrize(
    ("changes", "x", "message"),
    [
        ({}, noise(2, 4, 4, 4), r"SideNet takes x of \[B, 2, H, W\].*got \(\d+, 4, 4, 4\).*made for this model"),
        ({}, noise(2, 2, 4, 4), "takes class indices up to 3.*got none"),
    ],
    ids=["channels", "no classes"],
)
def test_a_sidenet_for_another_model_is_refused(changes, x, message):
    with pytest.raises(ValueError, match=message):
        solve(exact_field(), small_sidenet(**changes), x, smooth_grid(3))


# --- what networks return ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda v: torch.cat([v, v], 1),
        lambda v: v[..., :-1],
        lambda v: v[:1],
        lambda v: v[:, :, :, :, None],
        lambda v: v.mean(),
    ],
    ids=["doubled channels", "narrow", "one sample", "another axis", "a number"],
)
@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["one branch", "two branches"])
def test_a_backbone_that_returns_another_shape_is_refused(wrong, scale):
    """Doubled channels are what a SiT with learned sigma returns."""
    field = model_field(lambda *given: wrong(class_velocity(*given)), *labels(2), guidance=Guidance(scale))
    with pytest.raises(ValueError, match="backbone must return"):
        solve(field, None, noise(2, 2, 4, 4), smooth_grid(3))


RUNNERS = [
    pytest.param(lambda field, x, times: solve(field, Oracle(), x, times), 2, id="bi_anchor"),
    pytest.param(
        lambda field, x, times: solve(field, Oracle(), x, times, method="single_anchor"), 3, id="single_anchor"
    ),
    pytest.param(lambda field, x, times: run_baseline("euler", field, x, times), 3, id="euler"),
    pytest.param(lambda field, x, times: run_baseline("heun", field, x, times), 2, id="heun"),
]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(("run", "step"), RUNNERS)
def test_a_backbone_that_returns_nan_is_reported_with_step_and_time(run, step, value):
    """At t = 0.5 on a grid of four: the third call, which solvers that look ahead make in the second step."""

    def broken(x, t):
        v = velocity(x, t)
        v[1] = torch.where(t[1] == 0.5, value, v[1])
        return v

    times = time_grid(4, dtype=torch.float64)
    start = 1 - (step - 1) / 4
    message = (
        rf"Step {step} of 4, from t = {start:g}: The backbone returned NaN or infinity for 1 of 3 samples.*t = 0.5"
    )
    with pytest.raises(NonFiniteError, match=message):
        run(model_field(broken), state(), times)


@pytest.mark.parametrize("method", ["bi_anchor", "single_anchor"])
@pytest.mark.parametrize("last", [False, True], ids=["first step", "last step"])
def test_a_sidenet_that_returns_nan_is_reported_and_the_backbone_is_not_blamed(method, last):
    def broken(x, v, t, h, **_):
        here = ((t < 0.3) == last) & (h > 0)
        return Oracle()(x=x, v=v, t=t, h=h) + torch.where(here, NAN, 0.0)[:, None, None, None]

    message = f"Step {4 if last else 1} of 4, from t = {0.25 if last else 1:g}:"
    with pytest.raises(NonFiniteError, match=message) as caught:
        solve(exact_field(), FunctionSideNet(broken), state(), time_grid(4, dtype=torch.float64), method=method)
    assert "SideNet" in str(caught.value) and "backbone returned" not in str(caught.value)


def test_a_step_that_overflows_is_reported():
    """Finite velocities, infinite state."""
    with pytest.raises(NonFiniteError, match=r"Step 1 of 2, from t = 1: .*NaN or infinity"):
        solve(model_field(lambda x, t: torch.full_like(x, -3e38)), None, torch.full((1, 1, 2, 2), 3e38), time_grid(2))
