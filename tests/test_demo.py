"""The shipped demo: a good little model, a SideNet that earns its calls, and the command that shows both."""

import csv

import pytest
import torch
from ba_solver.bas_core import solve, time_grid
from ba_solver.bas_core.files import fingerprint
from ba_solver.lab.classifier import accuracy, load_classifier
from ba_solver.lab.cost import sidenet_share
from ba_solver.lab.shapes import CLASS_NAMES, draw_shapes
from ba_solver.training.baselines import run_baseline
from ba_solver.training.cli import main
from ba_solver.training.demo import show
from ba_solver.training.demo.assets import CLASSIFIER_FILE, demo_noise, load_demo
from ba_solver.training.measuring.rivals import converged_reference
from ba_solver.training.schedules.solvers import baseline_solver, endpoint_errors, search_grid, sidenet_solver
from matplotlib.image import imread

SEED = 8_000_000


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture(scope="module")
def run(demo):
    """Sixteen noises, their field and the converged ends."""
    noise, labels = demo_noise(SEED, 16)
    with torch.inference_mode():
        return noise, labels, converged_reference(demo.field(labels), noise, 1e-4)


def test_shapes_are_drawn_alike_everywhere_and_differ():
    first = draw_shapes(torch.Generator().manual_seed(5), 40)
    again = draw_shapes(torch.Generator().manual_seed(5), 40)
    other = draw_shapes(torch.Generator().manual_seed(6), 40)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert first.images.min() >= -1 and first.images.max() <= 1
    # The stated colour is what is seen at the stated centre of a disc, up to its shading.
    discs = draw_shapes(torch.Generator().manual_seed(1), 30, torch.zeros(30, dtype=torch.long))
    column, row = ((discs.centres + 1) / 2 * 32).long().clamp(0, 31).unbind(1)
    seen = discs.images[torch.arange(30), :, row, column]
    assert (seen - discs.colours).abs().max() < 0.15


def test_classifier_knows_drawn_shapes():
    shapes = draw_shapes(torch.Generator().manual_seed(SEED), 500)
    classifier = load_classifier(CLASSIFIER_FILE)
    assert accuracy(classifier, shapes.images, shapes.labels) > 0.97
    assert accuracy(classifier, shapes.images, shapes.labels.roll(1)) < 0.3


def test_samples_show_the_asked_class(demo):
    """A converged solver's samples at CFG 2; 0.95 over 500 noises in the benchmark, with slack for few here."""
    noise, labels = demo_noise(SEED + 1, 60)
    with torch.inference_mode():
        images = run_baseline("adams_bashforth3", demo.field(labels), noise, time_grid(16, 1.5))
    assert accuracy(load_classifier(CLASSIFIER_FILE), images, labels) >= 0.9


def test_sidenet_belongs_to_the_backbone_and_is_small(demo):
    assert demo.card.backbone["fingerprint"] == fingerprint(demo.sit.state_dict())
    assert demo.card.cfg_mode == "combined"
    parameters = [sum(p.numel() for p in network.parameters()) for network in (demo.sidenet, demo.sit)]
    assert parameters[0] <= 0.1 * parameters[1]
    noise, labels = demo_noise(0, 8)
    assert 0 < sidenet_share(demo.field(labels), demo.sidenet, noise) <= 0.1


@pytest.mark.parametrize("calls", [5, 7, 10])
def test_sidenet_earns_its_calls_on_the_uniform_grid(demo, run, calls):
    """Against Adams-Bashforth 2 on the same grid, and against the same solver without the SideNet."""
    noise, labels, reference = run
    field, grid = demo.field(labels), time_grid(calls)
    with torch.inference_mode():
        ours = endpoint_errors(solve(field, demo.sidenet, noise, grid), reference).mean()
        adams = endpoint_errors(run_baseline("adams_bashforth2", field, noise, grid), reference).mean()
        without = endpoint_errors(solve(field, None, noise, grid), reference).mean()
    assert field.calls == 3 * calls
    assert ours < 0.75 * min(adams, without)


@pytest.mark.parametrize("calls", [4, 5, 7, 10])
def test_learned_grids_spend_what_they_say_and_beat_the_best_rival(demo, run, calls):
    """Evaluations of the network, counted in it; UniPC on its best grid is the nearest that is not fitted."""
    noise, _, reference = run
    field, evaluated = demo.field(torch.arange(16) % 10), []
    counted = demo.sit.register_forward_hook(lambda module, inputs, output: evaluated.append(len(inputs[0])))
    try:
        with torch.inference_mode():
            on_grid, shape = demo.on_grid(sidenet_solver(demo.sidenet), calls, "best")
            ours = endpoint_errors(on_grid.sample(field, noise, calls, shape), reference).mean()
    finally:
        counted.remove()
    assert sum(evaluated) == 2 * 16 * calls and field.nfe == calls
    with torch.inference_mode():
        times = time_grid(calls, *demo.grids["unipc"][calls])
        assert ours < 0.8 * endpoint_errors(run_baseline("unipc", field, noise, times), reference).mean()


def test_odd_budgets_are_spent_exactly(demo):
    noise, labels = demo_noise(SEED, 2)
    for calls in (1, 4, 5):
        field = demo.field(labels)
        baseline_solver("heun").sample(field, noise, calls)
        assert field.calls == calls


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("start", [1.0, 0.97])
def test_unipc_is_that_of_diffusers(demo, run, steps, start):
    diffusers = pytest.importorskip("diffusers")
    noise, labels = (part[:2] for part in run[:2])
    times, field = start * time_grid(steps, 1.5), demo.field(labels)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    scheduler.set_timesteps(sigmas=times[:-1].double().numpy())
    theirs = noise
    with torch.inference_mode():
        for sigma, step in zip(times[:-1], scheduler.timesteps, strict=True):
            theirs = scheduler.step(field.velocity(theirs, sigma), step, theirs, return_dict=False)[0]
        ours = run_baseline("unipc", field, noise, times)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_grid_search_finds_a_better_grid(demo, run):
    noise, labels, reference = (part[:4] for part in run)
    sampler, field = baseline_solver("adams_bashforth2"), demo.field(labels)
    with torch.inference_mode():
        best = search_grid(sampler, field, noise, reference, 5)
        errors = [endpoint_errors(sampler.sample(field, noise, 5, s), reference).mean() for s in ((1.0, 0.0), best)]
    assert errors[1] < errors[0]


def test_demo_command_writes_table_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show, "IMAGES", 5)
    assert main(["demo", "--out", str(tmp_path / "out"), "--nfe", "5"]) == 0
    printed = capsys.readouterr().out
    for label in ("BA-solver", "Euler", "Heun", "Adams-Bashforth 2", "DPM-Solver++(2M)", "UniPC"):
        assert label in printed
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {int(row["nfe"]) for row in rows} == {5, 100}
    uniform = {row["solver"]: float(row["error"]) for row in rows if row["grid"] == "uniform" and row["nfe"] == "5"}
    assert min(uniform, key=uniform.get) == "ba_solver"
    for name in ("images.png", "errors.png"):
        assert imread(tmp_path / "out" / name).std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nfe", "5,x"], "--nfe must be whole numbers"),
        (["--nfe", ""], "--nfe must be whole numbers"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--cfg", "-1"], "--cfg must lie between"),
    ],
)
def test_bad_options_are_refused_in_words_before_any_work(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_unwritable_folder_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_unknown_command_lists_the_commands(capsys):
    assert main(["paint"]) == 2
    assert "demo" in capsys.readouterr().err


def test_class_names_match_the_model(demo):
    assert demo.sit.config.num_classes == len(CLASS_NAMES)
