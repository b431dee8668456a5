"""Compare Solvers and Prompt Lines in real ComfyUI: calls counted, ends compared, shown."""

import csv
from pathlib import Path

import comfyui
import pytest
import torch

comfyui.require()

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy_models as models
import folder_paths
from ba_solver.bas_core import Guidance, load_sidenet, load_sit, model_field, solve, time_grid
from ba_solver.nodes import compare_nodes
from ba_solver.nodes.compare_nodes import CompareSolvers, PromptLines, csv_path, pictures_or_none
from ba_solver.nodes.comparing.compare import compare, jobs_for
from ba_solver.nodes.comparing.table import table
from ba_solver.nodes.folders import DEMO, SIDENETS, SITS
from ba_solver.nodes.sampling.guider import guider_for
from ba_solver.nodes.sampling.start import Latent
from ba_solver.nodes.sidenet_nodes import ApplySideNet
from ba_solver.nodes.sit_nodes import ClassLabel, LoadSiT
from ba_solver.training.baselines import run_baseline
from comfy_execution.graph_utils import ExecutionBlocker

pytestmark = pytest.mark.comfyui


@pytest.fixture(autouse=True)
def as_in_comfyui(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        model, sidenet = LoadSiT.execute(DEMO).result[0], models.file_sidenet(DEMO)
        return ApplySideNet.execute(model, sidenet=sidenet).result[0]


def found_on(model, names, calls, cfg=2.0, batch=2, reference=40):
    star, null = ClassLabel.execute(model, "demo 4: star").result
    told = []
    guider = guider_for(model, star, null, cfg)
    latent = Latent(torch.zeros(batch, 3, 32, 32))
    return compare(guider, latent, 7, jobs_for(model, names, ["simple"]), calls, reference, told.append), told


def test_calls_are_counted_as_the_model_is_called(demo):
    """In branches that the network evaluates; half calls as half, and two-call samplers get half the steps."""
    evaluated = []
    hook = demo.model.diffusion_model.register_forward_hook(lambda m, inputs, out: evaluated.append(len(inputs[0])))
    try:
        found, told = found_on(demo, ["euler", "heun", "dpm_2", "dpmpp_2m"], [5, 6])
    finally:
        hook.remove()
    made = {(row.sampler, row.asked): row.calls for row in found.rows}
    assert made["euler", 5] == made["dpmpp_2m", 5] == made["BA-Solver", 5] == made["BA-Solver, no SideNet", 5] == 5
    assert made["heun", 5] == made["heun", 6] == 5, "three steps, the last with one call"
    assert made["dpm_2", 5] == 5 and made["euler", 6] == 6
    assert sum(evaluated) == 4 * (40 + 8 + 20 + sum(row.calls for row in found.rows)), "two branches, two pictures"
    assert sum(told) == 68 + sum(row.calls for row in found.rows)


def test_errors_are_those_of_the_core_and_of_stock_sampling(demo):
    found, _ = found_on(demo, ["euler"], [5])
    errors = {row.sampler: row.error for row in found.rows}
    sit, (net, card) = load_sit(SITS.demo), load_sidenet(SIDENETS.demo)
    noise = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(7))
    labels = torch.full((2,), 4)
    field = model_field(sit, labels, torch.full_like(labels, sit.null_class), Guidance(2.0), "combined")
    converged = run_baseline("adams_bashforth4", field, noise, time_grid(120))
    assert (found.reference - converged).square().mean().sqrt() < 0.01 and found.own_error < 0.02

    def distance(x):
        return float((x - found.reference).square().mean().sqrt())

    assert errors["BA-Solver"] == pytest.approx(distance(solve(field, net, noise, card.own_schedules[5])), rel=1e-3)
    assert errors["euler"] == pytest.approx(distance(run_baseline("euler", field, noise, time_grid(5))), rel=0.02)
    assert errors["BA-Solver"] < 0.6 * errors["euler"]


@pytest.mark.parametrize("name", ["ipndm", "deis", "res_multistep", "dpm_2"])
def test_rivals_of_the_core_are_comfyuis(demo, name):
    """So that figures outside ComfyUI are those of its samplers: the same sigmas lead to the same end."""
    star, null = ClassLabel.execute(demo, "demo 4: star").result
    guider, sigmas = guider_for(demo, star, null, 2.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.3, 0.1, 0.0])
    noise, latent = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(7)), torch.zeros(2, 3, 32, 32)
    theirs = guider.sample(noise, latent, comfy.samplers.sampler_object(name), sigmas, disable_pbar=True, seed=7)
    sit, labels = load_sit(SITS.demo), torch.full((2,), 4)
    field = model_field(sit, labels, torch.full_like(labels, sit.null_class), Guidance(2.0), "combined")
    if name == "dpm_2":  # ends by Euler's step
        ours = run_baseline("euler", field, run_baseline(name, field, noise, sigmas[:-1]), sigmas[-2:])
    else:
        ours = run_baseline(name, field, noise, sigmas)
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_node_shows_table_plot_pictures_and_csv(demo):
    star, null = ClassLabel.execute(demo, "demo 4: star").result
    heart, _ = ClassLabel.execute(demo, "demo 6: heart").result

    class Vae:
        def decode(self, latent):
            return ((latent + 1) / 2).clamp(0, 1).movedim(1, -1)

    given = {"model": [demo], "positive": [star, heart], "negative": [null], "vae": [Vae()], "cfg": [2.0], "seed": [7]}
    given |= {"latent_image": [{"samples": torch.zeros(1, 3, 32, 32)}], "model_calls": ["5"], "reference_steps": [40]}
    given |= {"samplers": ["euler, dpmpp_2m"], "schedulers": ["simple, beta"]}
    text, plot, pictures = CompareSolvers.execute(**given).result
    ours, euler = (next(line for line in text.splitlines() if name in line) for name in ("BA-Solver (", "euler ("))
    assert float(ours.split()[0]) < float(euler.split()[0]) and "±" in ours
    assert text.index("BA-Solver (own") < text.index("euler ("), "the nearest first"
    assert plot.shape[0] == 1 and plot.std() > 0.05
    # The converged picture, then as many samplers as the table has, from the nearest to the farthest.
    assert pictures.shape == (1, 192, 5 * 192, 3)
    converged, *others = pictures[0].split(192, dim=1)
    distances = [float((picture - converged).square().mean()) for picture in others]
    assert 0 < distances[0] < distances[-1]
    without = CompareSolvers.execute(**{**given, "vae": [None], "positive": [star]}).result
    assert isinstance(without[2], ExecutionBlocker) and without[2].message is None
    path = Path(text.split("Every sampling: ")[1])
    rows = list(csv.DictReader(path.read_text().splitlines()))
    # Two prompts; two samplers and the multistep method on two schedulers, and BA-Solver.
    assert len(rows) == 2 * (2 * 2 + 2 + 1) and {row["prompt"] for row in rows} == {"0", "1"}
    assert csv_path().name == "compare_00003_.csv", "nothing is overwritten"


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "sdxl"])
def test_all_kinds_of_models_are_compared(name):
    with torch.inference_mode(False):
        model = models.make_model(name)
    guider = guider_for(model, models.text(name, 1), models.text(name, 2), 3.0)
    jobs = jobs_for(model, ["euler", "dpmpp_2m", "uni_pc", "ipndm"], ["simple"])
    found = compare(guider, Latent(torch.zeros(1, *models.TINY[name].latent)), 0, jobs, [4], 40, lambda cost: None)
    assert {row.sampler for row in found.rows} == {"euler", "dpmpp_2m", "uni_pc", "ipndm", "BA-Solver, no SideNet"}
    assert all(row.calls <= 4 and 0 < row.error < 100 for row in found.rows)
    assert found.reference.isfinite().all()


def test_samplers_that_have_no_end_are_left_out_and_said(demo, caplog):
    found, _ = found_on(demo, ["euler", "euler_ancestral", "dpmpp_sde"], [4])
    assert {row.sampler for row in found.rows} == {"euler", "BA-Solver", "BA-Solver, no SideNet"}
    assert "euler_ancestral is left out at 4 calls. It adds noise on its way" in caplog.text


def test_a_sampler_that_fails_is_left_out_and_said(demo, caplog, monkeypatch):
    """As one of another pack did on small states; the others' rows are there."""

    def broken(model, x, sigmas, extra_args=None, callback=None, disable=None):
        model(x, sigmas[0].expand(len(x)), **extra_args)
        raise IndexError("index 2 is out of bounds for dimension 0 with size 2")

    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_broken", broken, raising=False)
    monkeypatch.setattr(comfy.samplers.KSampler, "SAMPLERS", [*comfy.samplers.KSampler.SAMPLERS, "broken"])
    found, _ = found_on(demo, ["broken", "euler"], [4])
    assert {row.sampler for row in found.rows} == {"euler", "BA-Solver", "BA-Solver, no SideNet"}
    assert "broken is left out at 4 calls. index 2 is out of bounds" in caplog.text


def nan_at_the_end(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As samplers of float16 do."""
    return model(x, sigmas[0].expand(len(x)), **extra_args) * (float("nan") if x.shape[-1] > 2 else 1)


def another_shape(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As upscaling samplers do."""
    return model(x, sigmas[0].expand(len(x)), **extra_args).repeat(1, 1, 2, 2)


def needs_more(model, x, sigmas, noise_sampler, extra_args=None, callback=None, disable=None):
    """A sampler with an argument that only its own node gives it."""
    return noise_sampler(sigmas[0], sigmas[1])


def changes_its_inputs(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler's method in place; the noise, the options and the sigmas that it was given are spoilt."""
    extra_args["model_options"]["sampler_cfg_function"] = lambda arguments: arguments["uncond"]
    for now, then in zip(sigmas[:-1].clone(), sigmas[1:].clone(), strict=True):
        x += (then - now) * (x - model(x, now.expand(len(x)), **{**extra_args, "model_options": {}})) / now
    sigmas.zero_()
    end = x.clone()
    x.zero_()
    return end


def samples_the_guider(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A sampler that raises what is no Exception of Python's usual kinds."""
    raise NotImplementedError


STRANGE = {
    "nan_at_the_end": (nan_at_the_end, "NaN or infinity"),
    "another_shape": (another_shape, "another size, (2, 3, 64, 64)"),
    "needs_more": (needs_more, "noise_sampler"),
    "samples_the_guider": (samples_the_guider, "left out"),
    "changes_its_inputs": (changes_its_inputs, None),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_samplers_beside_ours_are_left_out_and_change_nothing(name, demo, caplog, monkeypatch):
    """The others' rows are those of a comparison without it."""
    sampler, said = STRANGE[name]
    monkeypatch.setattr(comfy.k_diffusion.sampling, f"sample_{name}", sampler, raising=False)
    monkeypatch.setattr(comfy.samplers.KSampler, "SAMPLERS", [*comfy.samplers.KSampler.SAMPLERS, name])
    alone = {row.sampler: row for row in found_on(demo, ["euler"], [4])[0].rows}
    beside = {row.sampler: row for row in found_on(demo, [name, "euler"], [4])[0].rows}
    if said is None:
        torch.testing.assert_close(beside.pop(name).end, alone["euler"].end, rtol=1e-4, atol=1e-4)
    else:
        assert f"{name} is left out at 4 calls" in caplog.text and said in caplog.text
    assert beside.keys() == alone.keys()
    for sampler, row in alone.items():
        torch.testing.assert_close(beside[sampler].end, row.end)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), TypeError("'NoneType'"), KeyError("vae")]
)
def test_a_picture_that_cannot_be_shown_loses_no_table(error, demo, caplog):
    found, _ = found_on(demo, ["euler"], [4])

    class Broken:
        def decode(self, latent):
            raise error

    assert isinstance(pictures_or_none([found], Broken()), ExecutionBlocker)
    assert "the pictures cannot be shown" in caplog.text and "euler" in table([found])


def test_a_file_that_cannot_be_written_loses_no_table(demo, caplog, monkeypatch):
    found, _ = found_on(demo, ["euler"], [4])

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compare_nodes, "write_csv", full)
    assert "No space left on device" in compare_nodes.written([found]) and "cannot be written" in caplog.text


def test_interruption_leaves_the_next_run_clean(demo, monkeypatch):
    seen = []

    def stop():
        seen.append(1)
        if len(seen) == 50:
            raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            found_on(demo, ["euler"], [5])
    assert found_on(demo, ["euler"], [5])[0].rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samplers": ["euler, eulr"]}, "ComfyUI has no sampler 'eulr'. It has: euler"),
        ({"schedulers": ["smple"]}, "ComfyUI has no scheduler 'smple'"),
        ({"samplers": ["ba_solver"]}, "BA-Solver is always compared"),
        ({"model_calls": ["5; 7"]}, "model_calls must be whole numbers"),
        ({"negative": [None]}, "A CFG of 2 needs a negative conditioning"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(changes, said, demo):
    star, null = ClassLabel.execute(demo, "demo 4: star").result
    given = {"model": [demo], "positive": [star], "negative": [null], "cfg": [2.0], "seed": [0]}
    given |= {"latent_image": [{"samples": torch.zeros(1, 3, 32, 32)}], "samplers": ["euler"], "schedulers": ["simple"]}
    given |= {"model_calls": ["5"]}
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        CompareSolvers.execute(**{**given, **changes})


class Clip:
    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.zeros(1), {"text": tokens}]]


def test_prompt_lines_become_conditionings(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    (tmp_path / "prompts.txt").write_bytes("\ufeffa fox\r\n\r\nein Bär \r\n".encode())
    encoded, lines = PromptLines.execute(Clip(), " a cat\n\n", "prompts.txt").result
    assert lines == ["a cat", "a fox", "ein Bär"]
    assert [conditioning[0][1]["text"] for conditioning in encoded] == lines
    before = PromptLines.fingerprint_inputs(Clip(), "x", "prompts.txt")
    (tmp_path / "prompts.txt").write_text("another")
    assert PromptLines.fingerprint_inputs(Clip(), "x", "prompts.txt") != before
    (tmp_path.parent / "secret.txt").write_text("no")
    missing = "There is no file"
    for text, file, said in (
        ("", "", "There is no prompt"),
        ("x", "../secret.txt", missing),
        ("x", "gone.txt", missing),
    ):
        with pytest.raises(ValueError, match=said):
            PromptLines.execute(Clip(), text, file)
