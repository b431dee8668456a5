"""SideNets for parts of the path, in real ComfyUI: made by Make SideNet, and sampled by KSampler (Advanced)."""

import logging
from pathlib import Path

import comfyui
import pytest
import torch

comfyui.require()

import comfy.sample
import comfy.samplers
import comfy_models as models
import folder_paths
from ba_solver.bas_core import CheckpointError, Schedule, SideNetCard
from ba_solver.nodes.comparing.compare import jobs_for
from ba_solver.nodes.edit_nodes import BAEdit
from ba_solver.nodes.folders import DEMO
from ba_solver.nodes.make_nodes import MakeSideNet
from ba_solver.nodes.sampling_nodes import BAScheduler
from ba_solver.nodes.sidenet_nodes import ApplySideNet
from ba_solver.nodes.sit_nodes import ClassLabel, LoadSiT
from ba_solver.training.presets import PRESETS
from ba_solver.training.recording import record as recording
from ba_solver.training.recording.reference_solver import batch_generator
from ba_solver.training.recording.trajectories import open_trajectories
from ba_solver.training.schedules import end_fit

import nodes

pytestmark = pytest.mark.comfyui


@pytest.fixture(autouse=True)
def as_in_comfyui(tmp_path_factory, monkeypatch):
    """Nodes run in inference mode; and fits that take a minute do half of it."""
    monkeypatch.setattr(end_fit, "ITERATIONS", 4)
    monkeypatch.setitem(PRESETS, "quick", {**PRESETS["quick"], "rounds": (2,)})
    output = tmp_path_factory.getbasetemp() / "output"
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(output))
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return LoadSiT.execute(DEMO).result[0]


def made(model, prompts, latent, **changes):
    """The SideNet that the node makes."""
    given = {"steps": "4", "preset": "quick", "batch_size": 8, **changes}
    one = {name: [value] for name, value in given.items()}
    positive, negative = prompts
    return MakeSideNet.execute(
        model=[model], positive=[positive], negative=[negative], latent_image=[{"samples": latent}], **one
    ).result[0]


def made_on_demo(demo, **changes):
    prompts = ClassLabel.execute(demo, "all classes, one a picture").result
    return made(demo, prompts, torch.zeros(1, 3, 32, 32), cfg=2.0, **changes)


def ksampler_advanced(model, prompts, latent, steps, first, last, sampler="ba_solver"):
    """A part of a sampling, from noise if it is the first one."""
    begins = first == 0
    return nodes.KSamplerAdvanced().sample(
        model, "enable" if begins else "disable", 9, steps, 2.0, sampler, "simple", *prompts, latent, first, last,
        "disable" if last >= steps else "enable",
    )[0]  # fmt: skip


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [text for text in caplog.messages if "model calls, CFG" in text]


# --- made for parts, and sampled ------------------------------------------------------------------------------------


def test_two_parts_have_a_sidenet_each(demo, logged, caplog):
    """Three steps of five and the other two, in KSampler (Advanced): much nearer than without SideNets."""
    high = made_on_demo(demo, output_name="high", steps="3", end_percent=0.6)
    low = made_on_demo(demo, output_name="low", steps="2", start_percent=0.6, earlier_model=demo)
    assert (high.card.part, low.card.part) == ((1.0, pytest.approx(0.4)), (pytest.approx(0.4), 0.0))
    labels = [[torch.zeros(1, 1, 1), {"class_label": torch.arange(10)}]]
    null = ClassLabel.execute(demo, "demo 0: disc").result[1]
    prompts, latent = (labels, null), {"samples": torch.zeros(10, 3, 32, 32)}
    exact = ksampler_advanced(demo, prompts, latent, 80, 0, 80, "dpmpp_2m")["samples"]

    def error(first, second):
        middle = ksampler_advanced(first, prompts, latent, 5, 0, 3)
        end = ksampler_advanced(second, prompts, middle, 5, 3, 5)
        return float((end["samples"] - exact).square().flatten(1).mean(1).sqrt().mean())

    caplog.clear()
    ours = error(*(ApplySideNet.execute(demo, sidenet=each).result[0] for each in (high, low)))
    lines = logged()
    assert [line.split("BA-solver: ")[1].split(" model")[0] for line in lines] == ["3", "2"], lines
    assert "over from flow time 1 to 0.4" in lines[0] and "over from flow time 0.4 to 0" in lines[1]
    assert ours < 0.75 * error(demo, demo)


def tiny_prompts(name):
    return models.text(name, 1), models.text(name, 2)


def light(model, name, **changes):
    """A SideNet of a tiny model, fitted in a second."""
    more = {"trajectories": 5, "steps_per_trajectory": 9, "cfg": 3.0, **changes}
    return made(model, tiny_prompts(name), torch.zeros(1, *models.TINY[name].latent), **more)


@pytest.fixture(scope="module")
def model():
    kept = {}

    def get(name, seed=0):
        if (name, seed) not in kept:
            with torch.inference_mode(False):
                kept[name, seed] = models.make_model(name, seed)
        return kept[name, seed]

    return get


def recordings(name):
    return Path(folder_paths.get_output_directory()) / "sidenets" / f"{name}.trajectories"


def noise_of_starts(latent, count):
    """The noise that the samplings begin at which lead to a later part of the path."""
    generator = batch_generator(1 + recording.START_SEEDS, 0)
    torch.rand((), generator=generator)  # the CFG scale, from a range
    return torch.randn((count, *latent), generator=generator)


@pytest.mark.parametrize("earlier", [None, 1])
def test_a_later_part_starts_where_the_model_or_the_earlier_one_comes_to(earlier, model):
    """The states at the beginning of its trajectories are ends of samplings from noise, by ComfyUI's own sampler."""
    name, low = f"later_{earlier}", model("sd3")
    more = {} if earlier is None else {"earlier_model": model("sd3", earlier)}
    sidenet = light(low, "sd3", output_name=name, start_percent=0.5, **more)
    sigma = float(low.get_model_object("model_sampling").percent_to_sigma(0.5))
    assert sidenet.card.part == (pytest.approx(sigma), 0.0)
    starts = open_trajectories((recordings(name) / "starts",))[0]
    whole = open_trajectories((recordings(name),))[0]
    rows = torch.arange(5)
    assert len(starts) == 1 + 5 and whole.times[:, 0].tolist() == pytest.approx([sigma] * 5)
    torch.testing.assert_close(whole.states[rows, 0 * rows], starts.states[1 + rows, 0 * rows])
    noise = noise_of_starts(models.TINY["sd3"].latent, 6)
    reached = starts.states[torch.arange(6), torch.zeros(6).long()]

    def distance(seed):
        """From the ends of one model's samplings."""
        network, sampler = model("sd3", seed), comfy.samplers.sampler_object("dpmpp_2m")
        sigmas, prompts = torch.linspace(1, sigma, 100), tiny_prompts("sd3")
        out = comfy.sample.sample_custom(
            network, noise, 3.0, sampler, sigmas, *prompts, torch.zeros_like(noise), disable_pbar=True
        )
        ends = network.model.process_latent_in(out) * (1 - sigma)  # ComfyUI takes the rest of the noise's scale out
        return float((reached - ends).square().mean().sqrt())

    first, other = (0, 1) if earlier is None else (1, 0)
    assert distance(first) < 0.15 * distance(other)


# --- where a sampling leaves the part, or lies within it ------------------------------------------------------------


def sidenet_for(part, path, name="sd3"):
    grid = [1.0, 0.9, 0.5, 0.0]
    rows = [[0.1] * (2 + row // 2 + 2 * (row % 2)) for row in range(5)]
    card = SideNetCard(schedules={3.0: {3: Schedule(grid, rows)}}, part=part)
    return models.make_sidenet(path, models.TINY[name].latent[0], card, anchors=2)


@pytest.mark.parametrize(
    ("part", "sigmas", "expected", "text"),
    [
        ((1.0, 0.4), [1.0, 0.8, 0.6, 0.4], [1.0, 0.94, 0.7], "over from flow time 1 to 0.4"),
        ((1.0, 0.4), [1.0, 0.8, 0.6, 0.43], [1.0, 0.943, 0.715], "over from flow time 1 to 0.4"),
        ((0.4, 0.0), [0.43, 0.3, 0.1, 0.0], [0.43, 0.387, 0.215], "over from flow time 0.4 to 0"),
        ((0.4, 0.0), [0.2, 0.1, 0.0], [0.2, 0.1], "on its share of the fitted times"),
        ((1.0, 0.4), [1.0, 0.7, 0.2, 0.0], [1.0, 0.7, 0.2], "the multistep method, without a SideNet"),
        ((0.4, 0.0), [1.0, 0.7, 0.2, 0.0], [1.0, 0.7, 0.2], "the multistep method, without a SideNet"),
        ((0.8, 0.4), [0.7, 0.6], [0.7], "on its share of the fitted times"),
    ],
)
def test_a_sidenet_serves_its_part_alone(part, sigmas, expected, text, model, tmp_path, logged, caplog):
    applied, times = models.with_sidenet(model("sd3"), sidenet_for(part, tmp_path / "part.safetensors")), []
    applied.set_model_sampler_post_cfg_function(lambda a: times.append(float(a["sigma"][0])) or a["denoised"])
    z = models.noise("sd3")
    sampler = comfy.samplers.sampler_object("ba_solver")
    comfy.sample.sample_custom(
        applied, z, 3.0, sampler, torch.tensor(sigmas), *tiny_prompts("sd3"), torch.zeros_like(z), disable_pbar=True
    )
    assert times == pytest.approx(expected, abs=1e-3)
    assert text in logged()[0]
    assert ("It is not used from" in caplog.text) == ("multistep" in text)


def test_work_on_the_whole_path_refuses_a_sidenet_for_a_part(model, tmp_path):
    """Editing and comparing; BA-Solver Scheduler takes the model's own sigmas."""
    applied = models.with_sidenet(model("sd3"), sidenet_for((1.0, 0.4), tmp_path / "part.safetensors"))
    positive, negative = tiny_prompts("sd3")
    latent = {"samples": models.noise("sd3")}
    with pytest.raises(CheckpointError, match=r"'part\.safetensors' was made for a part of the path"):
        BAEdit.execute(applied, latent, positive, positive, 4, negative)
    with pytest.raises(CheckpointError, match="made for a part of the path"):
        jobs_for(applied, ["euler"], ["simple"])
    plain = BAScheduler.execute(model("sd3"), 5).result[0]
    assert torch.equal(BAScheduler.execute(applied, 5).result[0], plain)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_ranges_that_are_none_and_files_for_other_parts_are_refused_in_words(model):
    low = model("sd3")
    with pytest.raises(ValueError, match=r"start_percent must be below end_percent; got 0.6 and 0.6"):
        light(low, "sd3", output_name="none", start_percent=0.6, end_percent=0.6)
    with pytest.raises(ValueError, match="earlier_model is for a start_percent above 0"):
        light(low, "sd3", output_name="none", earlier_model=low)
    light(low, "sd3", output_name="tiny_high", end_percent=0.5)
    with pytest.raises(ValueError, match="made for another part of the path"):
        light(low, "sd3", output_name="tiny_high", end_percent=0.4)
    light(low, "sd3", output_name="tiny_low", start_percent=0.5)
    with pytest.raises(ValueError, match="made for another earlier_model"):
        light(low, "sd3", output_name="tiny_low", start_percent=0.5, earlier_model=model("sd3", 1))
    # The same again is what is there.
    assert light(low, "sd3", output_name="tiny_low", start_percent=0.5).card.part[1] == 0
