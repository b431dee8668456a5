"""Evaluation: the learned multistep rival, the report, the checkpoint's table, and the smaller commands."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from ba_solver.bas_core import Field, SideNet, SideNetConfig, load_sidenet, model_field, time_grid
from ba_solver.training.backbones import BackboneChoice, open_backbone
from ba_solver.training.baselines import run_baseline
from ba_solver.training.cli import main
from ba_solver.training.measuring import evaluate
from ba_solver.training.measuring.learned_multistep import LearnedMultistep
from ba_solver.training.recording.trajectories import Trajectories, open_trajectories
from ba_solver.training.schedules.solvers import endpoint_errors
from matplotlib.image import imread
from training_problems import BACKBONE, SHAPE, swirl

torch.set_num_threads(1)


def reference(noise, labels, points=400):
    """The exact path of the test field, at any time."""
    from ba_solver.training.recording.reference_solver import record_trajectory

    times = torch.linspace(1, 0, points)
    states, velocities = record_trajectory(model_field(swirl, labels), noise, times)
    trajectories = Trajectories(times.expand(len(noise), -1), states, velocities, labels)
    return lambda t: trajectories.at(torch.arange(len(noise)), t)


def test_learned_multistep_finds_a_multistep_solver_that_is_there():
    """Where the recorded path is itself one of Adams-Bashforth 2 on the grid, its weights are found."""

    def wave(x, t):
        return torch.sin(3 * x + 9 * t[:, None, None, None])

    grid = time_grid(5, dtype=torch.float64)
    noise = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    visited = {}

    def keep(step):
        visited[round(step.next_time, 4)] = step.x_next

    field = model_field(wave)
    end = run_baseline("adams_bashforth2", field, noise, grid, keep)
    solver = LearnedMultistep(field, noise, lambda t: visited[round(float(t), 4)])
    torch.testing.assert_close(solver(field, noise, grid), end, atol=1e-4, rtol=0)
    (found,) = solver.fitted.values()
    assert [len(c) for c in found] == [1, 2, 3, 4, 5]
    torch.testing.assert_close(found[0], torch.tensor([-0.2], dtype=torch.float64), atol=1e-5, rtol=0)
    for c in found[1:]:
        expected = torch.zeros(len(c), dtype=torch.float64)
        expected[-2:] = torch.tensor([0.1, -0.3])
        torch.testing.assert_close(c, expected, atol=1e-4, rtol=0)


def test_learned_multistep_beats_adams_bashforth_on_other_noises():
    """Same calls, same grid, held-out noises; it costs one call a step, and its fit one run."""
    labels = torch.arange(64) % 2
    noise = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1))
    validation = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(2))
    truth = reference(validation, labels[:16])(0.0)
    fitted = model_field(swirl, labels)
    solver, field = LearnedMultistep(fitted, noise, reference(noise, labels)), model_field(swirl, labels[:16])
    learned = endpoint_errors(solver(field, validation, time_grid(6)), truth).mean()
    assert (field.calls, fitted.calls) == (6, 6)
    known = endpoint_errors(run_baseline("adams_bashforth2", field, validation, time_grid(6)), truth).mean()
    assert learned < 0.7 * known


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`ba-solver make` on the test field, and `ba-solver evaluate` of the result."""
    out = tmp_path_factory.mktemp("made") / "mine.safetensors"
    command = f"make --backbone {BACKBONE} --guidance 2 --trajectories 48 --points 32 --record-batch 16 --out {out} "
    command += "--base-channels 16 --embedding-dim 16 --num-layers 2 --patch-size 1 --batch 64 --steps 250 --warmup 10 "
    command += "--learning-rate 1e-2 --ema 0.95 --nfe 4,6"
    assert main(command.split()) == 0
    command = (
        f"evaluate --backbone {BACKBONE} --sidenet {out} --out {out.with_suffix('.report')} --nfe 4,6 --noises 12 "
    )
    command += f"--noise-batch 6 --search-noises 4 --reference 64 --recordings {out.with_suffix('.trajectories')}"
    assert main(command.split()) == 0
    return out


def lines(out):
    with (out / "results.csv").open() as file:
        return {(row["solver"], int(row["nfe"]), row["grid"]): row for row in csv.DictReader(file)}


def test_it_is_recorded_trained_and_evaluated(made):
    sidenet, card = load_sidenet(made)
    report = made.with_suffix(".report")
    rows = lines(report)
    names = {"euler", "heun", "adams_bashforth2", "dpmpp_2m", "unipc", "predictor_corrector", "learned_multistep"}
    assert {name for name, _, _ in rows} == names | {"ba_solver"}
    assert {(n, g) for name, n, g in rows if name == "ba_solver"} == {
        (n, g) for n in (4, 6) for g in ("uniform", "best")
    }
    assert sorted(card.own_schedules) == [4, 6] and card.training["settings"]["trajectories"] == 48
    for calls in (4, 6):
        ours = float(rows["ba_solver", calls, "uniform"]["error"])
        assert ours < float(rows["predictor_corrector", calls, "uniform"]["error"])
        assert float(rows["ba_solver", calls, "best"]["error"]) < ours
    found = json.loads((report / "results.json").read_text())
    assert found["reference_error"] < 0.01 * float(rows["euler", 4, "uniform"]["error"])
    assert found["settings"]["noises"] == 12 and found["endpoint_error"] == card.evaluation["endpoint_error"]
    for name in ("images.png", "errors.png"):
        assert imread(report / name).std() > 0.03
    trajectories, _ = open_trajectories([made.with_suffix(".trajectories")])
    assert len(trajectories) == 48 and sidenet.config.in_channels == 2


def test_measured_errors_are_the_distances_to_the_exact_end(made):
    """One line of the table, computed anew by other means."""
    choice = BackboneChoice(backbone=BACKBONE)
    backbone = open_backbone(choice)
    parts = []
    for batch in range(2):
        generator = torch.Generator().manual_seed(evaluate.REPORT_SEED + 1000 + batch)
        noise, labels = torch.randn((6, *SHAPE), generator=generator), torch.arange(6) % 2
        field = backbone.field(labels, 2.0)
        end = run_baseline("rk4", field, noise, torch.linspace(1, 0.0, 300))
        parts.append(endpoint_errors(run_baseline("euler", field, noise, time_grid(4)), end))
    row = lines(made.with_suffix(".report"))["euler", 4, "uniform"]
    assert float(row["error"]) == pytest.approx(torch.cat(parts).mean().item(), rel=2e-3)
    assert float(row["spread"]) == pytest.approx(torch.cat(parts).std().item() / 12**0.5, rel=0.02)


def test_evaluate_alone_fits_the_rival_on_noises_of_its_own(made, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(made.read_bytes())
    command = (
        f"evaluate --backbone {BACKBONE} --sidenet {copy} --out {tmp_path / 'r'} --nfe 5 --noises 6 --search-noises 4"
    )
    assert main(f"{command} --reference 64".split()) == 0
    rows = lines(tmp_path / "r")
    # The file has no schedule for 5 calls, and gets none.
    assert ("learned_multistep", 5, "best") in rows and ("ba_solver", 5, "best") not in rows
    card = load_sidenet(copy)[1]
    assert sorted(card.own_schedules) == [4, 6] and all(run.coefficients for run in card.own_schedules.values())
    assert main(f"{command} --reference 64 --search-noises 0".replace("--nfe 5", "--nfe 6").split()) == 0
    assert {(name, grid) for name, n, grid in lines(tmp_path / "r") if n == 6 and grid != "uniform"} == {
        ("ba_solver", "best")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--guidance 5", "made for guidance 2;"),
        ("--backbone python:training_problems:other_backbone", "belongs to 'swirl'; 'other' is asked for"),
        ("--nfe 5,x", "--nfe must be whole numbers"),
        ("--reference 10", "--reference must be at least four times"),
        ("--recordings nowhere", "no folder nowhere"),
        ("--sidenet nothing.safetensors", "no file nothing.safetensors"),
        ("--noises 0", "--noises must be at least 1"),
    ],
)
def test_bad_evaluations_are_refused_in_words(options, message, made, tmp_path, capsys):
    command = f"evaluate --backbone {BACKBONE} --sidenet {made} --out {tmp_path / 'r'} {options}"
    assert main(command.split()) in (1, 2)
    assert message in capsys.readouterr().err


def test_make_does_not_train_over_a_sidenet(made, capsys):
    before = made.read_bytes()
    command = f"make --backbone {BACKBONE} --guidance 2 --trajectories 48 --points 32 --record-batch 16 --out {made}"
    assert main(command.split()) == 2
    assert "exists already; nothing is overwritten" in capsys.readouterr().err
    assert made.read_bytes() == before


def test_info_says_what_a_sidenet_is(made, capsys):
    assert main(["info", str(made)]) == 0
    said = capsys.readouterr().out
    for fact in ("swirl (python, fingerprint swirl-1)", "2 anchor(s)", "combined, guidance 2",
                 "schedules:  4 model calls (", "multistep coefficients); 6 model calls (",
                 "48 trajectories of 32 points of (2, 4, 4)",
                 "fraction of variance unexplained by kind", "Euler"):  # fmt: skip
        assert fact in said, said


def test_official_sidenets_are_converted(tmp_path, capsys):
    sidenet = SideNet(SideNetConfig(base_channels=16, embedding_dim=16, num_classes=10))
    torch.save({"ema_side_model": sidenet.state_dict(), "step": 5}, tmp_path / "official.pt")
    target = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "official.pt"), str(target)]) == 0
    converted, card = load_sidenet(target)
    assert card.cfg_mode == "per_branch" and card.training["converted_from"] == "official.pt"
    state = sidenet.state_dict()
    assert all(torch.equal(converted.state_dict()[name], state[name]) for name in state)
    assert main(["convert", str(tmp_path / "official.pt"), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    assert main(["convert", str(tmp_path / "bad.pt"), str(tmp_path / "b.safetensors")]) == 1
    assert main(["info", str(tmp_path / "official.pt")]) == 1
    assert "cannot be read as safetensors" in capsys.readouterr().err


def test_a_report_is_kept_where_its_images_cannot_be_decoded(made, tmp_path, monkeypatch, capsys):
    """Decoding comes last, takes the most memory, and is done image by image."""
    copy, out, seen = tmp_path / "copy.safetensors", tmp_path / "report", []
    copy.write_bytes(made.read_bytes())

    def decode(x):
        seen.append(len(x))
        if len(seen) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return x[:, :1].expand(-1, 3, -1, -1).clamp(0, 1)

    backbone = replace(open_backbone(BackboneChoice(backbone=BACKBONE)), decode=decode)
    monkeypatch.setattr(evaluate, "open_backbone", lambda settings: backbone)
    command = f"evaluate --backbone {BACKBONE} --sidenet {copy} --out {out} --nfe 6 --noises 6 --search-noises 0"
    assert main(f"{command} --reference 64".split()) == 1 and "memory is too small" in capsys.readouterr().err
    assert set(seen) == {1}
    errors = load_sidenet(copy)[1].evaluation["endpoint_error"]
    assert json.loads((out / "results.json").read_text())["endpoint_error"] == errors and (out / "errors.png").exists()


def test_out_of_memory_says_what_to_lower(monkeypatch, capsys):
    def explode(settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("ba_solver.training.recording.record.run_record", explode)
    assert main(["record", "--backbone", BACKBONE, "--out", "x"]) == 1
    said = capsys.readouterr().err
    assert "GPU's memory is too small" in said and "Lower --record-batch" in said


def test_a_field_that_takes_other_guidance_is_combined_by_its_own_rule():
    """`Backbone.combine` replaces CFG; outside the interval the conditional branch stands alone."""
    import dataclasses

    plain = open_backbone(BackboneChoice(backbone=BACKBONE))
    special = dataclasses.replace(plain, combine=lambda c, u, s: c - s * u)
    x, labels = torch.randn(2, *SHAPE), torch.tensor([0, 1])
    field: Field = special.field(labels, 3.0, (0.0, 0.5))
    null = torch.full_like(labels, 2)
    for t, expected in ((0.4, swirl(x, torch.full((2,), 0.4), labels) - 3 * swirl(x, torch.full((2,), 0.4), null)),
                        (0.6, swirl(x, torch.full((2,), 0.6), labels))):  # fmt: skip
        torch.testing.assert_close(field.velocity(x, t), expected)
