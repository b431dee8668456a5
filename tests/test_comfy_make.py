"""Make SideNet in real ComfyUI: both presets, what is on a MODEL, interruption, and what it leaves behind."""

import errno
from pathlib import Path

import comfyui
import pytest
import torch

comfyui.require()

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy_models as models
import folder_paths
from ba_solver.bas_core import Guidance, load_sidenet, load_sit, model_field, solve
from ba_solver.nodes.folders import DEMO, SIDENETS, SITS
from ba_solver.nodes.make_nodes import MakeSideNet
from ba_solver.nodes.making.make import check_name
from ba_solver.nodes.making.prompts import digest_of, each_alone
from ba_solver.nodes.models import compatibility
from ba_solver.nodes.models.compatibility import facts_of
from ba_solver.nodes.models.identity import identity_of
from ba_solver.nodes.models.labels import conditioning_of
from ba_solver.nodes.sidenet_nodes import ApplySideNet
from ba_solver.nodes.sit_nodes import ClassLabel, LoadSiT
from ba_solver.training.make import MakeSettings, run_make
from ba_solver.training.network import stages
from ba_solver.training.presets import PRESETS, preset_values
from ba_solver.training.recording import record as recording
from ba_solver.training.recording.trajectories import open_trajectories
from ba_solver.training.schedules import end_fit, solvers

pytestmark = pytest.mark.comfyui

STEPS = "4"


@pytest.fixture(autouse=True)
def as_in_comfyui(tmp_path, monkeypatch):
    """Nodes run in inference mode; and what takes minutes is asked for less."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    for module, name, fewer in (
        (end_fit, "ITERATIONS", 2),
        (stages, "VALIDATION_BATCHES", 1),
        (stages, "VALIDATION_BATCH", 16),
        (solvers, "SEARCH_SHIFTS", (1.0, 2.0)),
        (solvers, "SEARCH_COSINES", (0.15,)),
        (solvers, "SEARCH_HALVINGS", 1),
    ):
        monkeypatch.setattr(module, name, fewer)
    monkeypatch.setitem(PRESETS, "quick", {**PRESETS["quick"], "rounds": (2,)})
    monkeypatch.setitem(PRESETS, "full", {**PRESETS["full"], "prefixes": 4, "batch": 8, "rounds": (2,)})
    with torch.inference_mode():
        yield


def made(model, positive, latent, **changes):
    """The node's outputs."""
    given = {"cfg": 1.0, "steps": STEPS, "preset": "quick", "output_name": "mine", "batch_size": 3}
    given |= {"trajectories": 6, "steps_per_trajectory": 9}
    given |= {"training_steps": 2, "learning_rate": 1e-3, "recording_seed": 1, **changes}
    one = {name: [value] for name, value in given.items()}
    latent = latent if isinstance(latent, dict) else {"samples": latent}
    return MakeSideNet.execute(model=[model], positive=positive, latent_image=[latent], **one).result


def sidenet_file(name="mine"):
    return Path(folder_paths.get_output_directory()) / "sidenets" / f"{name}.safetensors"


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return LoadSiT.execute(DEMO).result[0]


def classes(demo):
    """Every class of the demo, one a picture, and none."""
    return ClassLabel.execute(demo, "all classes, one a picture").result


def made_on_demo(demo, **changes):
    positive, null = classes(demo)
    return made(demo, [positive], torch.zeros(1, 3, 32, 32), negative=null, cfg=2.0, **changes)


def sampled(model, latent, positive, negative, sigmas, cfg, name="euler", seed=3):
    noise = comfy.sample.prepare_noise(latent, seed)
    sampler = comfy.samplers.sampler_object(name)
    return comfy.sample.sample_custom(model, noise, cfg, sampler, sigmas, positive, negative, latent, disable_pbar=True)


# --- the demo --------------------------------------------------------------------------------------------------------


def test_it_makes_what_the_command_line_makes(demo, tmp_path):
    """The same recording, times and weights: one way to them, whether ComfyUI or the trainer calls the model."""
    sidenet, report, text = made_on_demo(demo)
    settings = MakeSettings(
        **{**preset_values("quick", STEPS), "trajectories": 6, "points": 9, "record_batch": 3},
        preset="quick", nfe=STEPS, backbone=f"sit:{SITS.demo}", guidance=(2.0,), out=tmp_path / "x.safetensors",
    )  # fmt: skip
    with torch.inference_mode(False):
        run_make(settings)
    ours, theirs = load_sidenet(sidenet_file())[1], load_sidenet(settings.out)[1]
    assert ours.backbone["fingerprint"] == theirs.backbone["fingerprint"]
    assert ours.training["backbone_calls"] == theirs.training["backbone_calls"]
    assert ours.own_schedules[4].times == pytest.approx(theirs.own_schedules[4].times, abs=1e-4)
    errors = [[row["error"] for row in card.evaluation["endpoint_error"]] for card in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    assert report.shape[0] == 1 and report.max() == 1 and "no network" in text and "BA-solver error" in text
    assert sidenet.card.own_schedules == ours.own_schedules


def test_its_sidenet_samples_nearer_than_multistep(demo):
    """With more runs than the other tests ask for, on noises that it has not seen."""
    sidenet = made_on_demo(demo, trajectories=14, steps_per_trajectory=20, steps="5")[0]
    positive, null = classes(demo)
    model, latent = ApplySideNet.execute(demo, sidenet=sidenet).result[0], torch.zeros(10, 3, 32, 32)
    from ba_solver.nodes.sampling_nodes import BAScheduler

    exact = sampled(demo, latent, positive, null, torch.linspace(1, 0, 101), 2.0, "heun")
    grid = BAScheduler.execute(model, 5, 1.0).result[0]
    ours = sampled(model, latent, positive, null, grid, 2.0, "ba_solver")
    multistep = sampled(demo, latent, positive, null, torch.linspace(1, 0, 6), 2.0, "ipndm")
    ours, multistep = ((x - exact).square().mean().sqrt() for x in (ours, multistep))
    assert ours < 0.7 * multistep


def test_runs_for_another_cfg_are_made_and_taken(demo):
    """The scheduler knows no CFG: its sigmas are those of the SideNet's own, and the sampler takes the nearer run."""
    from ba_solver.nodes.sampling_nodes import BAScheduler

    sidenet = made_on_demo(demo, extra_cfg="6")[0]
    assert 6.0 in sidenet.card.schedules
    positive, null = classes(demo)
    model = ApplySideNet.execute(demo, sidenet=sidenet).result[0]
    grid = BAScheduler.execute(model, 4, 1.0).result[0]
    latent = torch.zeros(10, 3, 32, 32)
    noise = comfy.sample.prepare_noise(latent, 3)
    sampler = comfy.samplers.sampler_object("ba_solver")
    own, more = sidenet.card.own_schedules[4], sidenet.card.schedules[6.0][4]
    for cfg, run, other in ((2.0, own, more), (5.0, more, own)):
        drawn = comfy.sample.sample_custom(model, noise, cfg, sampler, grid, positive, null, latent, disable_pbar=True)
        network, card = load_sidenet(sidenet_file())
        sit = load_sit(SITS.demo)
        null_class = torch.full((10,), sit.null_class)
        field = model_field(sit, torch.arange(10), null_class, Guidance(cfg), mode="combined")
        near, far = ((drawn - solve(field, network, noise, one)).square().mean().sqrt() for one in (run, other))
        assert near < 1e-3 < 0.01 < far
        assert card.schedules_for(cfg)[4] == run


def test_a_cfg_that_was_forgotten_is_added_by_the_same_name(demo):
    first = made_on_demo(demo)[0]
    with pytest.raises(ValueError, match="made with other settings"):
        made_on_demo(demo, trajectories=7)
    assert 6.0 not in first.card.schedules
    more = made_on_demo(demo, extra_cfg="6")[0]
    assert more.card.own_schedules == first.card.own_schedules and 6.0 in more.card.schedules
    with pytest.raises(ValueError, match="extra_cfg must be numbers"):
        made_on_demo(demo, extra_cfg="six")


def test_recordings_are_not_listed_as_sidenets(demo, monkeypatch):
    made_on_demo(demo, extra_cfg="4")
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "sidenets", ([str(sidenet_file().parent)], {".safetensors"})
    )
    folder_paths.filename_list_cache.clear()
    assert SIDENETS.names() == [DEMO, "mine.safetensors"]
    assert models.file_sidenet("mine.safetensors").card.schedules


# --- every kind of model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("name", [*models.NAMES, "one frame"])
def test_every_kind_of_model_gets_a_sidenet(name, preset):
    """Two prompts, guided as that kind is; then it samples with what it got."""
    kind = "wan" if name == "one frame" else name
    shape = (16, 1, 8, 8) if name == "one frame" else models.TINY[kind].latent
    model, cfg = models.make_model(kind), 1.0 if kind in ("flux", "wan") else 3.0
    positives = [models.text(kind, seed) for seed in (0, 1)]
    for positive in positives if kind == "flux" else ():
        positive[0][1]["guidance"] = 2.5
    negative = models.text(kind, 2)
    sidenet, report, _ = made(model, positives, torch.zeros(1, *shape), negative=negative, cfg=cfg, preset=preset)
    assert sidenet.card.cfg_range == ((2.5, 2.5) if kind == "flux" else (cfg, cfg))
    assert sidenet.card.backbone["kind"] == type(model.model).__name__.lower()
    assert bool(sidenet.network.output_conv.weight.any()) == (preset != "quick")
    assert len(report) == (1 if preset == "quick" else 2), "errors, and the training where there was one"
    applied = ApplySideNet.execute(model, sidenet=sidenet).result[0]
    assert not compatibility.warnings(sidenet, facts_of(model))
    from ba_solver.nodes.sampling_nodes import BAScheduler

    grid = BAScheduler.execute(applied, 4, 1.0).result[0]
    end = sampled(applied, torch.zeros(2, *shape), positives[0], negative, grid, cfg, "ba_solver")
    assert end.shape == (2, *shape) and end.isfinite().all()


# --- what rides on the MODEL and on the conditioning -----------------------------------------------------------------


def with_lora(model, strength=1.0):
    clone = model.clone()
    generator = torch.Generator().manual_seed(9)
    patches = {
        key: ("diff", (0.2 * torch.randn(value.shape, generator=generator),))
        for key, value in model.model.state_dict().items()
        if key.endswith("weight") and value.ndim == 2
    }
    clone.add_patches(patches, strength)
    return clone


def with_shift(model):
    clone = model.clone()
    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow(model.model.model_config)
    sampling.set_parameters(shift=5.0)

    class Shifted(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    shifted = Shifted(model.model.model_config)
    shifted.set_parameters(shift=5.0)
    clone.add_object_patch("model_sampling", shifted)
    return clone


def with_patch(model):
    clone = model.clone()
    clone.set_model_unet_function_wrapper(lambda apply, a: 0.9 * apply(a["input"], a["timestep"], **a["c"]))
    return clone


def with_rescaled_cfg(model):
    clone = model.clone()
    clone.set_model_sampler_cfg_function(lambda a: a["uncond"] + 0.5 * a["cond_scale"] * (a["cond"] - a["uncond"]))
    return clone


def with_area(positive):
    area = {"area": (4, 4, 0, 0), "strength": 1.0, "set_area_to_bounds": False}
    return [[text, {**more, **area}] for text, more in positive]


RIDERS = {
    "nothing": lambda m, p: (m, p),
    "LoRA": lambda m, p: (with_lora(m), p),
    "shift": lambda m, p: (with_shift(m), p),
    "wrapper": lambda m, p: (with_patch(m), p),
    "rescaled CFG": lambda m, p: (with_rescaled_cfg(m), p),
    "areas in one prompt": lambda m, p: (m, [p[0], with_area(p[1]) + p[0]]),
}


@pytest.mark.parametrize("rider", list(RIDERS))
def test_what_is_recorded_is_what_comfyui_samples_by(rider, demo):
    """The first velocity of each run is that of a step of ComfyUI's own Euler with that prompt alone."""
    plain = models.make_model("sd3")
    model, positives = RIDERS[rider](plain, [models.text("sd3", seed) for seed in (0, 1)])
    negative = models.text("sd3", 2)
    made(model, positives, torch.zeros(1, 16, 8, 8), negative=negative, cfg=3.0, batch_size=6)
    trajectories, about = open_trajectories((sidenet_file().with_suffix(".trajectories"),))
    assert (about["shift"] == pytest.approx(5.0)) == (rider == "shift")
    others = []
    for run in range(4):
        noise, velocity = trajectories.states[run][0], trajectories.velocities[run][0]
        positive = positives[int(trajectories.labels[run])]
        sigmas, sampler = torch.tensor([1.0, 0.75]), comfy.samplers.sampler_object("euler")
        end = comfy.sample.sample_custom(
            model, noise[None], 3.0, sampler, sigmas, positive, negative, torch.zeros(1, 16, 8, 8), disable_pbar=True
        )
        # ComfyUI takes what it returns for an image, and divides by one minus sigma.
        expected = (noise - 0.25 * model.model.process_latent_in(end)[0]) / 0.25
        torch.testing.assert_close(velocity, expected, atol=5e-3, rtol=2e-3)
        others.append((velocity - noise).std())
    assert min(others) > 0.1


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_compiled_model_makes_what_the_model_makes(preset):
    """`torch.compile` as ComfyUI's node lays it on a MODEL."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled, graphs = models.make_model("sd3"), []
    set_torch_compile_wrapper(compiled, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    texts = [models.text("sd3", seed) for seed in (0, 1)]
    cards = []
    for name, model in (("plain", models.make_model("sd3")), ("compiled", compiled)):
        given = {"negative": models.text("sd3", 2), "cfg": 3.0, "preset": preset, "output_name": name}
        cards.append(made(model, texts, torch.zeros(1, 16, 8, 8), **given)[0].card)
        assert bool(graphs) == (name == "compiled")
    plain, compiled = (card.own_schedules[4] for card in cards)
    assert compiled.times == pytest.approx(plain.times, abs=1e-3)
    torch.testing.assert_close(
        torch.tensor(sum(compiled.coefficients, ())), torch.tensor(sum(plain.coefficients, ())), atol=0.02, rtol=0.02
    )


def as_fp8(network):
    """Weights that ComfyUI's own layers cast at each call."""
    for parameter in network.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    for module in network.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True


class Packed(torch.nn.Module):
    """A loader's own layer, as GGUF packs have them: whole numbers and a scale, unpacked at each call."""

    def __init__(self, layer):
        super().__init__()
        self.scale = float(layer.weight.abs().max() / 127)
        self.register_buffer("weight", (layer.weight / self.scale).round().to(torch.int8))
        self.bias = layer.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def as_packed(network):
    found = [(module, name, layer) for module in network.modules() for name, layer in module.named_children()]
    for module, name, layer in found:
        if isinstance(layer, torch.nn.Linear):
            setattr(module, name, Packed(layer))


@pytest.mark.parametrize("change", [as_fp8, as_packed])
def test_weights_of_few_bits(change):
    """All that sampling does with them, recording does."""
    model = models.make_model("sd3")
    change(model.model.diffusion_model)
    before = {name: value.dtype for name, value in model.model.state_dict().items()}
    assert made(model, [models.text("sd3", 0)], torch.zeros(1, 16, 8, 8))[0].card.schedules
    assert {name: value.dtype for name, value in model.model.state_dict().items()} == before


# --- interruption, and everything that goes wrong --------------------------------------------------------------------


def test_full_memory_is_said_in_a_sentence(demo):
    full = demo.clone()

    def refuse(apply, a):
        raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory")

    full.set_model_unet_function_wrapper(refuse)
    with pytest.raises(ValueError, match=r"not enough memory .* Lower batch_size\. Recordings are kept"):
        made_on_demo(full)


def test_recordings_can_lie_elsewhere(demo, tmp_path):
    made_on_demo(demo, cache_dir=str(tmp_path / "elsewhere"))
    assert len(list((tmp_path / "elsewhere" / "mine").glob("*.safetensors"))) == 2
    assert not sidenet_file().with_suffix(".trajectories").exists()
    (tmp_path / "output" / "taken").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="taken"):
        made_on_demo(demo, output_name="other", cache_dir=str(tmp_path / "output" / "taken"))


def test_a_controlnet_of_one_prompt_acts_on_that_prompt_alone():
    from test_comfy_sampling import ControlStub

    model, negative, latent = models.make_model("sdxl"), models.text("sdxl", 2), torch.zeros(1, 4, 8, 8)
    plain, other = models.text("sdxl", 0), models.text("sdxl", 1)
    controlled = [[c, {**d, "control": ControlStub(), "control_apply_to_uncond": True}] for c, d in other]
    found = {}
    for name, positives in (("with", [plain, controlled]), ("without", [plain, other])):
        made(model, positives, latent, negative=negative, cfg=3.0, output_name=name)
        trajectories = open_trajectories((sidenet_file(name).with_suffix(".trajectories"),))[0]
        found[name] = [trajectories.velocities[run][0] for run in range(6)]
        assert trajectories.labels.tolist() == [0, 1] * 3
    apart = [(one - two).abs().max() for one, two in zip(found["with"], found["without"], strict=True)]
    assert max(apart[::2]) < 1e-4 and min(apart[1::2]) > 0.01


def interrupt_after(monkeypatch, calls):
    """ComfyUI's Cancel at a model call."""
    made_calls, intact = [], comfy.model_management.throw_exception_if_processing_interrupted

    def throw():
        made_calls.append(1)
        if len(made_calls) == calls:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", throw)
    return lambda: monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", intact)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_cancelled_and_resumed_it_makes_the_same_sidenet(demo, preset, monkeypatch):
    whole = made_on_demo(demo, preset=preset, output_name="whole")[0]
    points = (15, 40, 70) if preset == "quick" else (40, 110, 150)
    for calls in points:
        undo = interrupt_after(monkeypatch, calls)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            made_on_demo(demo, preset=preset)
        undo()
    again = made_on_demo(demo, preset=preset)[0]
    # The same noises, in the same order; states to rounding.
    recorded = [open_trajectories((sidenet_file(name).with_suffix(".trajectories"),))[0] for name in ("whole", "mine")]
    assert torch.equal(*(trajectories.labels for trajectories in recorded))
    paths = [torch.stack([trajectories.states[row] for row in range(6)]) for trajectories in recorded]
    assert torch.equal(*(path[:, 0] for path in paths))
    torch.testing.assert_close(*(path[:, -1] for path in paths), atol=1e-5, rtol=1e-5)
    one, other = again.card.own_schedules[4], whole.card.own_schedules[4]
    assert one.times == pytest.approx(other.times, abs=1e-4)
    for rows, others in ((one.coefficients, other.coefficients), (one.cfg_coefficients, other.cfg_coefficients)):
        assert [len(row) for row in rows] == [len(row) for row in others]
        torch.testing.assert_close(torch.tensor(sum(rows, ())), torch.tensor(sum(others, ())), atol=1e-3, rtol=1e-3)
    for one, other in zip(again.network.state_dict().values(), whole.network.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    # A second time in one session: it is there already.
    monkeypatch.setattr(recording, "recorded", None)
    assert made_on_demo(demo, preset=preset)[0].card.own_schedules == again.card.own_schedules


def test_a_sidenet_of_this_name_made_for_something_else_is_not_taken(demo):
    """Another model, other prompts or another size: refused, naming what differs; nothing is lost."""
    sd3, other = models.make_model("sd3"), models.make_model("sd3", seed=1)
    texts, latent = [models.text("sd3", seed) for seed in (1, 2)], torch.zeros(1, *models.TINY["sd3"].latent)
    made(sd3, texts, latent)
    before = sidenet_file().read_bytes()
    wider = torch.zeros(*latent.shape[:-1], 2 * latent.shape[-1])
    for model, prompts, size, message in (
        (other, texts, latent, "made for another model"),
        (sd3, texts[::-1], latent, "made for other prompts"),
        (sd3, texts, wider, "made for another size"),
    ):
        with pytest.raises(ValueError, match=message):
            made(model, prompts, size)
    assert sidenet_file().read_bytes() == before
    assert made(sd3, texts, latent)[0].card.own_schedules


def test_what_cannot_be_done_is_said_in_a_sentence(demo, monkeypatch):
    positive, null = classes(demo)
    latent = torch.zeros(1, 3, 32, 32)
    for changes, words in (
        ({"output_name": "../mine"}, "without folders"),
        ({"output_name": " "}, "the name of a file"),
        ({"steps": "five"}, "whole numbers"),
        ({"steps_per_trajectory": 3}, "points must be at least 8"),
        ({"negative": None}, "needs a negative"),
    ):
        given = {"negative": null, "cfg": 2.0, **changes}
        given = {name: value for name, value in given.items() if value is not None}
        with pytest.raises(ValueError, match=words):
            made(demo, [positive], latent, **given)
    made_on_demo(demo)
    with pytest.raises(ValueError, match=r"already, made with other settings .nfe was '4', now '5'"):
        made_on_demo(demo, steps="5")

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(recording, "save_shard", full)
        with pytest.raises(ValueError, match=r"No space left on device: somewhere. Make room .*Recordings are kept"):
            made_on_demo(demo, output_name="other")
    assert made_on_demo(demo, output_name="other")[0].card.schedules
    assert check_name("a.safetensors") == "a"


def test_a_model_that_returns_nan_says_so_and_leaves_nothing_broken(demo):
    broken = demo.clone()
    broken.set_model_unet_function_wrapper(lambda apply, a: apply(a["input"], a["timestep"], **a["c"]) / 0)
    with pytest.raises(ValueError, match=r"NaN or infinity.*Recordings are kept"):
        made_on_demo(broken)
    assert not sidenet_file().exists()


def test_the_model_is_left_as_it_was(demo):
    """Weights are the same objects, and ComfyUI's inference mode is back."""
    network = demo.model.diffusion_model
    before = {name: (id(value), value.requires_grad) for name, value in network.named_parameters()}
    made_on_demo(demo, preset="full")
    assert {name: (id(value), value.requires_grad) for name, value in network.named_parameters()} == before
    assert all(value.grad is None for value in network.parameters()) and torch.is_inference_mode_enabled()


def test_models_are_known_by_their_weights():
    """This very model, a relative, another."""
    model = models.make_model("sd3")
    sidenet = made(model, [models.text("sd3", 0)], torch.zeros(1, 16, 8, 8))[0]
    assert (
        compatibility.warnings(sidenet, facts_of(model))
        == compatibility.warnings(sidenet, facts_of(models.make_model("sd3")))
        == []
    )
    (lora,) = compatibility.warnings(sidenet, facts_of(with_lora(model)))
    assert "this very model, but with other things on it" in lora
    (other,) = compatibility.warnings(sidenet, facts_of(models.make_model("sd3", seed=1)))
    assert "has other weights" in other
    assert any(
        "was made for SD3" in reason for reason in compatibility.errors(sidenet, facts_of(models.make_model("flux")))
    )
    assert identity_of(with_lora(model)) == identity_of(with_lora(model)) != identity_of(with_lora(model, 0.5))


def test_prompts_are_told_apart():
    first, second = models.text("sd3", 0), models.text("sd3", 1)
    assert digest_of([first]) == digest_of([models.text("sd3", 0)]) != digest_of([second])
    assert digest_of([first, second]) != digest_of([second, first])
    labels = each_alone([conditioning_of(torch.tensor([3, 5])), first])
    assert len(labels) == 3 and labels[1][0][1]["class_label"].tolist() == [5]
