"""The editing benchmark measures what it says: budgets are spent exactly, and the truth has no faults."""

import json
from dataclasses import replace

import pytest
import torch
from ba_solver.lab import editing
from ba_solver.lab.editing import EDITS, Task, decibels, drawn, faults, fireflow, noise_for, round_trips, seen_shape
from ba_solver.training.baselines import BASELINES, Baseline
from ba_solver.training.demo.assets import load_demo
from checks import check_baseline_calls, check_baseline_order

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
    for name in ("centres", "colours", "grounds", "ground"):
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
    _, centre = seen_shape(images[1:2], task.after.ground[1:2])
    assert (centre - ((task.after.centres[1] + 1) * 16 - 0.5)).abs().max() < 0.5


@pytest.mark.parametrize("nfe", [5, 10])
def test_round_trips_spend_their_model_calls_exactly(nfe, demo, task):
    for trip in round_trips(demo):
        field = demo.field(task.before.labels)
        with torch.inference_mode():
            _, images = trip.both_ways(field, task.before.images, nfe, (1.0, 0.0))
        assert field.calls == 2 * nfe, trip.label
        assert decibels(images, task.before.images).min() > 5


@pytest.mark.parametrize("name", EDITS)
def test_edits_spend_their_model_calls_exactly(name, demo, task):
    before = task.source.calls + task.target.calls
    with torch.inference_mode():
        images = EDITS[name][1](demo, task, 10, 0.8)
    assert task.source.calls + task.target.calls - before == 10
    assert images.shape == task.before.images.shape and images.isfinite().all()


@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.0, 1.0)], ids=["descending", "ascending"])
def test_fireflows_step_is_of_order_2(ends):
    step = Baseline("fireflow", "FireFlow", 2, 1, fireflow, first_calls=1)
    check_baseline_order(step, ends)
    check_baseline_calls(step, 6)


def test_rf_solvers_step_is_the_midpoint():
    """With the slope over half the step, Taylor's second-order step is the explicit midpoint that stands for it."""
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 1, 2, 4)
    t0, t1 = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)

    def velocity(x, t):
        return torch.sin(2 * x + 3 * t)

    v, step = velocity(x, t0), t1 - t0
    slope = (velocity(x + step / 2 * v, t0 + step / 2) - v) / (step / 2)
    midpoint, _ = BASELINES["midpoint"].step(velocity, x, t0, t1, ())
    torch.testing.assert_close(midpoint, x + step * v + step**2 / 2 * slope)


def test_all_pairs_are_edited():
    source, target = editing.pairs(2)
    assert len(source) == 180 and len(set(zip(source.tolist(), target.tolist(), strict=True))) == 90
    assert (source != target).all()
    for searched in editing.pairs(0):
        assert set(searched.tolist()) == set(range(10)), "a search sees every class on both sides"


def test_finished_parts_are_written_and_kept(monkeypatch, tmp_path):
    """The benchmark with the least of everything, stopped in its second part, then resumed with another."""
    monkeypatch.setattr(editing, "SETTINGS_FILE", tmp_path / "settings.json")
    monkeypatch.setattr(editing, "CASES", {k: replace(c, nfe=(3,)) for k, c in editing.CASES.items()})
    monkeypatch.setattr(editing, "SEARCH_SHIFTS", (1.0, 2.0))
    monkeypatch.setattr(editing, "SEARCH_COSINES", (0.15,))
    monkeypatch.setattr(editing, "REFERENCE_STEPS", 3)
    monkeypatch.setattr(editing, "EDIT_STARTS", (0.8,))
    monkeypatch.setattr(editing, "CFG_SCALES", (2.0, 3.5))
    monkeypatch.setattr(editing, "pairs", lambda repeats: (torch.arange(2), torch.arange(2) + 1))
    settings = editing.EditingSettings(tmp_path, search=True, images=2, seeds=2, search_images=1, edit_nfe=(6, 8))
    measure = editing.measure_edits

    def stopped(settings, demo, nfe, chosen):
        if nfe == 8:
            raise KeyboardInterrupt
        return measure(settings, demo, nfe, chosen)

    monkeypatch.setattr(editing, "measure_edits", stopped)
    with pytest.raises(KeyboardInterrupt):
        editing.run_editing(settings)
    result = json.loads((tmp_path / "editing.json").read_text())
    assert list(result["round_trips"]) == ["clean"] and list(result["edits"]) == ["6"]
    rows = result["round_trips"]["clean"]
    assert len(rows["BA-solver"]["3"]) == 2 and rows["BA-solver with its residuals"]["3"][0]["psnr"] > 60
    assert {name: len(seeds) for name, seeds in result["edits"]["6"].items()} == dict.fromkeys(EDITS, 2)
    text = (tmp_path / "editing.md").read_text()
    assert text.count("| BA-solver |") == 2 and "| FlowEdit | 0.8, " in text
    found = json.loads(editing.SETTINGS_FILE.read_text())
    assert set(found["grids"]["clean"]) == {trip.name for trip in round_trips(load_demo())}
    result = editing.run_editing(replace(settings, parts=("noised",)))
    assert list(result["round_trips"]) == ["clean", "noised"] and set(result["edits"][6]) == set(EDITS)
