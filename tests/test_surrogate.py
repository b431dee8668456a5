"""Schedules fitted on a surrogate: known methods as numbers, what the surrogate knows, what a fit finds."""

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ba_solver.bas_core.checkpoint import load_sidenet
from ba_solver.bas_core.grids import time_grid
from ba_solver.bas_core.guidance import model_field
from ba_solver.bas_core.prediction import StraightLine
from ba_solver.bas_core.solver import solve
from ba_solver.training.baselines import run_baseline
from ba_solver.training.cli import main
from ba_solver.training.make import MakeSettings, planned_nfe
from ba_solver.training.presets import PRESETS, preset_values
from ba_solver.training.recording.replay import Replay
from ba_solver.training.schedules import search
from ba_solver.training.schedules.end_fit import fit_on_surrogate
from ba_solver.training.schedules.linear_form import form_from, from_numbers, linear_form, schedule_of, to_numbers
from ba_solver.training.schedules.search import KNOWN, Candidate, SearchData, means_of_others, search_schedules
from ba_solver.training.schedules.surrogate import (
    Surrogate,
    cosine_transform,
    draw_coordinates,
    mean_error,
    over_bands,
    subsampled,
)
from ba_solver.training.settings import UsageError, read_settings
from training_checks import check_end_fit, fit_data
from training_problems import (
    BACKBONE,
    GAUSSIAN_MEAN,
    SHAPE,
    environment,
    swirl,
    swirl_backbone,
    trajectories_of,
    two_points_backbone,
)

LABELS = torch.arange(12) % 2
ROUNDS = (2, 1)
METADATA = {"guidance": [1.0, 1.0], "guidance_interval": [0.0, 1.0], "cfg_mode": "combined", "record_batch": 8}


@pytest.fixture(scope="module")
def replay():
    """Trajectories of the swirl, and the swirl."""
    return Replay(swirl_backbone(None, None), trajectories_of(swirl, LABELS, 40), METADATA, Counter())


# --- known methods as numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", KNOWN)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_known_method_is_its_weights(solver, steps):
    """Its schedule samples a nonlinear, time-dependent field as the method does, and its numbers bring it back."""
    times = time_grid(steps, 2.0, 0.2, dtype=torch.float64)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    field = model_field(swirl, torch.tensor([0, 1, 0]))
    expected = run_baseline(solver, field, x, times)
    form = linear_form(solver, times)
    schedule = schedule_of(form)
    found = solve(field, StraightLine(), x, schedule.with_times(times))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert schedule.calls == steps
    torch.testing.assert_close(form.weights.sum(1), times[1:] - 1, atol=1e-12, rtol=0)
    again = form_from(to_numbers(form), steps, 1.0)
    torch.testing.assert_close(again.times, times)
    torch.testing.assert_close(again.weights, form.weights)


def test_a_path_may_start_below_one():
    times = 0.9 * time_grid(4, 1.5, dtype=torch.float64)
    form = linear_form("unipc", times)
    again = from_numbers(to_numbers(form)[None], 4, 0.9)
    torch.testing.assert_close(again[0][0], times)
    torch.testing.assert_close(again[1][0], form.weights)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    field = model_field(swirl, torch.tensor([0, 1]))
    found = solve(field, StraightLine(), x, schedule_of(form).scaled(0.9).with_times(times))
    torch.testing.assert_close(found, run_baseline("unipc", field, x, times), atol=1e-6, rtol=0)


# --- coordinates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 6, 10), (2, 3, 8, 8)])
def test_coordinates_keep_sums_of_squares(shape):
    """All of a small state; of a large one as many as are drawn, on average, also where most lies in few of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *shape, generator=generator)
    whole = draw_coordinates(torch.ones(shape, dtype=torch.float64), math.prod(shape))
    torch.testing.assert_close(whole.of(x).square().sum(1), x.double().square().flatten(1).sum(1))
    # Smooth states: their coefficients are large at low frequencies alone.
    smooth = x.double().cumsum(-1).cumsum(-2)
    sizes = cosine_transform(smooth).square().mean(0)
    few = draw_coordinates(sizes, 400)
    assert few.of(smooth).shape == (4, 400) or math.prod(shape) <= 400
    found, truth = few.of(smooth).square().sum(1), smooth.square().flatten(1).sum(1)
    assert (found / truth - 1).abs().max() < 0.35


def test_bands_are_of_like_frequencies():
    values = cosine_transform(torch.ones(2, 8, 8)).square()
    bands = over_bands(values)
    assert bands[0, 0, 0] == values[0, 0, 0] and bands[0, 3:].abs().max() < 1e-20
    assert over_bands(values[:, None].expand(2, 3, 8, 8)).shape == (2, 3, 8, 8)


# --- the surrogate ----------------------------------------------------------------------------------------------------


def test_recorded_velocities_and_states_between_the_points():
    """States are those of the recording; velocities of fourth order: twice the points, a sixteenth of the error."""
    errors = []
    for points in (20, 40):
        trajectories, rows = trajectories_of(swirl, LABELS, points), torch.arange(12)
        known = subsampled(trajectories, rows)
        for t in (0.93, 0.71, 0.4, 0.13):
            states, velocities = known.at(torch.tensor([t], dtype=torch.float64))
            x = trajectories.at(rows, torch.tensor(t))
            torch.testing.assert_close(states[0], cosine_transform(x).flatten(1), atol=1e-4, rtol=1e-4)
            exact = swirl(x, torch.full((12,), t), LABELS.float())
            errors.append((velocities[0] - cosine_transform(exact).flatten(1)).abs().max().item())
    assert max(errors[4:]) < 0.15 * max(errors[:4]) and max(errors[4:]) < 0.04


def test_the_surrogate_knows_the_rollouts():
    """On trajectories it is the model; where a rollout has been it answers alike, and elsewhere by the prior."""
    data = fit_data(12)
    surrogate, known = data.surrogate, data.data
    t = torch.tensor([0.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    away = 0.1 * torch.randn(1, 12, 32, generator=generator, dtype=torch.float64)
    assert not surrogate.change(t, 0 * away).any()
    torch.testing.assert_close(surrogate.change(t, away), surrogate.prior(t)[:, None] * away)
    change = torch.randn(1, 12, 32, generator=generator, dtype=torch.float64)
    for m, pairs in enumerate(surrogate.pairs):
        pairs.append((0.5, away[0, m], change[0, m]))
    surrogate.learn()
    assert (surrogate.change(t, away) - change).norm() < 0.03 * change.norm()
    assert (surrogate.change(t, 2 * away) - 2 * change).norm() < 0.06 * change.norm()
    other = torch.randn(1, 12, 32, generator=generator, dtype=torch.float64)
    other -= (other * away).sum(-1, True) / away.square().sum(-1, True) * away
    torch.testing.assert_close(surrogate.change(t, other), surrogate.prior(t)[:, None] * other)
    far = torch.tensor([0.02], dtype=torch.float64)
    rest = surrogate.change(far, away) - surrogate.prior(far)[:, None] * away
    assert rest.norm() < 0.02 * change.norm(), "what was seen at one time says little of another"
    assert known.variances.shape == (32,)


def test_rollouts_make_the_surrogate_the_model():
    """After rollouts of known methods it foretells how far others end from the truth."""
    data = fit_data(12)
    before = Surrogate(data.data)
    rows = torch.arange(12)
    for solver in ("unipc", "predictor_corrector", "ipndm"):
        form = linear_form(solver, time_grid(6, dtype=torch.float64))
        seen = data.roll_out(Candidate(solver, form), rows)
        data.learn(seen.times, seen.states, seen.velocities, rows)
    data.surrogate.learn()
    form = linear_form("adams_bashforth2", time_grid(6, 1.2, dtype=torch.float64))
    truth = data.roll_out(Candidate("", form), rows).ends - data.data.ends()
    blind, seeing = (
        (each.end_errors(form.times[None], form.weights[None])[0] - truth).norm() / truth.norm()
        for each in (before, data.surrogate)
    )
    assert seeing < 0.3 and seeing < 0.5 * blind, (seeing, blind)


def test_the_fit_ends_nearer_on_the_model(tmp_path):
    check_end_fit(None, None, tmp_path)


def test_a_fit_that_can_gain_nothing_changes_nothing():
    """Where everything is exact already, whatever the derivatives say."""
    data = fit_data(4)
    form = linear_form("unipc", time_grid(5, dtype=torch.float64))
    surrogate = Surrogate(data.data)
    surrogate.end_errors = lambda times, *_: torch.full((len(times), 4, 32), 1e-3, dtype=torch.float64)
    error, found = fit_on_surrogate(surrogate, form, 32)
    torch.testing.assert_close(found.weights, form.weights)
    assert error == pytest.approx(1e-3)


# --- the search -------------------------------------------------------------------------------------------------------


def parts(count=12, validation=4, backbone=None, field=swirl):
    trajectories = trajectories_of(field, torch.arange(count + validation) % 2, 48)
    nfe = Counter()
    return [
        Replay(backbone or swirl_backbone(None, None), part, METADATA, nfe) for part in trajectories.split(validation)
    ]


def test_a_search_is_never_behind_a_known_method(capsys):
    """Of any number of calls, on noises that it has not seen; and it spends what it says."""
    fit, validation = parts()
    found = search_schedules(fit, validation, [3, 5, 6], None, ROUNDS)
    assert [schedule.schedule.calls for schedule in found.values()] == [3, 5, 6]
    labels = torch.arange(32) % 2
    noise = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(8))
    field = model_field(swirl, labels)
    truth = run_baseline("rk4", field, noise, time_grid(100))

    def error(ends):
        return float((ends - truth).square().flatten(1).mean(1).sqrt().mean())

    for n, each in found.items():
        ours = error(solve(field, StraightLine(), noise, each.schedule))
        known = min(
            error(run_baseline(solver, field, noise, time_grid(n, *shape)))
            for solver in KNOWN
            for shape in ((1.0, 0.0), (0.7, 0.0), (1.4, 0.0), (1.0, 0.3), (2.0, 0.0))
        )
        assert ours < known, (n, ours, known)
        assert each.error < 1.5 * ours + 1e-3
    assert fit.nfe["rollouts"] + fit.nfe["validation"] == search.search_nfe(12, 4, [3, 5, 6], False, ROUNDS)
    assert "best known method" in capsys.readouterr().out


def test_a_known_method_is_taken_where_it_ends_nearer(monkeypatch, capsys):
    """Also where the fit is led astray: to a method whose weights are nonsense."""

    def astray(surrogate, begun, size, extra=None):
        weights = begun.weights.clone()
        weights[1:, 0] += 1.0
        return 0.0, replace(begun, weights=weights)

    monkeypatch.setattr(search, "fit_on_surrogate", astray)
    fit, validation = parts(8, 3)
    found = search_schedules(fit, validation, [5], None, ROUNDS)[5]
    assert "the known method is nearer on the model" in capsys.readouterr().out
    assert found.error == found.known_error and found.schedule.calls == 5


def test_the_first_step_is_analytic_where_the_mean_says_it_all():
    backbone = two_points_backbone(None, None)
    fit, validation = parts(12, 4, backbone, lambda x, t, y: backbone.velocity(x, t, y, 1.0))
    found = search_schedules(fit, validation, [2], GAUSSIAN_MEAN, ROUNDS)[2]
    assert found.schedule.analytic_first_step and found.schedule.calls == 2 and len(found.schedule.times) == 4


def test_the_data_mean_is_that_of_other_conditions():
    """A trajectory's own condition says nothing of new prompts."""
    firsts = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)
    found = means_of_others(firsts, torch.tensor([0, 0, 1, 1]))
    assert found[:, 0, 0, 0].tolist() == [2.5, 2.5, 0.5, 0.5]
    alike = means_of_others(firsts, torch.zeros(4))
    assert alike[0, 0, 0, 0] == 2 and means_of_others(firsts[:1], torch.zeros(1))[0, 0, 0, 0] == 0


def test_an_interrupted_search_makes_no_rollout_twice(tmp_path, monkeypatch):
    """And comes to the same schedules."""
    whole = {n: each.schedule for n, each in search_schedules(*parts(6, 2), [4, 5], None, ROUNDS).items()}
    real, made = SearchData.roll_out, []

    def interrupted(self, *rest):
        if len(made) == 6:
            raise KeyboardInterrupt
        made.append(real(self, *rest))
        return made[-1]

    monkeypatch.setattr(SearchData, "roll_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search_schedules(*parts(6, 2), [4, 5], None, ROUNDS, tmp_path)
    assert len(list(tmp_path.glob("rollout *.pt"))) == 6
    monkeypatch.setattr(SearchData, "roll_out", real)
    fit, validation = parts(6, 2)
    resumed = search_schedules(fit, validation, [4, 5], None, ROUNDS, tmp_path)
    for n, schedule in whole.items():
        torch.testing.assert_close(
            torch.tensor(resumed[n].schedule.times), torch.tensor(schedule.times), atol=1e-3, rtol=0
        )
    every = search.search_nfe(6, 2, [4, 5], False, ROUNDS) - search.VALIDATED * 2 * 9
    assert 0 < fit.nfe["rollouts"] < every


def test_a_killed_search_has_its_calls_on_the_bill(tmp_path, monkeypatch):
    """Ended without a chance to write anything, and resumed, it has spent what one in one go has."""
    recording = tmp_path / "trajectories"
    small = ["--trajectories", "8", "--points", "24", "--prefixes", "0", "--no-jitter", "--record-batch", "8"]
    assert main(["record", "--backbone", BACKBONE, "--out", str(recording), *small]) == 0
    options = ["train", "--recordings", str(recording), "--steps", "0", "--nfe", "5,6", "--validation", "2"]

    def spent(out, *more):
        backbone = "python:training_problems:dying_backbone"
        assert main([*options, "--backbone", backbone, "--out", str(out), *more]) == 0
        return load_sidenet(out)[1].training["backbone_calls"]

    monkeypatch.setenv("DIES_AFTER", "1000000")
    whole = spent(tmp_path / "whole.safetensors")
    out, calls = tmp_path / "killed.safetensors", 40
    command = [sys.executable, "-m", "ba_solver.training", *options, "--out", str(out)]
    command += ["--backbone", "python:training_problems:dying_backbone"]
    killed = subprocess.run(command, env=environment() | {"DIES_AFTER": str(calls)}, cwd=tmp_path, check=False)
    assert killed.returncode == 9 and list((tmp_path / "killed.run").glob("rollout *.pt"))
    resumed = spent(out, "--resume")
    assert resumed == whole


def test_the_mean_error_is_the_states():
    errors = torch.zeros(2, 3, 5)
    errors[0, :, 0] = 2.0
    assert mean_error(errors, 16).tolist() == [0.5, 0.0]


# --- the presets ------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_preset_and_the_preset_over_the_defaults(tmp_path):
    """Also flags whose value is the default."""
    flags = ["--backbone", "x", "--out", "x.safetensors", "--preset", "quick"]
    quick = read_settings(MakeSettings, flags, "x", PRESETS)
    assert quick.steps == quick.prefixes == 0 and quick.trajectories == PRESETS["quick"]["trajectories"]
    usual = MakeSettings(backbone="x", out=Path("x.safetensors"))
    same = read_settings(MakeSettings, [*flags, "--trajectories", str(usual.trajectories)], "x", PRESETS)
    assert same.trajectories == usual.trajectories and same.steps == 0
    (tmp_path / "x.toml").write_text('preset = "quick"\npoints = 30\n')
    from_file = read_settings(MakeSettings, [*flags[:4], "--config", str(tmp_path / "x.toml")], "x", PRESETS)
    assert from_file == replace(quick, points=30)
    assert read_settings(MakeSettings, flags[:4], "x", PRESETS) == usual and usual.preset == "full"
    with pytest.raises(UsageError, match="one of quick, full"):
        read_settings(MakeSettings, [*flags[:5], "hasty"], "x", PRESETS)
    assert planned_nfe(quick) == pytest.approx(1_500, rel=0.05) and planned_nfe(usual) == pytest.approx(5_000, rel=0.05)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick SideNet of the swirl by the command line."""
    out = tmp_path_factory.mktemp("quick") / "swirl.safetensors"
    command = ["make", "--backbone", BACKBONE, "--out", str(out), "--preset", "quick", "--nfe", "6"]
    assert main(command) == 0
    return out, command


def test_quick_makes_schedules_without_a_network(quick, capsys):
    """Their errors are below those of the best known method, and they cost what was said."""
    out, command = quick
    sidenet, card = load_sidenet(out)
    assert sum(p.numel() for p in sidenet.parameters()) < 10_000 and not sidenet.output_conv.weight.any()
    assert card.own_schedules[6].coefficients and card.own_schedules[6].calls == 6
    errors = {(row["solver"], row["nfe"]): row["error"] for row in card.evaluation["endpoint_error"]}
    assert errors["ba_solver", 6] <= errors["known", 6]
    spent = sum(card.training["backbone_calls"].values())
    settings = MakeSettings(**preset_values("quick", "6"), backbone=BACKBONE, out=out, nfe="6")
    assert spent == planned_nfe(settings) == pytest.approx(300, rel=0.15)
    assert main(["info", str(out)]) == 0 and "no network" in capsys.readouterr().out
    assert main([*command, "--resume"]) == 0


@pytest.mark.parametrize("nfe", ["", "5"])
def test_schedules_are_for_combined_cfg_alone(nfe, tmp_path, capsys):
    """Per branch a network is trained all the same."""
    recording = ["record", "--backbone", BACKBONE, "--guidance", "2", "--cfg-mode", "per_branch", "--prefixes", "0"]
    assert main([*recording, "--trajectories", "4", "--out", str(tmp_path / "recorded")]) == 0
    train = ["train", "--recordings", str(tmp_path / "recorded"), "--out", str(tmp_path / "x.safetensors")]
    status = main([*train, "--backbone", BACKBONE, "--steps", "1", "--batch", "4", "--nfe", nfe])
    assert status == (2 if nfe else 0)
    assert ("record with --cfg-mode combined" in capsys.readouterr().err) == bool(nfe)
