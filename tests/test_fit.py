"""Training from trajectories: resume, processes, stages and what they reach, on a field whose truth is known."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from ba_solver.bas_core import load_sidenet, save_sidenet
from ba_solver.bas_core.files import read_pickled_tensors, read_safetensors, write_safetensors
from ba_solver.training.cli import main
from ba_solver.training.network import published, stages
from ba_solver.training.network.loop import LoopSettings, Microbatch, train
from ba_solver.training.network.new_sidenet import new_sidenet
from ba_solver.training.network.options import Training
from ba_solver.training.network.published import load_latents, published_loss, signed_steps
from ba_solver.training.recording.record import PREFIXES
from ba_solver.training.recording.repeatable import ASKED
from ba_solver.training.schedules.search import VALIDATION_TRAJECTORIES, network_nfe, search_nfe
from ba_solver.training.sidenet_files import describe_sidenet
from training_checks import (
    QUICK,
    SMALL,
    TRANSFORMER,
    check_pairs,
    record,
    rollout_error,
    run,
    train_on_pairs,
)
from training_problems import BACKBONE, GAUSSIAN_MEAN, SHAPE, environment, in_two_processes, swirl_backbone

torch.set_num_threads(1)

# Two trajectories of 40 points, and some of their calls again; on two noises 40 points, every second of them, and ten
# calls of a multistep method.
PILOT_CALLS = 2 * (40 + ASKED) + 2 * (40 + 21 + 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recordings at CFG 2: guided, of both branches, and over a range of scales."""
    root = tmp_path_factory.mktemp("recorded")
    record(root / "combined", "--guidance", "2", "--trajectories", "96")
    record(root / "branch", "--guidance", "2", "--trajectories", "48", "--cfg-mode", "per_branch")
    record(root / "range", "--guidance", "1.5", "3", "--trajectories", "64")
    return root


def tensors(path):
    return read_safetensors(path)[0]


def assert_same_weights(one, other):
    """To rounding: AdamW moves every weight by about the learning rate, .01, in every step."""
    assert one and one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=2e-3, atol=2e-5)


def test_four_steps_equal_two_stop_resume_two(folder, tmp_path, monkeypatch, capsys):
    """Through the command; without --resume nothing is continued or lost."""
    options = (*SMALL, "--steps", "4", "--save-every", "1")
    run(folder / "combined", tmp_path / "whole.safetensors", *options)
    calls, real = [], stages.relative_loss

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(stages, "relative_loss", interrupted)
    part = tmp_path / "part.safetensors"
    run(folder / "combined", part, *options, status=130)
    monkeypatch.setattr(stages, "relative_loss", real)
    assert not part.exists()
    run(folder / "combined", part, *options, status=2)
    assert "Continue with --resume" in capsys.readouterr().err
    run(folder / "combined", part, *options, "--resume", "--seed", "9", status=2)
    assert "seed was 1, now 9" in capsys.readouterr().err
    run(folder / "combined", part, *options, "--resume")
    assert_same_weights(tensors(tmp_path / "whole.safetensors"), tensors(part))
    assert not list((tmp_path / "part.run").glob("*.pt"))


def test_a_killed_training_goes_on_from_its_last_save(folder, tmp_path):
    """Killed without a chance to tidy up, it leaves no half file, and --resume comes to the same weights."""
    options = [*QUICK, "--steps", "60", "--save-every", "10"]
    out = tmp_path / "killed.safetensors"
    command = [
        sys.executable,
        "-m",
        "ba_solver.training",
        "train",
        "--recordings",
        str(folder / "combined"),
        "--out",
        str(out),
    ]
    process = subprocess.Popen([*command, *options], env=environment(), cwd=tmp_path, stderr=subprocess.DEVNULL)
    state = out.with_suffix(".run") / "all_pairs.pt"
    while not state.exists():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.kill()
    assert process.wait() != 0 and not out.exists() and read_pickled_tensors(state)["step"] % 10 == 0
    run(folder / "combined", out, *options, "--resume")
    run(folder / "combined", tmp_path / "whole.safetensors", *options)
    assert_same_weights(tensors(tmp_path / "whole.safetensors"), tensors(out))


def test_two_processes_equal_one(folder, tmp_path):
    """Two CPU processes of accelerate share each batch and come to the one-process weights, to rounding.

    One of them fits the schedules.
    """
    options = [*QUICK, "--steps", "12", "--save-every", "6", "--warmup", "2"]
    options += ["--backbone", BACKBONE, "--nfe", "4"]
    card = run(folder / "combined", tmp_path / "one.safetensors", *options)[1]
    command = ["train", "--recordings", str(folder / "combined"), "--out", str(tmp_path / "two.safetensors"), *options]
    said = in_two_processes(command, tmp_path)
    one, two = tensors(tmp_path / "one.safetensors"), tensors(tmp_path / "two.safetensors")
    start = tensors_of_untrained(folder, tmp_path)
    assert_same_weights(one, two)
    assert max((one[name] - value).abs().max() for name, value in start.items()) > 0.02
    assert "Written:" in said[0] and not said[1]
    again = load_sidenet(tmp_path / "two.safetensors")[1]
    assert again.training["backbone_calls"] == card.training["backbone_calls"]
    one, two = (torch.tensor(each.own_schedules[4].times) for each in (card, again))
    torch.testing.assert_close(one, two, atol=1e-3, rtol=0)


def tensors_of_untrained(folder, tmp_path):
    still = ("--steps", "1", "--warmup", "1", "--learning-rate", "1e-12")
    run(folder / "combined", tmp_path / "start.safetensors", *SMALL, *still)
    return tensors(tmp_path / "start.safetensors")


def test_accumulated_passes_equal_one(folder, tmp_path, capsys):
    options = (*QUICK, "--steps", "10", "--warmup", "2")
    run(folder / "combined", tmp_path / "one.safetensors", *options)
    run(folder / "combined", tmp_path / "four.safetensors", *options, "--accumulate", "4")
    assert_same_weights(tensors(tmp_path / "one.safetensors"), tensors(tmp_path / "four.safetensors"))
    run(folder / "combined", tmp_path / "x.safetensors", *options, "--accumulate", "5", status=2)
    assert "must be a multiple of processes times --accumulate" in capsys.readouterr().err


def test_the_weights_with_the_best_score_are_kept():
    """Scores 3, 1, 2: the second report's weights are returned."""
    model = torch.nn.Linear(1, 1)
    scores, seen = iter([3.0, 1.0, 2.0]), []

    def report(average, step):
        seen.append(average.weight.item())
        return {"score": next(scores)}

    settings = LoopSettings(steps=6, batch=1, learning_rate=0.1, warmup=1, save_every=2)
    best = train(model, lambda step, microbatch: model(torch.ones(1, 1)).sum(), settings, "toy", None, report)
    assert len(seen) == 3 and best.weight.item() == seen[1] != seen[2]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    return train_on_pairs(folder / "combined", tmp_path_factory.mktemp("trained") / "sidenet.safetensors")


def test_training_from_chains_beats_the_solver_without_a_sidenet(folder, trained, tmp_path):
    table = trained[2].evaluation["variance_unexplained"]
    assert set(table) == {"kind", "time", "step"} and len(table["step"]) >= 3
    check_pairs(folder / "combined", trained[0], tmp_path)


def test_a_transformer_and_its_optimizer_learn_with_starts_at_hand(tmp_path):
    """Tokens and Muon, on whole runs and on the starts of many more, which are counted and asked."""
    folder = tmp_path / "trajectories"
    record(folder, "--guidance", "2", "--trajectories", "64", "--prefixes", "96", "--prefix-points", "10")
    assert len(list((folder / PREFIXES).glob("*.safetensors"))) == 6
    quick = ("--warmup", "10", "--learning-rate", "2e-2", "--ema", "0.9", "--batch", "64", "--steps", "150")
    sidenet, card = run(folder, tmp_path / "a.safetensors", *TRANSFORMER, *quick)
    assert sidenet.config.architecture == "transformer"
    spent = card.training["backbone_calls"]
    assert spent == {"pilot": PILOT_CALLS, "trajectories": 64 * 40, "prefixes": 96 * 10}
    assert card.evaluation["variance_unexplained"]["kind"]["beyond"] < 0.9
    (folder / PREFIXES / "trajectories-0001-00003.safetensors").write_bytes(b"damaged")
    assert main(["train", "--recordings", str(folder), "--out", str(tmp_path / "b.safetensors")]) == 1


def test_starts_of_another_model_are_refused(tmp_path, capsys):
    folder, other = tmp_path / "trajectories", tmp_path / "other"
    record(folder, "--trajectories", "16")
    record(other, "--trajectories", "16", "--prefixes", "16", "--backbone", "python:training_problems:other_backbone")
    (other / PREFIXES).rename(folder / PREFIXES)
    assert main(["train", "--recordings", str(folder), "--out", str(tmp_path / "a.safetensors")]) == 1
    assert "does not belong to the others: backbone elsewhere" in capsys.readouterr().err


def test_the_data_mean_is_kept_where_the_first_velocity_leads_there(folder, tmp_path, capsys):
    """Elsewhere it is said that the first step is not analytic."""
    record(tmp_path / "recorded", "--trajectories", "24", "--backbone", "python:training_problems:gaussian_backbone")
    options = (*TRANSFORMER, "--steps", "3", "--batch", "8", "--data-mean-size", "4")
    sidenet, _ = run(tmp_path / "recorded", tmp_path / "a.safetensors", *options)
    torch.testing.assert_close(sidenet.data_mean, GAUSSIAN_MEAN, atol=1e-5, rtol=0)
    capsys.readouterr()
    sidenet, _ = run(folder / "combined", tmp_path / "b.safetensors", *options)
    assert sidenet.config.data_mean_size == 0 and "so the first step is not analytic" in capsys.readouterr().out


def test_a_network_without_a_mean_gets_no_analytic_first_step(tmp_path):
    """It would be a call more than the schedule is for. One that keeps a mean gets it on the same recordings."""
    backbone = ("--backbone", "python:training_problems:two_points_backbone")
    assert main(["record", *backbone, "--trajectories", "16", "--points", "24", "--out", str(tmp_path / "r")]) == 0
    analytic = {}
    for name, size in (("without", 0), ("with", 4)):
        begun = tmp_path / f"{name}.safetensors"
        run(tmp_path / "r", begun, *SMALL, "--steps", "1", "--warmup", "1", "--data-mean-size", size)
        options = ("--start-from", begun, "--steps", "0", "--nfe", "2", *backbone, *SMALL)
        sidenet, card = run(tmp_path / "r", tmp_path / f"{name}_2.safetensors", *options)
        schedule = card.own_schedules[2]
        analytic[name] = schedule.analytic_first_step
        assert schedule.calls == 2 and (sidenet.has_data_mean or not analytic[name])
    assert analytic == {"without": False, "with": True}


def test_the_card_says_how_it_was_made(folder, trained):
    out, _, card = trained
    assert card.cfg_mode == "combined" and card.cfg_range == (2.0, 2.0)
    assert card.backbone == {"name": "swirl", "kind": "python", "fingerprint": "swirl-1"}
    training = card.training
    assert training["backbone_calls"] == {"pilot": PILOT_CALLS, "trajectories": 96 * 40}
    assert training["trajectories"] == 96
    assert training["validation_trajectories"] == 12 and training["settings"]["learning_rate"] == 0.01
    assert training["settings"]["recordings"] == ["combined"] and "/" not in json.dumps(training["settings"])
    assert training["recorded"]["reference_error"] > 0
    journal = out.with_suffix(".run")
    assert list((journal / "tensorboard").iterdir()) and (journal / "all_pairs_loss.png").stat().st_size > 5000


def test_schedules_with_a_network_spend_what_they_say_and_lower_the_error(folder, trained, tmp_path):
    """They end nearer than the uniform grid, and all is counted."""
    out, sidenet, _ = trained
    options = ("--steps", "0", "--start-from", out, "--backbone", BACKBONE, *QUICK)
    learned, card = run(folder / "combined", tmp_path / "g.safetensors", *options, "--nfe", "5")
    schedule = card.own_schedules[5]
    grid = torch.tensor(schedule.times)
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all() and schedule.nfe == 5
    fitted = rollout_error(learned, folder / "combined", schedule)
    assert fitted < 0.4 * rollout_error(sidenet, folder / "combined")
    spent = card.training["backbone_calls"]
    assert card.evaluation["noises"] == VALIDATION_TRAJECTORIES < 12
    with_network = network_nfe(84, 12, [5], True, Training.network_rounds)
    assert spent["rollouts"] + spent["validation"] == search_nfe(84, 12, [5], True, Training.rounds) + with_network
    # What it began as is not forgotten.
    assert card.training["started_from"] == trained[2].training
    assert f"began as:   one trained: {trained[2].training['objective']}" in describe_sidenet(sidenet, card)


def test_a_transformer_has_its_models_patches():
    metadata = {"shape": [4, 8, 8], "guidance": [1.0, 1.0], "num_classes": 0, "patch_size": 4}
    transformer = Training(architecture="transformer")
    assert new_sidenet(transformer, metadata).config.patch_size == 4
    assert new_sidenet(replace(transformer, patch_size=1), metadata).config.patch_size == 1
    assert new_sidenet(Training(), metadata).config.patch_size == 1  # of convolutions


def test_branches_and_guidance_ranges_train(folder, tmp_path):
    """In branch mode the SideNet sees the null class; over a range it is told the scale, and listens."""
    branch, card = run(folder / "branch", tmp_path / "b.safetensors", *QUICK, "--batch", "64", "--steps", "200")
    assert card.cfg_mode == "per_branch" and card.training["trajectories"] == 48
    assert rollout_error(branch, folder / "branch") < 0.9 * rollout_error(None, folder / "branch")
    ranged, card = run(folder / "range", tmp_path / "r.safetensors", *QUICK, "--batch", "64", "--steps", "200")
    assert card.cfg_range == (1.5, 3.0) and ranged.config.cfg_input
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    t, h, y = torch.full((2,), 0.6), torch.full((2,), 0.1), torch.tensor([0, 1])
    low, high = (ranged(x, x, t, h, y, scale=torch.full((2,), s)) for s in (1.5, 3.0))
    assert (low - high).abs().max() > 1e-3


def test_steps_of_the_published_objective():
    """Signed by a fair coin, of mean 0.02 where there is room, and never beyond the ends of the path."""
    t = torch.linspace(0, 1, 40_001)
    h = signed_steps(t, torch.Generator().manual_seed(0))
    assert (t - h >= -1e-6).all() and (t - h <= 1 + 1e-6).all()
    middle = h[(t > 0.3) & (t < 0.7)]
    assert middle.abs().mean().item() == pytest.approx(0.02, rel=0.03)
    assert (middle > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    # Truncated, not clipped: no heap of steps that fill the room exactly.
    near = (t > 0.009) & (t < 0.011) & (h > 0)
    assert (h[near] < t[near] * 0.999).float().mean() > 0.97


def test_published_objective_trains_and_counts_its_calls(tmp_path, folder):
    """Nine calls a sample; what it reaches on held-out trajectories is better than a constant velocity."""
    latents = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1)) * 0.3
    write_safetensors(tmp_path / "data.safetensors", {"latents": latents, "labels": torch.arange(64) % 2}, {})
    options = ("--objective", "published", "--latents", tmp_path / "data.safetensors", "--backbone", BACKBONE)
    _, card = run(
        folder / "branch",
        tmp_path / "p.safetensors",
        *options,
        *QUICK,
        "--anchors",
        "1",
        "--steps",
        "60",
        "--batch",
        "32",
    )
    assert card.training["backbone_calls"] == {"published": 60 * 9 * 32}
    assert card.evaluation["variance_unexplained"]["kind"]["last"] < 0.9


def test_published_loss_is_zero_for_an_exact_sidenet():
    """With the exact change of velocity in the SideNet's place nothing is left, whatever the steps."""
    from ba_solver.training.backbones import Backbone

    backbone = Backbone("still", "python", "1", SHAPE, lambda x, t, y, scale: (3 * t**2)[:, None, None, None] + 0 * x)
    latents = published.Latents(torch.zeros(4, *SHAPE), torch.zeros(4, dtype=torch.long))

    def exact(x, v, t, h, y):
        return (3 * (t - h) ** 2 - 3 * t**2)[:, None, None, None] + 0 * x

    def blank(x, v, t, h, y):
        return 0 * x

    for network, low, high in ((exact, 0, 1e-10), (blank, 1e-4, 1)):
        loss = published_loss(network, backbone, latents, 64, torch.Generator().manual_seed(0), Microbatch())
        assert low <= loss <= high


def test_the_backbone_keeps_its_precision_where_the_sidenet_is_trained_in_another():
    """Under autocast to bfloat16, as by --precision bf16, it computes as it does when it is sampled."""
    seen, matrix = [], torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    def velocity(x, t, y, scale):
        seen.append(x @ matrix)
        return seen[-1]

    backbone = replace(swirl_backbone(torch.device("cpu"), None), velocity=velocity)
    latents = published.Latents(torch.randn(4, *SHAPE), torch.zeros(4, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        published_loss(lambda x, v, t, h, y: 0 * x, backbone, latents, 2, torch.Generator(), Microbatch())
    assert seen and {v.dtype for v in seen} == {torch.float32}


def test_latents_come_from_folders_of_images(tmp_path):
    """Subfolders are classes in alphabetical order; images are resized to the model's size."""
    from ba_solver.training.backbones import Backbone
    from matplotlib.image import imsave

    for name, value in (("ant", 0.0), ("bee", 1.0)):
        (tmp_path / "images" / name).mkdir(parents=True)
        imsave(tmp_path / "images" / name / "a.png", torch.full((8, 6, 3), value).numpy())
    backbone = Backbone(
        "x", "python", "1", (3, 4, 4), lambda *a: a[0], conditions=2, encode=lambda images: images * 2 - 1
    )
    latents = load_latents(tmp_path / "images", backbone)
    assert latents.labels.tolist() == [0, 1]
    torch.testing.assert_close(latents.states, torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 4, 4))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load_latents(tmp_path / "none", backbone)


def test_bfloat16_trains(folder, tmp_path):
    _, card = run(
        folder / "combined",
        tmp_path / "b.safetensors",
        *QUICK,
        "--batch",
        "64",
        "--steps",
        "150",
        "--precision",
        "bf16",
    )
    assert card.evaluation["variance_unexplained"]["kind"]["beyond"] < 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--guidance", "3"), "recorded with guidance [2.0, 2.0]; [3.0, 3.0] is asked for"),
        (("--objective", "magic"), "--objective must be one of all_pairs, published"),
        (("--objective", "published"), "--latents and --objective published go together"),
        (("--nfe", "5"), "need --backbone"),
        (("--architecture", "mlp"), "--architecture must be one of conv, transformer"),
        (("--objective", "published", "--latents", "x", "--nfe", "5"), "fits no schedules"),
        (
            ("--objective", "published", "--latents", "x.safetensors", "--backbone", BACKBONE),
            "with --cfg-mode per_branch",
        ),
        (("--rule", "legendre3"), "--rule must be one of lobatto2"),
        (("--nfe-range", "9", "5"), "--nfe-range must be two numbers"),
        (("--validation", "96"), "leaves none of the 96 trajectories"),
        (("--base-channels", "12", "--num-heads", "8"), "base_channels must be a multiple of num_heads"),
        (("--batch", "0"), "--batch must be at least 1"),
        (("--precision", "fp8"), "--precision must be fp32 or bf16"),
        (("--start-from", "missing.safetensors"), "no file missing.safetensors"),
        (
            ("--nfe", "5", "--backbone", "python:training_problems:other_backbone"),
            "'other' (swirl-2) is asked for",
        ),
        (("--nfe", "5", "--backbone", "python:training_problems:larger_backbone"), "asked for at [2, 8, 8]"),
    ],
)
def test_bad_settings_are_refused_in_words(options, message, folder, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["train", "--recordings", str(folder / "combined"), "--out", str(out), *options]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_sidenet_of_another_model_is_not_started_from(folder, trained, tmp_path, capsys):

    _, sidenet, card = trained
    save_sidenet(tmp_path / "s.safetensors", sidenet, replace(card, backbone={"name": "else", "fingerprint": "0"}))
    run(folder / "combined", tmp_path / "o.safetensors", "--start-from", tmp_path / "s.safetensors", status=1)
    assert "belongs to 'else', the trajectories to 'swirl'" in capsys.readouterr().err


def test_unwritable_places_and_wrong_suffixes_are_refused(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    run(folder / "combined", tmp_path / "file" / "o.safetensors", status=2)
    assert "cannot be written" in capsys.readouterr().err
    run(folder / "combined", tmp_path / "o.pt", status=2)
    assert "must end in .safetensors" in capsys.readouterr().err


def test_a_run_state_of_another_network_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "o.safetensors"
    run(folder / "combined", out, *SMALL, "--steps", "0")
    (tmp_path / "o.run").mkdir(exist_ok=True)
    torch.save({"step": 3}, tmp_path / "o.run" / "all_pairs.pt")
    out.unlink()
    run(folder / "combined", out, *SMALL, "--steps", "2", "--resume", status=2)
    assert "steps was 0, now 2" in capsys.readouterr().err
    settings = json.loads((tmp_path / "o.run" / "settings.json").read_text()) | {"steps": 2}
    (tmp_path / "o.run" / "settings.json").write_text(json.dumps(settings))
    run(folder / "combined", out, *SMALL, "--steps", "2", "--resume", status=1)
    assert "is the state of another training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parameters", "most"), [(0, 60_000), (600_000, 60_000), (10_000_000, 150_000), (12 * 10**9, 15 * 10**6)]
)
def test_the_networks_size_follows_from_its_models(parameters, most):
    """A tenth of a small model, up to 60,000 numbers, 1.5 % of a larger one, and no more than can be trained; what is
    given stays."""
    metadata = {"shape": [4, 8, 8], "guidance": [1.0, 1.0], "num_classes": 0, "patch_size": 2, "parameters": parameters}
    sidenet = new_sidenet(Training(), metadata)
    count = sum(p.numel() for p in sidenet.parameters())
    assert most / 8 < count <= most, count
    assert new_sidenet(Training(base_channels=32), metadata).config.base_channels == 32
