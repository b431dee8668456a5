"""Tuning end to end: its run is the sampler's, its gradients are right, and what it finds serves other noises."""

import pytest
import torch
from ba_solver.bas_core import FittedRun, Guidance, get_rule, solve
from ba_solver.training.runs.fitting import Fitting, fit_run
from ba_solver.training.runs.tuning import TunedRun
from checks import guided_field
from problems import noise, small_sidenet

GRID = [1.0, 0.93, 0.7, 0.5, 0.25, 0.0]
SCALE = 2.5
RULE = get_rule("lobatto4")


def begun():
    """A run of fitted weights and half calls, with its field, noise and network, in double precision."""
    field, x, sidenet = guided_field(2, Guidance(SCALE), "guided"), noise(2, 2, 4, 4), small_sidenet().double()
    fitting = Fitting(sidenet, field, x, lambda t: x * float(t) ** 2)
    run = fit_run(fitting, FittedRun(torch.tensor(GRID, dtype=torch.float64)), True)[1]
    return TunedRun(run).double(), field, x, sidenet


def check_run_is_the_samplers():
    run, field, x, sidenet = begun()
    with torch.no_grad():
        ours = run(field, x, sidenet, 1.0, RULE)
        found = run.run().detached()
        times = torch.tensor(found.times, dtype=torch.float64)
        theirs = solve(field, sidenet, x, found.over(times))
    torch.testing.assert_close(times, torch.tensor(GRID, dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.halves == 2 and len(found.step_weights) == 9
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def check_gradients():
    """Of the end point by every kind of number, against differences."""
    run, field, x, sidenet = begun()

    def error():
        return run(field, x, sidenet, 1.0, RULE).square().sum()

    error().backward()
    picked = [(run.log_steps, 1), (run.step_weights[0], 0), (run.step_weights[3], 2), (run.half_calls[2], 1)]
    for parameter, index in picked:
        ends = []
        for change in (1e-5, -2e-5):
            with torch.no_grad():
                parameter[index] += change
                ends.append(error().item())
        with torch.no_grad():
            parameter[index] += 1e-5
        measured = (ends[0] - ends[1]) / 2e-5
        assert abs(measured) > 1e-6
        assert parameter.grad[index].item() == pytest.approx(measured, rel=1e-4)


def hold_the_times(patch):
    intact = TunedRun.times
    patch.setattr(TunedRun, "times", lambda self: intact(self).detach())


def forget_the_half_calls(patch):
    patch.setattr(TunedRun, "run", lambda self: FittedRun(self.times(), list(self.step_weights)))


@pytest.mark.parametrize("check", [check_run_is_the_samplers, check_gradients])
def test_tuned_run(check):
    check()


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        (hold_the_times, check_gradients),
        (forget_the_half_calls, check_run_is_the_samplers),
    ],
)
def test_damaged_tuned_runs_fail_the_check(damage, check, monkeypatch):
    damage(monkeypatch)
    with pytest.raises((AssertionError, TypeError)):
        check()


def test_the_first_time_stays_and_the_others_fall():
    """Whether the first call is saved, and so the cost, depends on the first time."""
    run = begun()[0]
    with torch.no_grad():
        run.log_steps += torch.randn(len(run.log_steps), generator=torch.Generator().manual_seed(1)).double()
    times = run.times()
    assert (times.diff() < 0).all()
    torch.testing.assert_close(times[[0, 1, -1]], torch.tensor([1.0, 0.93, 0.0], dtype=torch.float64))
