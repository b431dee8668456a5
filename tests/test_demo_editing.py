"""The editing benchmark measures what it says: budgets are spent exactly, and the truth has no faults."""

import pytest
import torch
from ba_solver.bas_core import BASELINES
from ba_solver.training.demo import editing
from ba_solver.training.demo.assets import load_demo
from ba_solver.training.demo.editing import EDITS, Task, decibels, drawn, faults, noise_for, round_trips, seen_shape

SEED = 16_000_000


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture(scope="module")
def task(demo):
    source, target = torch.tensor([6, 2, 0]), torch.tensor([4, 0, 3])
    before, after = drawn(SEED, source), drawn(SEED, target)
    return Task(before, after, noise_for(before.images, 1), demo.field(source, 1.0), demo.field(target))


def test_other_classes_draw_the_same_scenes(task):
    for name in ("centres", "colours", "grounds", "behind"):
        assert torch.equal(getattr(task.before, name), getattr(task.after, name))
    assert not torch.equal(task.before.images, task.after.images)


def test_the_truth_has_no_faults_and_damage_has(task):
    images = task.after.images
    assert all(float(value.max()) < 1e-6 for value in faults(images, task).values())
    moved = faults(images.roll(3, -1), task)["place"]
    assert ((moved - 3).abs() < 1.5).all()
    darker = images - 0.2
    assert faults(darker, task)["ground"].mean() == pytest.approx(0.2, abs=0.03)
    # A disc's place is its stated centre.
    disc = seen_shape(images[1:2], task.after.behind[1:2])
    assert (disc.centre - ((task.after.centres[1] + 1) * 16 - 0.5)).abs().max() < 0.5


@pytest.mark.parametrize("calls", [5, 10])
def test_round_trips_spend_their_calls_exactly(calls, demo, task):
    for trip in round_trips(demo):
        field = demo.field(task.before.labels)
        with torch.inference_mode():
            back = trip.sample(field, task.before.images, calls)
        assert field.calls == 2 * calls, trip.label
        assert decibels(back, task.before.images).min() > 5


@pytest.mark.parametrize("name", EDITS)
def test_edits_spend_their_calls_exactly(name, demo, task):
    before = task.source.calls + task.target.calls
    with torch.inference_mode():
        images = EDITS[name][1](demo, task, 10, 0.8)
    assert task.source.calls + task.target.calls - before == 10
    assert images.shape == task.before.images.shape and images.isfinite().all()


def test_rf_solvers_step_is_the_midpoint():
    """As its docstring says: with the quotient over half the step, Taylor's second order is the explicit midpoint."""
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 1, 2, 4)
    t0, t1 = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)

    def velocity(x, t):
        return torch.sin(2 * x + 3 * t)

    ours, theirs = (BASELINES[name].step(velocity, x, t0, t1, ())[0] for name in ("rf_solver", "midpoint"))
    torch.testing.assert_close(ours, theirs)


def test_all_pairs_are_edited():
    source, target = editing.pairs(2)
    assert len(source) == 180 and len(set(zip(source.tolist(), target.tolist(), strict=True))) == 90
    assert (source != target).all()
