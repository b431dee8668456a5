"""Tuning end to end: its run is the solver's, its gradients are right, and what it finds serves other noises."""

import pytest
import torch
from ba_solver.bas_core import Guidance, Schedule, solve
from ba_solver.bas_core.grids import time_grid
from ba_solver.bas_core.guidance import Field
from ba_solver.bas_core.prediction import StraightLine
from ba_solver.training.network.memory import passes_within, saved_bytes
from ba_solver.training.recording.replay import recomputed
from ba_solver.training.schedules.fitting import Fitting, fit_schedule
from ba_solver.training.schedules.tuning import TunedSchedule
from checks import guided_field
from problems import noise, small_sidenet

GRID = [1.0, 0.93, 0.7, 0.5, 0.25, 0.0]
SCALE = 2.5


def begun():
    """A run of fitted weights and half calls, with its field, noise and network, in double precision."""
    field, x, sidenet = guided_field(2, Guidance(SCALE), "combined"), noise(2, 2, 4, 4), small_sidenet().double()
    fitting = Fitting(sidenet, field, x, lambda t: x * float(t) ** 2)
    run = fit_schedule(fitting, Schedule(torch.tensor(GRID, dtype=torch.float64)), True)[1]
    return TunedSchedule(run).double(), field, x, sidenet


def check_run_is_the_samplers():
    run, field, x, sidenet = begun()
    with torch.no_grad():
        ours = run(field, x, sidenet, 1.0)
        found = run.schedule()
        times = torch.tensor(found.times, dtype=torch.float64)
        theirs = solve(field, sidenet, x, found.with_times(times))
    torch.testing.assert_close(times, torch.tensor(GRID, dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.conditional_only == 2 and len(found.coefficients) == 9
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def check_gradients():
    """Of the end point by every kind of number, against differences."""
    run, field, x, sidenet = begun()

    def error():
        return run(field, x, sidenet, 1.0).square().sum()

    error().backward()
    picked = [(run.log_steps, 1), (run.coefficients[0], 0), (run.coefficients[3], 2), (run.cfg_coefficients[2], 1)]
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
    intact = TunedSchedule.times
    patch.setattr(TunedSchedule, "times", lambda self: intact(self).detach())


def forget_the_half_calls(patch):
    patch.setattr(TunedSchedule, "schedule", lambda self: Schedule(self.times(), list(self.coefficients)))


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


def test_gradients_are_those_of_the_whole_run_at_the_memory_of_its_states():
    """Calls are made again on the way back: the same gradients, and activations are not kept."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 2048), torch.nn.Tanh(), torch.nn.Linear(2048, 4))
    network.requires_grad_(False)
    x, times = torch.randn(3, 2, 4, 4), time_grid(6).tolist()

    def field():
        return Field(lambda x, t, count: (network(x) * (1 + t.view(-1, 1, 1, 1)))[None])

    kept, gradients = [], []
    for make in (field, lambda: recomputed(field())):
        run = TunedSchedule(Schedule(times, [[0.01] * (1 + row // 2 + 2 * (row % 2)) for row in range(11)]))
        loss = lambda make=make, run=run: run(make(), x, StraightLine(), 1.0).square().sum()  # noqa: E731
        kept.append(saved_bytes(loss))
        loss().backward()
        gradients.append([parameter.grad for parameter in run.parameters()])
    assert kept[1] < 0.2 * kept[0]
    assert all(map(torch.allclose, *gradients)) and sum(gradient.any() for gradient in gradients[0]) > 10


def test_a_batch_is_split_as_memory_asks():
    assert passes_within(128, 1.0, 1000) == 1 and passes_within(128, 10.0, 1000) == 4
    assert passes_within(12, 1e9, 10) == 12
