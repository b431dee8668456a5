"""The editing benchmark measures what it says: budgets are spent exactly, and the truth has no faults."""

import json
from dataclasses import replace

import pytest
import torch
from ba_solver.bas_core import BASELINES
from ba_solver.lab import editing, editing_data, edits, reversible
from ba_solver.lab import round_trips as round_trips_module
from ba_solver.lab.editing_data import drawn, noise_for
from ba_solver.lab.edits import EDITS, Task, faults, seen_shape
from ba_solver.lab.round_trips import decibels, round_trips
from ba_solver.training.demo.assets import load_demo
from torchdiffeq import odeint

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
    source, target = edits.pairs(2)
    assert len(source) == 180 and len(set(zip(source.tolist(), target.tolist(), strict=True))) == 90
    assert (source != target).all()
    for searched in edits.pairs(0):
        assert set(searched.tolist()) == set(range(10)), "a search sees every class on both sides"


def small(monkeypatch, tmp_path):
    """The benchmark with the least of everything; its settings file goes to a temporary folder."""
    monkeypatch.setattr(editing, "SETTINGS_FILE", tmp_path / "settings.json")
    monkeypatch.setattr(editing, "CASES", {k: replace(c, calls=(3,)) for k, c in editing.CASES.items()})
    monkeypatch.setattr(round_trips_module, "SEARCH_SHIFTS", (1.0, 2.0))
    monkeypatch.setattr(round_trips_module, "SEARCH_COSINES", (0.15,))
    monkeypatch.setattr(round_trips_module, "REFERENCE_STEPS", 3)
    monkeypatch.setattr(edits, "STARTS", (0.8,))
    monkeypatch.setattr(edits, "GUIDANCES", (2.0, 3.5))
    monkeypatch.setattr(edits, "pairs", lambda repeats: (torch.arange(2), torch.arange(2) + 1))
    return editing_data.EditingSettings(tmp_path, search=True, images=2, seeds=2, search_images=1, edit_calls=(6,))


def test_what_is_finished_is_on_disk_when_the_benchmark_is_stopped(monkeypatch, tmp_path):
    settings = small(monkeypatch, tmp_path)

    def stopped_in_the_second_seed(*arguments):
        measured = judge(*arguments)
        if arguments[5] != editing_data.REPORT_SEED and arguments[5] != editing_data.SEARCH_SEED:
            raise KeyboardInterrupt
        return measured

    judge = edits.judge
    monkeypatch.setattr(edits, "judge", stopped_in_the_second_seed)
    with pytest.raises(KeyboardInterrupt):
        editing.run_editing(settings)
    result = json.loads((tmp_path / "editing.json").read_text())
    assert list(result["reconstruction"]) == ["clean"]
    rows = result["reconstruction"]["clean"]
    assert len(rows["BA-solver"]["3"]) == 2 and rows["exact return"]["3"][0]["psnr"] > 60
    assert {name: len(seeds) for name, seeds in result["edits"]["6"].items()} == dict.fromkeys(EDITS, 1)
    assert (tmp_path / "edits_6.png").exists()
    text = (tmp_path / "editing.md").read_text()
    assert text.count("| BA-solver |") == 2 and "| FlowEdit | 0.8, " in text
    found = editing.load_found(editing.SETTINGS_FILE)
    assert set(found["grids"]["clean"]) == {trip.name for trip in round_trips(load_demo())}
    assert found["edits"][6]["inversion_alone"] == found["edits"][6]["inversion"]
    result = editing.run_editing(replace(settings, parts=("noised",)))
    assert list(result["reconstruction"]) == ["clean", "noised"] and set(result["edits"][6]) == set(EDITS)


@pytest.mark.parametrize("calls", [4, 8])
def test_reversible_forms_undo_themselves_and_only_with_their_whole_state(calls):
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 1, 2, 4)
    up = torch.linspace(0.05, 1, calls + 1, dtype=torch.float64)

    def velocity(x, t):
        return torch.sin(2 * x + 3 * t)

    def step(x, t0, t1):
        return (t1 - t0) * velocity(x + (t1 - t0) / 2 * velocity(x, t0), (t0 + t1) / 2)

    y, z = reversible.coupled_forward(step, x, up)
    torch.testing.assert_close(reversible.coupled_backward(step, y, z, up), x)
    assert (reversible.coupled_backward(step, y, y, up) - x).abs().max() > 1e-5
    ends = torch.tensor([0.05, 1.0], dtype=torch.float64)
    exact = odeint(lambda t, x: velocity(x, t), x, ends, rtol=1e-9, atol=1e-9)[-1]
    assert (y - exact).abs().max() < 0.1 * (x - exact).abs().max()
    y, z, v = reversible.heun_forward(velocity, x, up)
    torch.testing.assert_close(reversible.heun_backward(velocity, y, z, v, up), x)
    assert (reversible.heun_backward(velocity, y, y, velocity(y, up[-1]), up) - x).abs().max() > 1e-5
    assert (y - exact).abs().max() < 0.1 * (x - exact).abs().max()
