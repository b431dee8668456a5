"""Schedules searched on a surrogate: what it knows of the model, and what the search comes to."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ba_solver.bas_core.checkpoint import load_sidenet
from ba_solver.bas_core.grids import time_grid
from ba_solver.bas_core.schedule import plain_schedule
from ba_solver.training.cli import main
from ba_solver.training.make import MakeSettings, planned_nfe
from ba_solver.training.presets import PRESETS
from ba_solver.training.recording.reference_solver import LAST_TIME
from ba_solver.training.recording.replay import Replay
from ba_solver.training.schedules import surrogate_search
from ba_solver.training.schedules.surrogate import (
    Surrogate,
    default_gain,
    deviations_of,
    means_of_others,
    subsampled,
    velocity_at,
)
from ba_solver.training.schedules.surrogate_search import even_enough, rollouts, search_on_surrogate
from ba_solver.training.settings import UsageError, read_settings
from training_problems import BACKBONE, GAUSSIAN_MEAN, swirl, swirl_backbone, trajectories_of, two_points_backbone

LABELS = torch.arange(12) % 2
METADATA = {"guidance": [1.0, 1.0], "guidance_interval": [0.0, 1.0], "cfg_mode": "combined", "record_batch": 8}


@pytest.fixture(scope="module")
def replay():
    """Trajectories of the swirl, and the swirl."""
    trajectories = trajectories_of(swirl, LABELS, 40)
    return Replay(swirl_backbone(None, None), trajectories, METADATA, Counter())


def test_recorded_velocities_between_the_points(replay):
    """Fourth order: with twice the points the error falls sixteenfold, at any time and in every trajectory."""
    errors = []
    for points in (20, 40):
        trajectories = trajectories_of(swirl, LABELS, points)
        rows = torch.arange(len(trajectories))
        for t in (0.93, 0.71, 0.4, 0.13):
            x = replay.trajectories.at(rows, torch.tensor(t))
            exact = swirl(x, torch.full((len(x),), t), LABELS.float())
            errors.append((velocity_at(trajectories, t) - exact).abs().max().item())
    assert max(errors[4:]) < 0.15 * max(errors[:4]) and max(errors[4:]) < 0.02


def test_the_surrogate_knows_the_rollouts(replay):
    """On trajectories it is the model; where a rollout has been it answers alike, and elsewhere by the gain."""
    rows = torch.arange(12)
    few = subsampled(replay.trajectories, rows, 0, count=24)
    assert torch.equal(few.subsample(replay.trajectories.states[rows, 0 * rows]), few.truth(torch.tensor(1.0)))
    t = torch.tensor(0.5)
    away = 0.1 * torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x = replay.trajectories.at(rows, t) + away
    v = swirl(x, t.expand(12), LABELS.float())
    seen = deviations_of(few, [(0.5, few.subsample(x), few.subsample(v))])
    field = Surrogate(few, [seen]).field()
    on_path, there = (field.velocity(few.truth(t) + part * few.subsample(away), t) for part in (0, 1))
    assert torch.allclose(on_path, velocity_at(few.trajectories, 0.5), atol=1e-5)
    asked = few.subsample(v) - on_path
    assert (there - on_path - asked).norm() < 0.15 * asked.norm()
    # What it has not seen goes by the gain.
    other = torch.randn(12, 24, 1, 1, generator=torch.Generator().manual_seed(1))
    other -= (
        (other * few.subsample(away)).sum(1, True) / few.subsample(away).square().sum(1, True) * few.subsample(away)
    )
    gain = Surrogate(few, [seen]).gain(0.5)
    moved = field.velocity(few.truth(t) + other, t) - on_path
    assert torch.allclose(moved, gain * other, atol=1e-4) and gain < 0
    assert Surrogate(few).gain is default_gain


def test_the_data_mean_is_that_of_other_conditions():
    """A trajectory's own condition says nothing of new prompts."""
    firsts = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)
    found = means_of_others(firsts, torch.tensor([0, 0, 1, 1]))
    assert [mean[0, 0, 0].item() for mean in found] == [2.5, 2.5, 0.5, 0.5]
    alike = means_of_others(firsts, torch.zeros(4))
    assert alike[0][0, 0, 0] == 2 and means_of_others(firsts[:1], torch.zeros(1))[0][0, 0, 0] == 0


def test_the_first_step_is_analytic_where_the_mean_says_it_all():
    backbone = two_points_backbone(None, None)
    trajectories = trajectories_of(lambda x, t, y: backbone.velocity(x, t, y, 1.0), LABELS, 48)
    known = Replay(backbone, trajectories, METADATA, Counter())
    runs = search_on_surrogate(known, [2], GAUSSIAN_MEAN)
    assert runs[2].analytic_first_step and runs[2].calls == 2 and len(runs[2].times) == 4


def test_the_better_first_step_is_taken_and_of_all_searches_the_best(capsys, monkeypatch):
    tried = []

    def noted(trajectories, replay, rows, runs, mean):
        seen, errors = rollouts(trajectories, replay, rows, runs, mean)
        tried.append((runs, errors))
        return seen, errors

    monkeypatch.setattr(surrogate_search, "rollouts", noted)
    replay = Replay(swirl_backbone(None, None), trajectories_of(swirl, LABELS, 24), METADATA, Counter())
    found = search_on_surrogate(replay, [3, 4], torch.zeros(2, 4, 4))
    # Each search prints its errors with an analytic first step and without, and takes the better.
    said = re.findall(r"(\d) calls: about (\S+) with an analytic first step, (\S+) without", capsys.readouterr().out)
    searched = [runs[calls] for runs, _ in tried for calls in (3, 4)]
    assert len(said) == len(searched) == 2 * surrogate_search.SEARCHES
    for (calls, saved, made), run in zip(said, searched, strict=True):
        assert run.analytic_first_step <= (float(saved) <= float(made)) and run.calls == int(calls)
    # Of all searches, those times that ended nearest on the model.
    for calls, run in found.items():
        assert run is min(tried, key=lambda pair: pair[1][calls])[0][calls]


def test_steps_that_shrink_too_fast_are_not_trusted():
    assert even_enough(time_grid(6)) and even_enough(torch.tensor([1.0, 0.7, 0.5, 0.45]))
    assert not even_enough(torch.tensor([1.0, 0.7, 0.6, 0.3, 0.0]))


def test_rollouts_see_the_model_beside_the_trajectories(replay):
    rows = torch.arange(4)
    few = subsampled(replay.trajectories, rows, 0)
    (seen,), errors = rollouts(few, replay, rows, {5: plain_schedule(time_grid(5))}, None)
    assert 0 < errors[5] < 1
    assert replay.nfe["rollouts"] >= 4 * 5 and seen.times[0] == 1 and list(seen.times) == sorted(seen.times)[::-1]
    for t, away, change in list(zip(seen.times, seen.states, seen.velocities, strict=True))[2:]:
        if t > 2 * LAST_TIME:
            x = few.truth(torch.tensor(t)) + away[..., None, None]
            whole = x[..., 0, 0][:, few.index.argsort()].unflatten(1, (2, 4, 4))
            v = swirl(whole, torch.full((4,), t), LABELS[:4].float())
            assert torch.allclose(
                few.subsample(v)[..., 0, 0] - velocity_at(few.trajectories, t)[..., 0, 0], change, atol=1e-4
            )


# --- the presets ------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_preset_and_the_preset_over_the_defaults(tmp_path):
    """Also flags whose value is the default."""
    flags = ["--backbone", "x", "--out", "x.safetensors", "--preset", "quick"]
    quick = read_settings(MakeSettings, flags, "x", PRESETS)
    assert quick.steps == quick.tune == quick.prefixes == 0 and quick.points == PRESETS["quick"]["points"]
    usual = MakeSettings(backbone="x", out=Path("x.safetensors"))
    same = read_settings(MakeSettings, [*flags, "--points", str(usual.points), "--tune", "480"], "x", PRESETS)
    assert same.points == usual.points and same.tune == 480 and same.steps == 0
    (tmp_path / "x.toml").write_text('preset = "quick"\npoints = 30\n')
    from_file = read_settings(MakeSettings, [*flags[:4], "--config", str(tmp_path / "x.toml")], "x", PRESETS)
    assert from_file == replace(quick, points=30)
    assert read_settings(MakeSettings, flags[:4], "x", PRESETS) == usual and usual.preset == "full"
    with pytest.raises(UsageError, match="one of quick, full"):
        read_settings(MakeSettings, [*flags[:5], "hasty"], "x", PRESETS)
    assert planned_nfe(quick) < 2_000 < 15_000 < planned_nfe(usual)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick SideNet of the swirl by the command line."""
    out = tmp_path_factory.mktemp("quick") / "swirl.safetensors"
    command = ["make", "--backbone", BACKBONE, "--out", str(out), "--preset", "quick", "--nfe", "6"]
    assert main(command) == 0
    return out, command


def test_quick_makes_runs_without_a_network(quick, capsys):
    """Its errors are far below those of solvers that nothing was fitted for."""
    out, command = quick
    sidenet, card = load_sidenet(out)
    assert sum(p.numel() for p in sidenet.parameters()) < 10_000 and not sidenet.output_conv.weight.any()
    assert card.own_schedules[6].coefficients and card.own_schedules[6].calls == 6
    errors = {(row["solver"], row["nfe"]): row["error"] for row in card.evaluation["endpoint_error"]}
    assert errors["ba_solver", 6] < 0.5 * min(errors["adams_bashforth2", 6], errors["dpmpp_2m", 6])
    spent = sum(card.training["backbone_calls"].values())
    settings = MakeSettings(**{**PRESETS["quick"], "backbone": BACKBONE, "out": out, "nfe": "6"})
    assert 0.8 * planned_nfe(settings) < spent <= planned_nfe(settings)
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
