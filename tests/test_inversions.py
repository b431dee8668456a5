"""Runs to the noise and back, fitted together: what they are, how they are made, and that they are worth it."""

import dataclasses
from collections import Counter

import pytest
import torch
from ba_solver.bas_core import FittedRun, Inversion, SideNetCard, load_sidenet, run_baseline, save_sidenet, solve
from ba_solver.bas_core.editing import START
from ba_solver.lab.round_trips import all_round_trips, decibels
from ba_solver.training.backbones import BackboneChoice, open_backbone
from ba_solver.training.cli import main
from ba_solver.training.demo.assets import load_demo
from ba_solver.training.make import MakeSettings, planned_calls
from ba_solver.training.recording.chains import Chains, open_chains
from ba_solver.training.recording.replay import Replay
from ba_solver.training.recording.teacher import record_chain
from ba_solver.training.runs.inversions import fit_inversion, learn_inversions, paths_up
from training_problems import BACKBONE

CALLS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A quick SideNet with an inversion, tuned for a few steps."""
    out = tmp_path_factory.mktemp("inversions") / "mine.safetensors"
    command = ["make", "--backbone", BACKBONE, "--out", str(out), "--effort", "quick", "--nfe", str(CALLS)]
    command += ["--guidance", "2", "--inversion", "--tune", "40"]
    main(command)
    return out, command


@pytest.fixture(scope="module")
def unseen():
    """Images that the fitting has not seen, at `START`, and the field and the noise that belong to them."""
    backbone = open_backbone(BackboneChoice(backbone=BACKBONE))
    images = 0.5 * torch.randn(16, *backbone.shape, generator=torch.Generator().manual_seed(77))
    field = backbone.field(torch.arange(16) % 2, 1.0)
    return field, images, run_baseline("rk4", field, images, torch.linspace(START, 1, 65))


def up(*times, **parts):
    return FittedRun(times, **parts)


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        ((up(0.1, 0.5, 1.0), up(1.0, 0.4, 0.1)), "comes down the same ones"),
        ((up(1.0, 0.5, 0.1), up(0.1, 0.5, 1.0)), "goes up its times"),
        ((up(0.1, 0.5, 1.0), up(1.0, 0.5, 0.1, skip_first=True)), "all are made"),
        ((up(0.1, 0.5, 1.0, half_calls=((), (1.0, 0.0))), up(1.0, 0.5, 0.1)), "whole ones"),
    ],
)
def test_two_runs_that_are_none_are_refused(ways, message):
    with pytest.raises(ValueError, match=message):
        Inversion(*ways)


def test_they_are_listed_under_what_they_cost():
    with pytest.raises(ValueError, match="listed under 3 calls costs 2"):
        SideNetCard(inversions={3: Inversion(up(0.1, 0.5, 1.0), up(1.0, 0.5, 0.1))})


def test_they_are_in_the_file(made, tmp_path):
    sidenet, card = load_sidenet(made[0])
    assert set(card.inversions) == {CALLS} and card.inversions[CALLS].calls == CALLS
    copied = tmp_path / "copy.safetensors"
    save_sidenet(copied, sidenet, card)
    assert load_sidenet(copied)[1] == card


def test_info_tells_of_them(made, capsys):
    main(["info", str(made[0])])
    assert f"inversions: {CALLS} calls each way" in capsys.readouterr().out


def test_chains_that_rise_are_read_as_those_that_fall(unseen):
    field, images, noise = unseen
    times = torch.linspace(START, 1, 129)
    states, velocities = record_chain(field, images, times)
    chains = Chains(times.expand(16, -1), states, velocities, torch.arange(16) % 2)
    rows = torch.arange(16)
    assert torch.allclose(chains.truth(rows, torch.tensor(1.0)), noise, atol=2e-4)
    middle = run_baseline("rk4", field, images, torch.linspace(START, 0.613, 65))
    assert torch.allclose(chains.truth(rows, torch.tensor(0.613)), middle, atol=2e-4)
    falling = Chains(chains.times.flip(1), states.flip(1), velocities.flip(1), chains.labels)
    assert torch.equal(chains.times[:, 0], torch.full((16,), START))
    assert torch.allclose(falling.at(rows, 0.613), chains.at(rows, 0.613), atol=1e-5)


def errors(way_up, way_down, sidenet, unseen):
    """Of the noise, and decibels of the return."""
    field, images, noise = unseen
    with torch.inference_mode():
        found = solve(field, sidenet, images, way_up)
        back = solve(field, sidenet, found, way_down)
    return (found - noise).square().mean().sqrt().item(), decibels(back, images).mean().item()


def test_both_ways_gain_on_images_that_were_not_seen(made, unseen):
    """Beside the same steps without weights: a third of the noise's error at most, and 10 dB more of the image."""
    sidenet, card = load_sidenet(made[0])
    fitted = card.inversions[CALLS]
    noise, psnr = errors(fitted.up, fitted.down, sidenet, unseen)
    plain_noise, plain = errors(*(torch.tensor(run.times) for run in (fitted.up, fitted.down)), sidenet, unseen)
    assert noise < plain_noise / 3 and psnr > plain + 10
    # Each way needs its own weights: on the other's, the return is lost.
    crossed = dataclasses.replace(fitted.down, step_weights=fitted.up.step_weights)
    assert errors(fitted.up, crossed, sidenet, unseen)[1] < psnr - 10


def test_tuning_returns_better_than_least_squares(made, unseen, tmp_path):
    out, _ = made
    sidenet, card = load_sidenet(out)
    backbone = open_backbone(BackboneChoice(backbone=BACKBONE))
    replay = Replay(backbone, *recorded(out.with_suffix(".chains")), Counter())
    squares = fit_inversion(sidenet, paths_up(replay, 16, tmp_path), CALLS)
    tuned = card.inversions[CALLS]
    assert errors(tuned.up, tuned.down, sidenet, unseen)[1] > errors(squares.up, squares.down, sidenet, unseen)[1]


def recorded(folder):
    return open_chains((folder,))


def test_an_interrupted_tuning_goes_on_to_the_same_numbers(made, tmp_path):
    out, _ = made
    sidenet = load_sidenet(out)[0]
    backbone = open_backbone(BackboneChoice(backbone=BACKBONE))
    settings = MakeSettings(backbone=BACKBONE, out=out, save_every=4)
    chains, about = recorded(out.with_suffix(".chains"))

    class StopError(Exception):
        pass

    def learn(folder, stop=10**9):
        left = [stop]

        def velocity(*inputs):
            left[0] -= 1
            if left[0] < 0:
                raise StopError
            return backbone.velocity(*inputs)

        replay = Replay(dataclasses.replace(backbone, velocity=velocity), chains, about, Counter())
        found = learn_inversions(sidenet, replay, (CALLS,), settings.loop(8, 4), folder / "paths", folder)
        return found, stop - left[0]

    whole, calls = learn(tmp_path / "whole")
    with pytest.raises(StopError):
        learn(tmp_path / "stopped", calls * 9 // 10)
    resumed, fewer = learn(tmp_path / "stopped")
    assert resumed == whole
    assert fewer < calls / 3  # paths and finished steps are not made again


def test_the_cost_is_what_was_planned(made):
    card = load_sidenet(made[0])[1]
    settings = MakeSettings(backbone=BACKBONE, out=made[0], nfe=str(CALLS), chains=19, tune=40)
    planned = planned_calls(dataclasses.replace(settings, inversion=True)) - planned_calls(settings)
    gradients = 2 * 3 * 40 * 4 * CALLS - 40 * 4 * 2 * CALLS  # planned as three calls, counted as one
    assert 0.8 * (planned - gradients) < card.training["backbone_calls"]["inversions"] <= planned


def test_the_same_command_again_adds_nothing(made):
    out, command = made
    before = out.read_bytes()
    main([*command, "--resume"])
    assert out.read_bytes() == before


def test_they_are_added_to_a_file_that_is_there(made, tmp_path):
    sidenet, card = load_sidenet(made[0])
    bare, (out, command) = tmp_path / "bare.safetensors", made
    save_sidenet(bare, sidenet, dataclasses.replace(card, inversions={}))
    main([str(bare) if part == str(out) else part for part in command] + ["--resume"])
    added = load_sidenet(bare)[1]
    assert added.runs == card.runs and added.inversions == card.inversions


def test_recordings_of_branches_are_refused(tmp_path, capsys):
    command = ["make", "--backbone", BACKBONE, "--guidance", "2", "--out", str(tmp_path / "x.safetensors")]
    assert main([*command, "--inversion", "--mode", "branch"]) == 2
    assert "needs recordings of the guided velocity" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_demo_compares_what_its_file_holds():
    demo = load_demo()
    fitted = all_round_trips(demo)[-1]
    assert set(demo.card.inversions) == {5, 7, 10} and fitted.inversions == demo.card.inversions
