"""Runs for more CFG scales than one: which is taken, how they are made, and that they are worth it."""

import dataclasses

import pytest
import torch
from ba_solver.bas_core import Schedule, SideNetCard, load_sidenet, save_sidenet, solve
from ba_solver.training.backbones import Backbone, BackboneChoice, open_backbone
from ba_solver.training.cli import main
from ba_solver.training.make import MakeSettings, planned_nfe
from ba_solver.training.measuring.rivals import converged_reference
from ba_solver.training.presets import PRESETS
from ba_solver.training.recording.trajectories import open_trajectories
from ba_solver.training.schedules.solvers import endpoint_errors
from training_problems import BACKBONE

MORE = 6.0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A quick SideNet for CFG 2, with runs for another scale."""
    out = tmp_path_factory.mktemp("scales") / "mine.safetensors"
    command = ["make", "--backbone", BACKBONE, "--out", str(out), "--preset", "quick", "--nfe", "8", "--points", "36"]
    command += ["--guidance", "2", "--extra-guidance", f"{MORE:g}"]
    main(command)
    return out, command


def runs_for(*scales):
    """A card whose runs are told apart by their second time."""
    schedules = {scale: {2: Schedule((1.0, scale / 10, 0.0))} for scale in scales}
    return SideNetCard(cfg_range=(scales[0],) * 2, schedules=schedules)


@pytest.mark.parametrize(
    ("scale", "taken"),
    [(0.5, 2), (1, 2), (2, 2), (2.2, 2), (2.9, 4), (3.5, 4), (4, 4), (5, 4), (7, 8), (9, 8), (50, 8)],
)
def test_the_nearest_scale_is_taken_and_rather_a_smaller_one(scale, taken):
    card = runs_for(2.0, 4.0, 8.0)
    assert card.schedules_for(scale)[2].times[1] == pytest.approx(taken / 10)
    assert card.supports_cfg(scale) == (1 <= scale <= 12)
    assert runs_for(2.0).schedules_for(scale)[2].times[1] == pytest.approx(0.2)


def test_a_network_without_runs_serves_what_it_was_trained_for():
    card = SideNetCard(cfg_range=(1.0, 2.0))
    assert card.supports_cfg(1.5) and not card.supports_cfg(2.5)


def test_they_are_in_the_file(made, tmp_path):
    out, _ = made
    sidenet, card = load_sidenet(out)
    assert set(card.schedules) == {2.0, MORE} and card.describe_cfg() == "2 and 6"
    assert card.schedules[MORE][8].times != card.own_schedules[8].times
    copied = tmp_path / "copy.safetensors"
    save_sidenet(copied, sidenet, card)
    assert load_sidenet(copied)[1] == card


def test_each_scale_is_sampled_best_by_its_own_runs(made):
    """The runs found at one scale against those found at the other, both ways, on noises that neither has seen."""
    sidenet, card = load_sidenet(made[0])
    backbone = open_backbone(BackboneChoice(backbone=BACKBONE, guidance=(2.0,)))
    noise = torch.randn(16, *backbone.shape, generator=torch.Generator().manual_seed(77))
    labels = torch.arange(16) % 2
    for scale, other in ((2.0, MORE), (MORE, 2.0)):
        field = backbone.field(labels, scale)
        with torch.inference_mode():
            exact = converged_reference(field, noise)
            own, others = (
                endpoint_errors(solve(field, sidenet, noise, card.schedules_for(at)[8]), exact).mean()
                for at in (scale, other)
            )
        assert own < 0.7 * others


def test_the_cost_is_what_was_planned(made):
    card = load_sidenet(made[0])[1]
    settings = MakeSettings(**PRESETS["quick"], backbone=BACKBONE, out=made[0], nfe="8", guidance=(2.0,), points=36)
    more = dataclasses.replace(settings, extra_guidance=(MORE,))
    planned = planned_nfe(more) - planned_nfe(settings)
    assert 0.8 * planned < card.training["backbone_calls"]["CFG 6"] <= planned


def test_the_same_command_again_adds_nothing(made, capsys):
    out, command = made
    before = out.read_bytes()
    main([*command, "--resume"])
    assert out.read_bytes() == before
    assert "trained already" in capsys.readouterr().out


def test_another_scale_is_added_to_a_file(made, tmp_path):
    out, command = made
    copied = tmp_path / out.name
    copied.write_bytes(out.read_bytes())
    main([str(copied) if part == str(out) else part for part in command] + ["4", "--resume"])
    card = load_sidenet(copied)[1]
    assert set(card.schedules) == {2.0, MORE, 4.0}
    assert card.schedules[MORE] == load_sidenet(out)[1].schedules[MORE]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--extra-guidance", "4", "4"), "each once"),
        (("--extra-guidance", "-1"), "from 0 to 100"),
        (("--extra-guidance", "4", "--cfg-mode", "per_branch"), "needs trajectories of combined CFG"),
        (("--guidance", "2", "4", "--preset", "quick"), "A range of CFG is an input of the network"),
    ],
)
def test_what_cannot_be_done_is_said(options, message, tmp_path, capsys):
    assert (
        main(["make", "--backbone", BACKBONE, "--guidance", "2", "--out", str(tmp_path / "x.safetensors"), *options])
        == 2
    )
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_schedules_of_a_range_are_filed_under_the_scale_that_they_were_fitted_at(tmp_path, monkeypatch):
    """And measured at the scale that the file says."""
    recording, out = tmp_path / "range", tmp_path / "mine.safetensors"
    command = ["record", "--backbone", BACKBONE, "--guidance", "2", "4", "--out", str(recording)]
    assert main([*command, "--trajectories", "16", "--points", "36", "--prefixes", "0", "--record-batch", "4"]) == 0
    trajectories = open_trajectories([recording])[0]
    assert trajectories.scales[:4].tolist() == trajectories.scales[8:12].tolist() == [3.0] * 4
    asked, real = [], Backbone.field_in_main_memory

    def spied(self, conditions, scale, *rest):
        asked.append(scale)
        return real(self, conditions, scale, *rest)

    monkeypatch.setattr(Backbone, "field_in_main_memory", spied)
    command = ["train", "--backbone", BACKBONE, "--recordings", str(recording), "--out", str(out), "--nfe", "5"]
    assert main([*command, "--steps", "0", "--validation", "2"]) == 0
    card = load_sidenet(out)[1]
    held_out = trajectories.scales[-1].item()
    assert held_out != 3 and set(asked) == {3.0, held_out}
    assert set(card.schedules) == {3.0}
    assert card.evaluation["guidance"] == held_out and card.evaluation["noises"] == 2
