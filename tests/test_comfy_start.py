"""What a sampling starts from, in real ComfyUI: masks that models are told of, the scale of noise, a start image.

Make SideNet, Compare Solvers, BA Invert and BA Edit start as KSampler does.
"""

import comfyui
import pytest
import torch

comfyui.require()

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy_models as models
from ba_solver.nodes.comparing.compare import compare, jobs_for
from ba_solver.nodes.edit_nodes import BAEdit, BAInvert, BAReconstruct
from ba_solver.nodes.sampling.guider import guider_for
from ba_solver.nodes.sampling.start import Latent
from ba_solver.training.recording.trajectories import open_trajectories
from test_comfy_make import as_in_comfyui, made, sidenet_file  # noqa: F401
from test_comfy_order import compared, euler_velocity

pytestmark = pytest.mark.comfyui
# Wan 2.2 5B and LTX-Video take a mask as the times of their frames.
MASKED = ("sd3", *models.MASKED)


def image_and_mask(name, batch=1):
    """A picture or a video, of which the left half or the first frame is kept; where it is kept."""
    image = 0.5 * models.noise(name, batch, seed=9)
    mask = torch.ones(1, 1, *image.shape[2:])
    if image.ndim == 5:
        mask[:, :, 0] = 0
    else:
        mask[..., : image.shape[-1] // 2] = 0
    return image, mask, (mask == 0).expand(image.shape)


def recorded():
    return open_trajectories((sidenet_file().with_suffix(".trajectories"),))[0]


@pytest.mark.parametrize("name", MASKED)
def test_recording_keeps_what_the_latents_mask_keeps(name):
    """The recorded velocity is that of ComfyUI's Euler from the same noise, image and mask; what is kept stays on the
    straight line to it."""
    model = models.make_model(name)
    image, mask, kept = image_and_mask(name)
    positives, negative = [models.text(name, seed) for seed in (0, 1)], models.text(name, 2)
    given = {"negative": negative, "cfg": 3.0}
    sidenet = made(model, positives, {"samples": image, "noise_mask": mask}, **given)[0]
    inner, trajectories = model.model.process_latent_in(image)[0], recorded()
    for row in range(4):
        noise, velocity = trajectories.states[row][0], trajectories.velocities[row][0]
        positive = positives[int(trajectories.labels[row])]
        ours = euler_velocity(model, positive, noise[None], image, denoise_mask=mask, **given)[0]
        torch.testing.assert_close(velocity, ours, atol=5e-3, rtol=5e-3)
        without = euler_velocity(model, positive, noise[None], image, **given)[0]
        heeded = (ours - without)[~kept[0]].abs().max()
        assert heeded > 0.01 or name not in models.MASKED, "the model must heed what it is told"
        for time, state in zip(trajectories.times[row], trajectories.states[row], strict=True):
            line = torch.lerp(inner, noise, float(time))
            torch.testing.assert_close(state[kept[0]], line[kept[0]], atol=1e-3, rtol=1e-3)
    assert not any(each.analytic_first_step for each in sidenet.card.own_schedules.values())


def test_another_mask_or_start_image_is_another_sidenet():
    model, texts = models.make_model("wan22"), [models.text("wan22", seed) for seed in (0, 1)]
    image, mask, _ = image_and_mask("wan22")
    made(model, texts, {"samples": image, "noise_mask": mask})
    for latent in (
        {"samples": image},
        {"samples": image, "noise_mask": 1 - mask},
        {"samples": -image, "noise_mask": mask},
    ):
        with pytest.raises(ValueError, match="made for other prompts"):
            made(model, texts, latent)


@pytest.mark.parametrize("name", MASKED)
def test_compare_draws_what_ksampler_draws(name):
    """Each row's end is that of SamplerCustom with the same seed, mask and picture of a batch; the converged picture
    keeps what is kept."""
    model, (image, mask, kept) = models.make_model(name), image_and_mask(name, 2)
    positive, negative = models.text(name, 0), models.text(name, 1)
    latent = Latent(image, mask, [3, 5])
    found = compare(
        guider_for(model, positive, negative, 3.0), latent, 7, jobs_for(model, ["euler"], ["simple"]), [4], 20,
        lambda nfe: None,
    )  # fmt: skip
    noise = comfy.sample.prepare_noise(image, 7, [3, 5])
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    euler = comfy.samplers.sampler_object("euler")
    theirs = comfy.sample.sample_custom(
        model, noise, 3.0, euler, sigmas, positive, negative, image, noise_mask=mask, disable_pbar=True
    )
    (ours,) = (row.end for row in found.rows if row.sampler == "euler")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.reference[kept], image[kept], atol=2e-3, rtol=2e-3)
    assert (found.reference - image)[~kept].abs().mean() > 0.05
    assert all(row.error < 10 for row in found.rows)


@pytest.mark.parametrize("method", ["inversion", "inversion-free"])
@pytest.mark.parametrize("name", MASKED)
def test_editing_tells_the_model_of_the_latents_mask(name, method):
    """The image comes back under its own prompt, what is kept under any; the model is told of the mask each way."""
    model, told = models.make_model(name).clone(), []
    image, mask, kept = image_and_mask(name)
    model.set_model_unet_function_wrapper(
        lambda apply, a: told.append("denoise_mask" in a["c"]) or apply(a["input"], a["timestep"], **a["c"])
    )
    source, target = models.text(name, 0), models.text(name, 1)
    latent = {"samples": image, "noise_mask": mask}
    same = BAEdit.execute(model, latent, source, source, 5, cfg=1.0, method=method).result[0]
    torch.testing.assert_close(same["samples"], image, atol=1e-3, rtol=1e-3)
    other = BAEdit.execute(model, latent, source, target, 5, cfg=1.0, method=method).result[0]["samples"]
    assert (other - image)[kept].abs().max() < 1e-3 < 0.01 < (other - image)[~kept].abs().mean()
    if method == "inversion":
        trajectory = BAInvert.execute(model, source, latent, 5).result[2]
        back = BAReconstruct.execute(trajectory).result[0]
        torch.testing.assert_close(back["samples"][kept], image[kept], atol=2e-3, rtol=2e-3)
        along = BAEdit.execute(model, latent, source, target, 5, cfg=1.0, trajectory=trajectory).result[0]["samples"]
        torch.testing.assert_close(along, other, atol=1e-3, rtol=1e-3)
    assert set(told) == {name in models.MASKED}


def test_what_nodes_do_with_masks_is_recorded():
    """Differential Diffusion draws more of the image the lower the noise is; the mask is soft."""
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    image, mask, _ = image_and_mask("sd3")
    mask = torch.linspace(0, 1, 8).expand_as(mask).clone()
    plain = models.make_model("sd3")
    model = DifferentialDiffusion.execute(plain, strength=1.0).result[0]
    texts = [models.text("sd3", seed) for seed in (0, 1)]
    made(model, texts, {"samples": image, "noise_mask": mask})
    trajectories, inner = recorded(), plain.model.process_latent_in(image)
    for row in range(2):
        times, states, velocities = trajectories.times[row], trajectories.states[row], trajectories.velocities[row]
        noise, text = states[0][None], texts[int(trajectories.labels[row])]
        for point in (0, 4, 7):
            # One Euler step of ComfyUI's from the recorded state.
            seen, sigmas = [], torch.stack([times[point], torch.tensor(0.0)])

            def euler(model, x, sigmas, extra_args=None, state=states[point][None], seen=seen, noise=noise, **_):
                model.noise, model.sigmas = (
                    noise,
                    comfy.samplers.calculate_sigmas(plain.get_model_object("model_sampling"), "simple", 20),
                )
                seen.append((state - model(state, sigmas[:1], **extra_args)) / sigmas[0])
                return x

            comfy.sample.sample_custom(
                model, noise, 1.0, comfy.samplers.KSAMPLER(euler), sigmas, text, text, image, noise_mask=mask,
                disable_pbar=True,
            )  # fmt: skip
            torch.testing.assert_close(velocities[point][None], seen[0], atol=2e-2, rtol=2e-2)
    assert (trajectories.states[0][8] - inner[0])[..., 0].abs().max() < 0.2 * (noise - inner).abs().max()


@pytest.mark.parametrize("job", ["Make", "Compare", "Edit"])
def test_inpainting_models_get_the_latents_mask_as_a_channel(job):
    """An SDXL inpainting model has nine input channels, among them the mask, which KSampler takes from the latent."""
    model, (image, mask, _) = models.make_model("sdxl_inpaint"), image_and_mask("sdxl")
    latent, texts, seen = {"samples": image, "noise_mask": mask}, [models.text("sdxl", seed) for seed in range(3)], []
    model.set_model_unet_function_wrapper(
        lambda apply, a: seen.append(a["c"]["c_concat"][:, :1]) or apply(a["input"], a["timestep"], **a["c"])
    )
    if job == "Make":
        made(model, texts[:2], latent, negative=texts[2], cfg=3.0)
    elif job == "Compare":
        compared(model, texts[0], texts[2], latent)
    else:
        BAEdit.execute(model, latent, texts[0], texts[1], 4, texts[2], cfg=2.0)
    assert len(seen) > 5 and all(torch.equal(given, mask.expand(given.shape)) for given in seen)


@pytest.mark.skipif(
    not hasattr(comfy.model_sampling.ModelSamplingDiscreteFlow, "set_noise_scale"),
    reason="newer ComfyUI's models have a scale of noise",
)
def test_the_models_scale_of_noise_is_recorded_inverted_and_compared():
    """HiDream-O1 is trained with noise of standard deviation 8."""
    from comfy_extras.nodes_model_advanced import ModelNoiseScale

    model = ModelNoiseScale().patch(models.make_model("sd3"), 8.0)[0]
    texts, latent = [models.text("sd3", seed) for seed in (0, 1)], torch.zeros(1, 16, 8, 8)
    made(model, texts, latent)
    trajectories = recorded()
    for row in range(3):
        state, velocity = trajectories.states[row][0], trajectories.velocities[row][0]
        assert state.std() == pytest.approx(8, rel=0.15)
        ours = euler_velocity(model, texts[int(trajectories.labels[row])], state[None] / 8)[0]
        torch.testing.assert_close(velocity, ours, atol=5e-3, rtol=2e-3)
    inverted, noise, _ = BAInvert.execute(model, texts[0], {"samples": latent + 0.5}, 5, 1.0).result
    state = model.model.process_latent_in(inverted["samples"])
    torch.testing.assert_close(8 * noise.generate_noise({"samples": latent}), state, atol=1e-4, rtol=1e-4)
    assert "euler" in compared(model, texts[0], None, latent, cfg=1.0)[0]


def test_a_diffusion_models_start_holds_the_image():
    """ComfyUI adds it to noise of a finite level."""
    model, (image, _, _) = models.make_model("sdxl"), image_and_mask("sdxl")
    made(model, [models.text("sdxl", 0)], 20 * image, batch_size=2)
    starts = torch.stack([recorded().states[row][0] for row in range(6)]).mean(0)
    top = float(model.get_model_object("model_sampling").sigma_max)
    inner = model.model.process_latent_in(20 * image)[0] / (1 + top)
    share = float((starts * inner).sum() / inner.square().sum())
    assert share == pytest.approx(1, abs=4 / float(inner.square().sum()) ** 0.5 / 6**0.5)


@pytest.mark.parametrize(("prompts", "shown"), [(1, False), (2, False), (2, True)])
def test_what_one_condition_shows_is_no_mean_of_others(prompts, shown):
    """An analytic first step needs the mean of several prompts; none of them may hold an image."""
    model = models.make_model("sd3")
    positives = [models.text("sd3", seed) for seed in range(prompts)]
    from test_comfy_sampling import ControlStub

    class Control(ControlStub):
        def get_control(self, *_):
            return {"output": [], "input": [], "middle": []}

        def copy(self):
            return self

    for positive in positives if shown else ():
        positive[0][1]["control"] = Control()
    sidenet = made(model, positives, torch.zeros(1, 16, 8, 8), trajectories=8)[0]
    assert sidenet.has_data_mean <= (prompts > 1 and not shown)
