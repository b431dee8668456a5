"""BA Invert and BA Edit in ComfyUI: they compute what the core computes, and the return is exact."""

import comfyui
import pytest
import torch

comfyui.require()

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy_models as models
from ba_solver.bas_core import (
    Control,
    DivergedError,
    Guidance,
    SideNetCard,
    edit,
    invert,
    load_sidenet,
    load_sit,
    model_field,
    reconstruct,
    straight_trajectory,
)
from ba_solver.bas_core.editing import FADE
from ba_solver.lab.shapes import draw_shapes
from ba_solver.nodes.edit_nodes import EDIT_CFG, BAEdit, BAInvert, BAReconstruct
from ba_solver.nodes.editing.schedule import editing_schedule
from ba_solver.nodes.folders import DEMO, SIDENETS, SITS
from ba_solver.nodes.models.parameterization import flow_interval
from ba_solver.nodes.sampling.guider import guider_for
from ba_solver.nodes.sidenet_nodes import ApplySideNet
from ba_solver.nodes.sit_nodes import ClassLabel, LoadSiT
from comfy_extras.nodes_custom_sampler import Guider_Basic, SamplerCustomAdvanced

pytestmark = pytest.mark.comfyui
CLOSE = {"rtol": 2e-4, "atol": 2e-4}
NAMES = ("flux", "sd3", "wan", "sdxl")
STEPS = 4


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def demo():
    """The shipped SiT with its SideNet."""
    with torch.inference_mode():
        model, sidenet = LoadSiT.execute(DEMO).result[0], models.file_sidenet(DEMO)
        return ApplySideNet.execute(model, sidenet=sidenet).result[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tiny models of ComfyUI's classes, with random SideNets."""
    made = {}

    def get(name):
        if name not in made:
            with torch.inference_mode(False):
                model = models.make_model(name)
            path = tmp_path_factory.mktemp("sidenets") / f"{name}.safetensors"
            card = SideNetCard(cfg_range=(1.0, 10.0))
            sidenet = models.make_sidenet(path, models.TINY[name].latent[0], card)
            made[name] = models.with_sidenet(model, sidenet)
        return made[name]

    return get


def shapes(batch=2, seed=3):
    return draw_shapes(torch.Generator().manual_seed(seed), batch)


def label(model, index):
    return ClassLabel.execute(model, "demo 0: disc", index).result


def psnr(a, b):
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def edited(model, image, source, positive, negative, **more):
    """The edited image, and the source trajectory."""
    given = {"steps": STEPS, "negative": negative, **more}
    latent, trajectory = BAEdit.execute(model, {"samples": image}, source, positive, **given).result
    return latent["samples"], trajectory


def reconstructed(trajectory):
    return BAReconstruct.execute(trajectory).result[0]["samples"]


def tiny_case(tiny, name, batch=1):
    model, image = tiny(name), 0.5 * models.noise(name, batch, seed=4)
    return model, image, models.text(name, 1), models.text(name, 2), models.text(name, 3)


# --- the result is the core's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["inversion", "inversion-free"])
def test_demo_equals_the_core_on_plain_torch(method, demo):
    batch = shapes()
    source, target = label(demo, int(batch.labels[0])), label(demo, 4)
    ours, trajectory = edited(
        demo, batch.images, source[0], target[0], target[1], method=method, eta=0.2, eta_end_percent=0.5
    )
    back = reconstructed(trajectory)
    noise_ = comfy.sample.prepare_noise(batch.images, 0)
    sit, (net, _) = load_sit(SITS.demo), load_sidenet(SIDENETS.demo)
    classes = torch.full((2,), int(batch.labels[0]))
    null, times = torch.full((2,), sit.null_class), editing_schedule(demo, STEPS, 0.8).times
    own = model_field(sit, classes, mode="combined")
    other = model_field(sit, torch.full((2,), 4), null, Guidance(2.0), mode="combined")
    if method == "inversion":
        path = invert(own, net, batch.images, times, noise_)
        torch.testing.assert_close(back, reconstruct(own, net, path), **CLOSE)
    else:
        path = straight_trajectory(own, net, batch.images, noise_, times)
        assert torch.equal(back, batch.images)
    torch.testing.assert_close(
        ours, edit(other, net, path, Control(0.2, (0.5, 1.0), FADE if method == "inversion" else None)), **CLOSE
    )
    assert (ours - batch.images).abs().mean() > 0.02


@pytest.mark.parametrize("method", ["inversion", "inversion-free"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_prompt_gives_the_image_back(name, method, tiny):
    model, image, source, _, negative = tiny_case(tiny, name)
    guided = {"cfg": 1.0, "source_cfg": 1.0, "method": method}
    same, trajectory = edited(model, image, source, source, negative, **guided)
    assert psnr(same, image) > 60
    if method == "inversion":
        assert psnr(reconstructed(trajectory), image) < 60, "the plain return shows the solver's error"
    other, _ = edited(model, image, source, models.text(name, 2), negative, **guided)
    assert (other - image).abs().mean() > 1e-3


def test_exact_return_of_the_demo_at_five_calls_and_with_guidance(demo):
    batch = shapes()
    positive, negative = label(demo, int(batch.labels[0]))
    for cfg in (1.0, 2.0):
        more = {"steps": 5, "cfg": cfg, "source_cfg": cfg}
        assert psnr(edited(demo, batch.images, positive, positive, negative, **more)[0], batch.images) > 60


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_mask_of_another_size_keeps_the_rest(name, tiny):
    model, image, source, target, negative = tiny_case(tiny, name)
    mask = torch.zeros(1, 32, 32)
    mask[..., :16] = 1
    out, _ = edited(model, image, source, target, negative, mask=mask)
    # Resizing blurs the border by half a latent pixel.
    assert (out - image)[..., 5:].abs().max() < 1e-5 < 1e-3 < (out - image)[..., :3].abs().mean()
    soft, _ = edited(model, image, source, target, negative, mask=0.5 * torch.ones(1, 32, 32))
    assert 0 < (soft - image).abs().mean() < (edited(model, image, source, target, negative)[0] - image).abs().mean()


def test_the_latents_own_mask_is_used(tiny):
    model, image, source, target, negative = tiny_case(tiny, "sd3")
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    latent = {"samples": image, "noise_mask": mask}
    out = BAEdit.execute(model, latent, source, target, STEPS, negative).result[0]["samples"]
    assert (out - image)[..., 4:].abs().max() < 1e-5 < (out - image)[..., :4].abs().mean()


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_batch_equals_single_runs(name, tiny):
    model, image, source, target, negative = tiny_case(tiny, name, 2)
    together, _ = edited(model, image, source, target, negative)
    # The noise of the second image differs when it is alone, and so its edit; the first one's does not.
    alone, _ = edited(model, image[:1], source, target, negative)
    torch.testing.assert_close(together[:1], alone, **CLOSE)


def test_one_image_and_a_batch_of_prompts(demo):
    batch = shapes(1)
    source, negative = label(demo, int(batch.labels[0]))
    prompts = [[torch.zeros(1, 1, 1), {"class_label": torch.tensor([1, 4, 6])}]]
    out, _ = edited(demo, batch.images, source, prompts, negative)
    assert out.shape == (3, 3, 32, 32) and (out[0] - out[1]).abs().mean() > 0.02
    with pytest.raises(ValueError, match="2 images and a batch of 3 prompts"):
        edited(demo, shapes(2).images, source, prompts, negative)
    two = [[torch.zeros(1, 1, 1), {"class_label": torch.tensor([0, 2])}]]
    with pytest.raises(ValueError, match="prompts come in batches of 2 and 3"):
        edited(demo, batch.images, two, prompts, negative)


def test_a_batch_of_images_and_one_prompt(demo):
    batch = shapes(3)
    source, target = label(demo, int(batch.labels[0])), label(demo, 4)
    together, _ = edited(demo, batch.images, source[0], *target)
    assert together.shape == (3, 3, 32, 32)
    assert all((together[i] - batch.images[i]).abs().mean() > 0.02 for i in range(3))


def test_without_a_sidenet_the_multistep_method_edits(demo):
    model = LoadSiT.execute(DEMO).result[0]
    batch = shapes()
    source, target = label(model, int(batch.labels[0])), label(model, 4)
    same, _ = edited(model, batch.images, source[0], source[0], source[1], cfg=1.0)
    assert psnr(same, batch.images) > 60
    ours, _ = edited(model, batch.images, source[0], *target)
    assert (ours - edited(demo, batch.images, source[0], *target)[0]).abs().max() > 1e-3


def test_lora_acts(tiny):
    model, image, source, target, negative = tiny_case(tiny, "flux")
    patched = model.clone()
    key = next(k for k, v in model.model.state_dict().items() if k.endswith("weight") and "block" in k and v.ndim == 2)
    change = 0.2 * torch.randn(model.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(3))
    patched.add_patches({key: ("diff", (change,))})
    before, _ = edited(model, image, source, target, negative)
    assert (edited(patched, image, source, target, negative)[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(edited(model, image, source, target, negative)[0], before, **CLOSE)


# --- BA Invert ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_edit_along_a_trajectory_is_the_edit(name, tiny):
    model, image, source, target, negative = tiny_case(tiny, name)
    _, _, trajectory = BAInvert.execute(model, source, {"samples": image}, STEPS).result
    along, same = edited(model, image, source, target, negative, trajectory=trajectory)
    alone, own = edited(model, image, source, target, negative)
    torch.testing.assert_close(along, alone, **CLOSE)
    assert same is trajectory
    torch.testing.assert_close(reconstructed(own), reconstructed(trajectory), **CLOSE)


@pytest.mark.parametrize("denoise", [1.0, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_stock_samplers_start_where_the_inversion_ended(name, denoise, tiny):
    """The first state of a stock sampler, from the NOISE and the image, is the trajectory's noisy end."""
    model, image, source, _, _ = tiny_case(tiny, name)
    inverted, noise_, trajectory = BAInvert.execute(model, source, {"samples": image}, STEPS, denoise).result
    guider, seen = Guider_Basic(model), []
    guider.set_conds(source)

    def note(model, x, sigmas, extra_args=None, callback=None, disable=None):
        seen.append(x.clone())
        return x

    SamplerCustomAdvanced.execute(
        noise_, guider, comfy.samplers.KSAMPLER(note), trajectory.schedule.sigmas, {"samples": image}
    )
    state = trajectory.schedule.parameterization.from_flow(trajectory.source.noise, trajectory.schedule.sigmas[0])
    torch.testing.assert_close(seen[0], state, **CLOSE)
    torch.testing.assert_close(model.model.process_latent_in(inverted["samples"]), state, **CLOSE)
    assert inverted["samples"].isfinite().all()


def test_euler_on_the_inverted_noise_comes_near_the_image(demo):
    batch = shapes()
    source, _ = label(demo, int(batch.labels[0]))
    _, noise_, _ = BAInvert.execute(demo, source, {"samples": batch.images}, 10, 1.0).result
    guider = Guider_Basic(demo)
    guider.set_conds(source)
    sigmas = comfy.samplers.calculate_sigmas(demo.get_model_object("model_sampling"), "simple", 60)
    out = SamplerCustomAdvanced.execute(
        noise_, guider, comfy.samplers.ksampler("euler"), sigmas, {"samples": batch.images}
    ).result[0]["samples"]
    assert psnr(out, batch.images) > 20


def test_interruption_leaves_the_next_run_clean(tiny):
    model, image, source, target, negative = tiny_case(tiny, "flux")
    before, _ = edited(model, image, source, target, negative)
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        edited(model, image, source, target, negative)
    torch.testing.assert_close(edited(model, image, source, target, negative)[0], before, **CLOSE)


def test_previews_are_called_back(demo, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "latent_preview.prepare_callback", lambda model, steps, *_: lambda i, x0, x, n: seen.append((i, n, x0.shape))
    )
    batch = shapes(1)
    positive, negative = label(demo, 3)
    edited(demo, batch.images, positive, positive, negative)
    # The way to noise, and the edit: what an inversion alone gives back is not computed unless BA Reconstruct asks.
    assert [i for i, _, _ in seen] == [0, 1, 2, 0, 1, 2, 3]
    assert {(n, shape) for _, n, shape in seen} == {(STEPS, torch.Size([1, 3, 32, 32]))}


# --- bad input ----------------------------------------------------------------------------------------------------


def test_images_that_do_not_fit_are_refused_in_words(demo, tiny):
    positive, negative = label(demo, 3)
    with pytest.raises(ValueError, match=r"an image of 32x32 pixels; got 64x48. Scale the image to 32x32"):
        edited(demo, torch.zeros(1, 3, 48, 64), positive, positive, negative)
    with pytest.raises(ValueError, match=r"latents have 3 channels; the image's have 4.*alpha channel, remove"):
        edited(demo, torch.ones(1, 4, 32, 32), positive, positive, negative)
    model, image, source, target, negative = tiny_case(tiny, "flux")
    assert edited(model, image[..., :7, :5], source, target, negative)[0].shape == (1, 16, 7, 5)


def test_empty_masks_and_missing_negatives_are_refused_in_words(tiny):
    model, image, source, target, negative = tiny_case(tiny, "flux")
    with pytest.raises(ValueError, match="mask is empty, so nothing may change"):
        edited(model, image, source, target, negative, mask=torch.zeros(1, 8, 8))
    tiny_spot = torch.zeros(1, 96, 96)
    tiny_spot[..., 0, 0] = 1
    with pytest.raises(ValueError, match=r"made as small as the latent, 8x8\. Paint a larger place"):
        edited(model, image, source, target, negative, mask=tiny_spot)
    with pytest.raises(ValueError, match="1 images and 3 masks"):
        edited(model, image, source, target, negative, mask=torch.ones(3, 8, 8))
    with pytest.raises(ValueError, match="CFG of 3 needs a negative"):
        BAInvert.execute(model, source, {"samples": image}, STEPS, source_cfg=3.0)


def test_foreign_trajectories_are_refused_in_words(tiny):
    model, image, source, target, negative = tiny_case(tiny, "flux")
    _, noise_, trajectory = BAInvert.execute(model, source, {"samples": image}, STEPS).result
    other = tiny_case(tiny, "sd3")
    with pytest.raises(ValueError, match=r"made with another model \(kind 'flux'\); this MODEL is of kind 'sd3'"):
        edited(other[0], other[1], *other[2:], trajectory=trajectory)
    with pytest.raises(ValueError, match=r"trajectory belongs to latents of \(1, 16, 8, 8\)"):
        edited(model, image[..., :6], source, target, negative, trajectory=trajectory)
    with pytest.raises(ValueError, match="another image of this size"):
        edited(model, image.flip(-1), source, target, negative, trajectory=trajectory)
    assert edited(model, image + 1e-4, source, target, negative, trajectory=trajectory)[0].isfinite().all()
    bare = model.clone()
    bare.set_additional_models("sidenet", [])
    with pytest.raises(
        ValueError, match=r"made with the SideNet 'flux.safetensors' at strength 1, and this MODEL has no"
    ):
        edited(bare, image, source, target, negative, trajectory=trajectory)
    with pytest.raises(ValueError, match="inverted noise belongs to latents of"):
        noise_.generate_noise({"samples": image[..., :6]})


def test_an_empty_window_is_refused_in_words(tiny):
    model, image, source, target, negative = tiny_case(tiny, "flux")
    with pytest.raises(ValueError, match=r"eta_start_percent \(0.8\) must not be above eta_end_percent \(0.2\)"):
        edited(model, image, source, target, negative, eta=0.5, eta_start_percent=0.8, eta_end_percent=0.2)


def test_guidance_that_makes_the_inversion_diverge_is_said(demo):
    batch = shapes(1)
    positive, negative = label(demo, 3)
    with pytest.raises(DivergedError, match="Lower the source guidance, which is 30"):
        edited(demo, batch.images, positive, positive, negative, source_cfg=30.0)


def test_cfg_outside_the_sidenets_range_is_warned_of(demo, caplog):
    """The demo's SideNet was made for CFG 2 and serves half to one and a half times of it. A way to noise at CFG 1,
    which every edit takes, is never warned of."""
    image, source, target = shapes(1).images, label(demo, 0), label(demo, 4)
    cases = (({}, []), ({"cfg": 5.0}, ["at 5"]), ({"source_cfg": 1.5}, []), ({"source_cfg": 4.0}, ["at 4"]))
    for inputs, expected in cases:
        caplog.clear()
        edited(demo, image, source[0], target[0], target[1], **inputs)
        warned = [record.getMessage() for record in caplog.records if "less accurate" in record.getMessage()]
        assert len(warned) == len(expected), warned
        assert all(part in text for part, text in zip(expected, warned, strict=True)), warned


def test_eta_acts_between_its_percents(demo):
    """At 1 over the whole sampling the image stays; over the first half the rest of it changes, and without more."""
    image, source, target = shapes(1).images, label(demo, 0), label(demo, 4)
    whole, first_half, never = (
        (edited(demo, image, source[0], *target, **inputs)[0] - image).abs().mean()
        for inputs in ({"eta": 1.0}, {"eta": 1.0, "eta_end_percent": 0.5}, {})
    )
    assert whole < 1e-5 < 0.01 < first_half < 0.9 * never


def test_percents_are_comfyuis(tiny):
    """The flow times between two shares of a sampling are those that ComfyUI's own ranges of percents have."""
    for name in NAMES:
        sampling = tiny(name).get_model_object("model_sampling")
        assert flow_interval(sampling, 0.0, 1.0) == (0.0, 1.0)
        low, high = flow_interval(sampling, 0.25, 0.75)
        sigmas = [sampling.percent_to_sigma(percent) for percent in (0.75, 0.25)]
        expected = [sigma / (1 + sigma) if name == "sdxl" else sigma for sigma in sigmas]
        assert [low, high] == pytest.approx([float(time) for time in expected])


def test_the_seed_of_an_inversion_stays():
    """Else every run would invert the image again."""
    for node in (BAInvert, BAEdit):
        (seed,) = (entry for entry in node.GET_SCHEMA().inputs if entry.id == "seed")
        assert seed.as_dict()["control_after_generate"] is False


def test_the_cfg_of_an_edit_is_what_the_model_needs(tiny, monkeypatch):
    """Where none is given: 1 without a negative, which could not be used, and where the model takes its guidance as an
    input (FLUX.1-dev); CFG for others."""
    asked = []
    monkeypatch.setattr(
        "ba_solver.nodes.edit_nodes.guider_for",
        lambda model, positive, negative, cfg: asked.append(cfg) or guider_for(model, positive, negative, cfg),
    )
    for name, guided in (("sd3", EDIT_CFG), ("flux", 1.0)):
        model, image, source, target, negative = tiny_case(tiny, name)
        for given, expected in ((negative, guided), (None, 1.0)):
            asked.clear()
            edited(model, image, source, target, given)
            assert asked == [1.0, expected], name
        edited(model, image, source, target, negative, cfg=3.0)
        assert asked[-1] == 3.0


def test_six_inputs_of_ba_edit_are_needed():
    """The others are links that may stay empty, or advanced."""
    required = [entry.id for entry in BAEdit.GET_SCHEMA().inputs if not entry.optional]
    assert required == ["model", "latent_image", "source", "positive", "steps", "denoise"]
    widgets = [entry for entry in BAEdit.GET_SCHEMA().inputs if hasattr(entry, "default") and entry.optional]
    assert widgets and all(entry.advanced for entry in widgets)
