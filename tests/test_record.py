"""Recording: what the shards hold, that it can be interrupted, and what is refused."""

from pathlib import Path

import pytest
import torch
from ba_solver.bas_core import CheckpointError
from ba_solver.training.backbones import open_backbone
from ba_solver.training.backbones.base import Backbone, BackboneChoice
from ba_solver.training.baselines import run_baseline
from ba_solver.training.cli import main
from ba_solver.training.recording import record as recording
from ba_solver.training.recording.reference_solver import LAST_TIME, default_times, record_trajectory
from ba_solver.training.recording.repeatable import ASKED
from ba_solver.training.recording.shards import open_shard, save_shard
from ba_solver.training.recording.trajectories import Trajectories, open_trajectories
from training_problems import BACKBONE, in_two_processes, swirl


def arguments(out, **changes):
    values = {
        "backbone": BACKBONE,
        "trajectories": 10,
        "record_batch": 4,
        "points": 24,
        "guidance": 2.0,
        "prefixes": 0,
        **changes,
    }
    flags = []
    for name, value in values.items():
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return [*flags, "--out", str(out)]


def record(out, **changes):
    assert main(["record", *arguments(out, **changes)]) == 0
    return open_trajectories([out])


def assert_same_trajectories(one, other):
    """Equal noises, times and labels, and states to rounding: other noises are at a distance of metadata 1."""
    assert len(one) == len(other) and torch.equal(one.labels, other.labels) and torch.equal(one.times, other.times)
    for i in range(len(one)):
        assert torch.equal(one.states[i][0], other.states[i][0])
        torch.testing.assert_close(one.states[i], other.states[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(one.velocities[i], other.velocities[i], rtol=0, atol=1e-4)


def guided(x, t, y, scale):
    return torch.lerp(swirl(x, t, torch.full_like(y, 2)), swirl(x, t, y), scale)


def test_shards_hold_the_guided_field_along_its_path(tmp_path, capsys):
    trajectories, metadata = record(tmp_path / "trajectories")
    printed = capsys.readouterr().out
    assert "240 model calls" in printed and "reference solver's own error" in printed and "to go" in printed
    assert (
        len(trajectories) == 10
        and metadata["guidance"] == [2.0, 2.0]
        and metadata["backbone"]["fingerprint"] == "swirl-1"
    )
    assert trajectories.labels.tolist() == [i % 2 for i in range(10)]
    rows = torch.arange(10)
    for point in (0, 9, 23):
        at = torch.full((10,), point)
        x, v = trajectories.states[rows, at], trajectories.velocities[rows, at]
        torch.testing.assert_close(v, guided(x, trajectories.times[rows, at], trajectories.labels, 2.0))
    # Two shards of a recording have noises and times of their own.
    first = trajectories.states[rows, torch.zeros(10, dtype=torch.long)]
    assert torch.pdist(first.flatten(1)).min() > 1 and (trajectories.times[0] != trajectories.times[4]).any()


def test_two_processes_share_the_shards(tmp_path):
    """Each records some; together they are the recording of one process, and one of them speaks."""
    whole, _ = record(tmp_path / "one")
    said = in_two_processes(["record", *arguments(tmp_path / "two")], tmp_path)
    assert "model calls" in said[0] and not said[1]
    shared, _ = open_trajectories([tmp_path / "two"])
    assert_same_trajectories(shared, whole)


def test_streamed_chains_are_the_same_as_chains_in_memory(tmp_path):
    """Indexing, splitting and reading between the points do not depend on where the numbers lie."""
    trajectories, _ = record(tmp_path / "trajectories")
    states, velocities = (
        torch.stack([part[i] for i in range(10)]) for part in (trajectories.states, trajectories.velocities)
    )
    memory = Trajectories(trajectories.times, states, velocities, trajectories.labels, trajectories.scales)
    rows, points = torch.tensor([9, 0, 5]), torch.tensor([3, 23, 0])
    assert torch.equal(trajectories.states[rows, points], states[rows, points])
    for streamed, kept in zip(trajectories.split(3), memory.split(3), strict=True):
        assert len(streamed) == len(kept)
        some = torch.tensor([0, 2])
        assert torch.equal(streamed.velocities[some, some], kept.velocities[some, some])
        assert torch.equal(streamed.ends(some), kept.ends(some))


def test_states_between_points_are_of_fourth_order():
    """The cubic through states and velocities: halving the steps leaves a sixteenth of the error."""
    errors = []
    for points in (20, 40):
        times = torch.linspace(1, 0.01, points, dtype=torch.float64).expand(2, -1)
        phase = 5 * times[..., None, None, None] + torch.arange(2)[:, None, None, None, None]
        trajectories = Trajectories(times, phase.sin(), 5 * phase.cos(), torch.arange(2))
        at = torch.linspace(0.95, 0.05, 37, dtype=torch.float64)
        found = torch.stack([trajectories.at(torch.tensor([1, 0]), t).flatten() for t in at])
        errors.append((found - (5 * at[:, None] + torch.tensor([1, 0])).sin()).abs().max().item())
    assert 3.7 < torch.log2(torch.tensor(errors[0] / errors[1])).item() < 4.3, errors


def test_per_branch_mode_records_both_branches_on_the_guided_path(tmp_path):
    trajectories, metadata = record(tmp_path / "branches", cfg_mode="per_branch", guidance_interval=(0.0, 0.7))
    path, _ = record(tmp_path / "combined", guidance_interval=(0.0, 0.7))
    assert len(trajectories) == 20 and trajectories.branches == 2 and metadata["cfg_mode"] == "per_branch"
    assert trajectories.labels.tolist()[:4] == [0, 2, 1, 2]
    rows = torch.arange(20)
    for point in (0, 7, 23):
        at = torch.full((20,), point)
        x, v = trajectories.states[rows, at], trajectories.velocities[rows, at]
        torch.testing.assert_close(v, swirl(x, trajectories.times[rows, at], trajectories.labels))
        torch.testing.assert_close(x[::2], path.states[rows[:10], at[:10]])
    train, validation = trajectories.split(3)
    assert len(train) == 14 and len(validation) == 6


def test_guidance_range_is_recorded_with_its_scales(tmp_path):
    trajectories, metadata = record(tmp_path / "trajectories", guidance=(1.5, 4.0), trajectories=24)
    assert metadata["guidance"] == [1.5, 4.0]
    assert 1.5 <= trajectories.scales.min() < 2.5 and 3 < trajectories.scales.max() <= 4
    rows, at = torch.arange(24), torch.full((24,), 11)
    x, v = trajectories.states[rows, at], trajectories.velocities[rows, at]
    expected = guided(x, trajectories.times[rows, at], trajectories.labels, trajectories.scales[:, None, None, None])
    torch.testing.assert_close(v, expected)


def test_an_interrupted_recording_goes_on_to_the_same_chains(tmp_path, monkeypatch, capsys):
    whole, _ = record(tmp_path / "whole")
    out, count = tmp_path / "parts", []
    real = recording.recorded

    def interrupted(*rest):
        if len(count) == 2:  # the pilot, and a shard
            raise KeyboardInterrupt
        count.append(rest)
        return real(*rest)

    monkeypatch.setattr(recording, "recorded", interrupted)
    assert main(["record", *arguments(out)]) == 130
    assert len(list(out.glob("*.safetensors"))) == 1
    monkeypatch.setattr(recording, "recorded", real)
    resumed, _ = record(out)
    assert "1 of 3 shards are already recorded" in capsys.readouterr().out
    assert_same_trajectories(resumed, whole)


def test_a_coarse_reference_solver_is_measured_and_warned_about(tmp_path, capsys):
    """The measured error is about the distance from the converged end, and few points are called coarse."""
    choice = BackboneChoice(backbone=BACKBONE, guidance=(2.0,))
    backbone = open_backbone(choice)
    for points in (24, 48, 96):
        settings = recording.Recording(checked=8)
        times = default_times(points)
        found = recording.reference_error(settings, times, choice, backbone)
        assert found["reference_calls"] == 8 * (points + points // 2 + 1 + 10)
        field = backbone.field(torch.arange(16) % 2, 2.0)
        noise = torch.randn(16, *backbone.shape, generator=torch.Generator().manual_seed(3))
        converged = run_baseline("rk4", field, noise, torch.linspace(1, LAST_TIME, 400))
        ends = record_trajectory(field, noise, times)[0][:, -1]
        truth = (ends - converged).square().mean().sqrt().item()
        assert 0.4 * truth < found["reference_error"] < 8 * truth, (points, truth, found)
    capsys.readouterr()
    record(tmp_path / "fine", points=96)
    assert "coarse" not in capsys.readouterr().out
    record(tmp_path / "coarse", points=10)
    assert "Warning: that is coarse" in capsys.readouterr().out


def test_open_points_are_as_many_as_it_takes(tmp_path, monkeypatch):
    """The pilot's file says how many, and is not made twice."""
    monkeypatch.setattr(recording, "COARSE", 1e-3)
    _, metadata = record(tmp_path / "open", points=0)
    assert metadata["points"] in recording.POINTS[1:] and metadata["reference_relative_error"] <= recording.COARSE
    spent = metadata["pilot_calls"]
    tried = recording.POINTS[: recording.POINTS.index(metadata["points"]) + 1]
    assert spent == 2 * (40 + ASKED) + sum(2 * (points + points // 2 + 1 + 10) for points in tried)
    before = (tmp_path / "open" / "pilot" / "pilot.safetensors").stat().st_mtime_ns
    record(tmp_path / "open", points=0)
    assert (tmp_path / "open" / "pilot" / "pilot.safetensors").stat().st_mtime_ns == before


def test_a_recording_grows_without_loss(tmp_path):
    """Its last shard was short."""
    assert len(record(tmp_path / "trajectories", trajectories=10)[0]) == 10
    grown, _ = record(tmp_path / "trajectories", trajectories=15)
    assert len(grown) == 15 and len({float(grown.states[i][0].sum()) for i in range(15)}) == 15


def test_without_jitter_all_times_are_alike(tmp_path):
    assert main(["record", *arguments(tmp_path / "still"), "--no-jitter"]) == 0
    recorded, _ = open_trajectories([tmp_path / "still"])
    assert (recorded.times == recorded.times[0]).all()
    moved, _ = record(tmp_path / "moved")
    assert not (moved.times == moved.times[0]).all()


def refused(capsys, *command):
    status = main([str(part) for part in command])
    said = capsys.readouterr().err
    assert status in (1, 2), said
    return said


def test_what_is_there_is_never_overwritten(tmp_path, capsys):
    out = tmp_path / "trajectories"
    record(out)
    before = {path.name: path.read_bytes() for path in out.rglob("*.safetensors")}
    said = refused(capsys, "record", *arguments(out, guidance=3.0))
    assert "guidance was [2.0, 2.0], now [3.0, 3.0]" in said and "nothing is overwritten" in said
    assert "record_batch was 4, now 5" in refused(capsys, "record", *arguments(out, record_batch=5))
    assert before == {path.name: path.read_bytes() for path in out.rglob("*.safetensors")}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.jpg").write_text("dear")
    assert "holds other things (holiday.jpg)" in refused(capsys, "record", *arguments(tmp_path / "other"))


def damage(path, kind):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "flipped":
        content = bytearray(path.read_bytes())
        content[-1000] ^= 1
        path.write_bytes(content)
    elif kind == "not trajectories":
        save_shard(path, {"weights": torch.zeros(3)}, {})
    else:
        tensors, metadata = open_shard(path)
        tensors = {name: value.clone() for name, value in tensors.items()}
        tensors["states"][1, 3] = float("nan")
        save_shard(path, tensors, metadata)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "truncated"),
        ("flipped", "check sum"),
        ("NaN", "NaN"),
        ("not trajectories", "holds no trajectories"),
    ],
)
def test_damaged_shards_are_refused_by_name(kind, message, tmp_path):
    out = tmp_path / "trajectories"
    record(out)
    path = sorted(out.iterdir())[1]
    damage(path, kind)
    with pytest.raises(CheckpointError, match=f"{path.name}.*{message}"):
        open_trajectories([out])


def test_shards_of_the_same_name_or_of_another_recording_are_refused(tmp_path):
    record(tmp_path / "a")
    record(tmp_path / "b")
    with pytest.raises(CheckpointError, match="same name, hence the same seed and the same noises"):
        open_trajectories([tmp_path / "a", tmp_path / "b"])
    record(tmp_path / "c", seed=2)
    assert len(open_trajectories([tmp_path / "a", tmp_path / "c"])[0]) == 20
    record(tmp_path / "d", seed=3, guidance=3.0)
    with pytest.raises(CheckpointError, match=r"guidance elsewhere \[2.0, 2.0\], here \[3.0, 3.0\]"):
        open_trajectories([tmp_path / "a", tmp_path / "d"])
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere with trajectories"):
        open_trajectories([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "sit"}, "must be a kind, a colon and where"),
        ({"backbone": "magic:x"}, "must be a kind"),
        ({"backbone": "python:no_such_module:f"}, "no module no_such_module"),
        ({"backbone": "python:training_problems:nothing"}, "no function nothing"),
        (
            {"backbone": "python:training_problems:not_a_backbone"},
            "must return a ba_solver.training.backbones.Backbone; got int",
        ),
        ({"backbone": "sit:missing.safetensors"}, "There is no file missing.safetensors"),
        ({"backbone": "python:training_problems:broken_backbone"}, "NaN or infinity"),
        ({"points": 3}, "--points must be at least 8"),
        ({"trajectories": 0}, "--trajectories must be at least 1"),
        ({"checked": -1}, "--checked must not be negative"),
        ({"cfg_mode": "both"}, "--cfg-mode must be one of per_branch, combined"),
        ({"storage": "int8"}, "--storage must be one of"),
        ({"dtype": "half"}, "--dtype must be one of"),
        ({"device": "abacus"}, "--device abacus cannot be used"),
        ({"guidance": (3.0, 2.0)}, "--guidance must be one scale"),
        ({"prompts": "p.txt"}, "--prompts means nothing to a python backbone"),
    ],
)
def test_bad_settings_are_refused_in_words(changes, message, tmp_path, capsys):
    said = refused(capsys, "record", *arguments(tmp_path / "out", **changes))
    assert message in said
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_settings_come_from_a_file_and_flags_win(tmp_path, capsys):
    config = tmp_path / "record.toml"
    config.write_text(f'backbone = "{BACKBONE}"\ntrajectories = 4\npoints = 8\nrecord_batch = 4\nguidance = [2.0]\n')
    assert main(["record", "--config", str(config), "--trajectories", "8", "--out", str(tmp_path / "out")]) == 0
    assert len(open_trajectories([tmp_path / "out"])[0]) == 8
    config.write_text('backbone = "x"\nchian = 4\n')
    said = refused(capsys, "record", "--config", config, "--out", tmp_path)
    assert "Unknown key chian" in said and "trajectories" in said and "guidance_interval" in said
    said = refused(capsys, "record", "--backbone", "x", "--out", tmp_path, "--chian", "4")
    assert "Unknown option --chian" in said and "trajectories" in said
    config.write_text("trajectories = = 4")
    assert "is no TOML file" in refused(capsys, "record", "--config", config, "--out", tmp_path)
    assert "no such file" in refused(capsys, "record", "--config", tmp_path / "none.toml")


def test_the_documented_example_is_recorded(tmp_path):
    """docs/training.md shows the file that is used here, to the letter."""
    trajectories, metadata = record(
        tmp_path / "trajectories", backbone="python:example_backbone:my_model", guidance=1.0, trajectories=4, points=12
    )
    assert metadata["backbone"]["name"] == "my model" and tuple(trajectories.states.shape) == (4, 12, 4, 32, 32)
    root = Path(__file__).resolve().parents[1]
    assert (root / "tests" / "example_backbone.py").read_text() in (root / "docs" / "training.md").read_text()


def test_a_class_that_a_backbone_has_not_is_refused():
    backbone = Backbone("b", "python", "0", (1, 2, 2), lambda x, t, c, s: x, conditions=3, null=3, num_classes=3)
    assert backbone.field(torch.tensor([0, 3]), 2.0)
    with pytest.raises(ValueError, match="Classes must be from 0 to 3; got 4"):
        backbone.field(torch.tensor([0, 4]), 1.0)
