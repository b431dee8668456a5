"""What depends on the order of model calls, in real ComfyUI: keyframes that move forward only, caches, momentum.

Make SideNet samples many times over, Compare Solvers runs one sampler after the other, and BA Invert climbs.
"""

import comfyui
import pytest
import torch

comfyui.require()

import comfy.samplers
import comfy_models as models
import pack_stand_ins as packs
from ba_solver.nodes.compare_nodes import CompareSolvers
from ba_solver.nodes.edit_nodes import BAEdit, BAInvert
from ba_solver.training.recording.trajectories import open_trajectories
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from test_comfy_make import as_in_comfyui, made, sidenet_file  # noqa: F401

pytestmark = pytest.mark.comfyui
STEPS = 6


def compared(model, positive, negative, latent, **changes):
    given = {"model": model, "negative": negative, "cfg": 3.0, "seed": 7, "samplers": "euler, heun"}
    given |= {"schedulers": "simple", "model_calls": "4", "reference_steps": 20, **changes}
    latent = latent if isinstance(latent, dict) else {"samples": latent}
    return CompareSolvers.execute(**{name: [value] for name, value in given.items()}, positive=[positive],
                                  latent_image=[latent]).result  # fmt: skip


def inverted_and_edited(model, source, target, latent):
    BAInvert.execute(model, source, {"samples": latent}, STEPS, 1.0)
    BAEdit.execute(model, {"samples": latent}, source, target, STEPS, denoise=1.0, cfg=1.0)


JOBS = {
    "Make": lambda model, first, second, negative, latent: made(
        model, [first, second], latent, negative=negative, cfg=3.0
    ),
    "Compare": lambda model, first, second, negative, latent: compared(model, first, negative, latent),
    "Invert and Edit": lambda model, first, second, negative, latent: inverted_and_edited(
        model, first, second, latent + 0.5
    ),
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("keyframes", [[(1.0, 0.0), (0.0, 0.5)], [(0.2, 0.0), (1.0, 0.3), (0.5, 0.7)]], ids=len)
def test_hook_keyframes_have_the_strength_of_their_time(job, keyframes):
    """ComfyUI's LoRA hooks, whatever the order of calls; the weights are the model's own afterwards."""
    model, group, strength = packs.hooked_lora(models.make_model("sd3"), keyframes)
    first, second = (packs.with_hooks(models.text("sd3", seed), group) for seed in (0, 1))
    negative, seen = packs.with_hooks(models.text("sd3", 2), group), []
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, inputs: seen.append((float(inputs[1][0]), strength()))
    )
    try:
        JOBS[job](model, first, second, negative, torch.zeros(1, 16, 8, 8))
    finally:
        hook.remove()
    sampling = model.get_model_object("model_sampling")
    starts = [float(sampling.timestep(torch.tensor(min(1.0, sampling.percent_to_sigma(at))))) for _, at in keyframes]

    def expected(t):
        return [value for (value, _), start in zip(keyframes, starts, strict=True) if t <= start * (1 + 1e-5)][-1]

    wrong = [(t, at) for t, at in seen if at != pytest.approx(expected(t), abs=1e-3)]
    assert len(seen) > 10 and not wrong
    assert len({round(at, 3) for _, at in seen}) == len(keyframes), "every keyframe has its time"
    assert strength() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("job", JOBS)
def test_advanced_controlnets_keyframes_have_the_strength_of_their_time(job):
    keyframes, seen = [(1.0, 0.0), (0.25, 0.5)], []
    model, negative, second = models.make_model("sdxl"), models.text("sdxl", 2), models.text("sdxl", 1)
    control = packs.AdvancedControlNet(keyframes, seen)
    first = [[c, {**d, "control": control, "control_apply_to_uncond": True}] for c, d in models.text("sdxl", 0)]
    JOBS[job](model, first, second, negative, torch.zeros(1, 4, 8, 8))
    half = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    wrong = [(sigma, at) for sigma, at in seen if at != keyframes[int(sigma <= half * (1 + 1e-6))][0]]
    assert len(seen) > 5 and not wrong and {at for _, at in seen} == {1.0, 0.25}


@pytest.mark.parametrize("job", ["Make", "Compare"])
def test_animatediffs_callbacks_begin_each_run(job):
    """A pack's own state, which it resets before a sampling and after it."""
    seen = []
    model = packs.animatediff_evolved(models.make_model("sd3"), seen)
    JOBS[job](model, models.text("sd3", 0), models.text("sd3", 1), models.text("sd3", 2), torch.zeros(1, 16, 8, 8))
    wrong = [(t, at) for t, at in seen if at != (0.5 if t <= 0.5 else 1.0)]
    assert len(seen) > 10 and not wrong


@pytest.mark.parametrize("job", ["Make", "Compare"])
@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode], ids=["EasyCache", "LazyCache"])
def test_comfyuis_caches_are_refused_by_name(node, job):
    model = node.execute(models.make_model("sd3"), 0.2, 0.15, 0.95, False).result[0]
    name = node.__name__.removesuffix("Node")
    with pytest.raises(ValueError, match=f"{name} is on the MODEL.*Bypass {name} here"):
        JOBS[job](model, *(models.text("sd3", seed) for seed in range(3)), torch.zeros(1, 16, 8, 8))
    assert not sidenet_file().exists()


@pytest.mark.parametrize("job", ["Make", "Compare"])
@pytest.mark.parametrize("cache", packs.CACHES)
def test_answers_that_depend_on_earlier_calls_are_refused(cache, job):
    """Caches of packs, momentum and noise have no common sign; the same call has another answer."""
    model = packs.CACHES[cache](models.make_model("sd3"))
    with pytest.raises(ValueError, match=r"same model call gives different answers: at t = .*% off\..*Take it off"):
        JOBS[job](model, *(models.text("sd3", seed) for seed in range(3)), torch.zeros(1, 16, 8, 8))
    assert not sidenet_file().exists()


def test_what_only_looks_like_state_is_not_refused():
    """A cache of what does not change from call to call, such as a reference image's keys and values."""
    model, known = models.make_model("sd3").clone(), {}

    def remembering(apply, a):
        known.setdefault("scale", 0.9)
        return known["scale"] * apply(a["input"], a["timestep"], **a["c"])

    model.set_model_unet_function_wrapper(remembering)
    assert made(model, [models.text("sd3", 0)], torch.zeros(1, 16, 8, 8))[0].card.own_schedules


def test_context_windows_are_recorded_as_they_are_sampled():
    """They look up the step among the sigmas that are sampled."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    given = {"context_length": 2, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1}
    given |= {"closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": False}
    given |= {"cond_retain_index_list": "", "split_conds_to_windows": False}
    known = {entry.id for entry in ContextWindowsManualNode.GET_SCHEMA().inputs}
    plain = models.make_model("wan")
    windows = ContextWindowsManualNode.execute(plain, **{k: v for k, v in given.items() if k in known}).result[0]
    text, latent = models.text("wan", 0), torch.zeros(1, *models.TINY["wan"].latent)
    made(windows, [text], latent, batch_size=1)  # ComfyUI's windows take one video at a time
    trajectories = open_trajectories((sidenet_file().with_suffix(".trajectories"),))[0]
    noise, velocity = trajectories.states[0][0], trajectories.velocities[0][0]
    ours = euler_velocity(windows, text, noise[None])
    torch.testing.assert_close(velocity[None], ours, atol=5e-3, rtol=2e-3)
    assert (ours - euler_velocity(plain, text, noise[None])).abs().max() > 0.05
    assert "euler" in compared(windows, text, None, latent, cfg=1.0)[0]


def euler_velocity(model, positive, noise, latent=None, negative=None, cfg=1.0, **more):
    """The first velocity of ComfyUI's own Euler from a noise."""
    seen = []
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative or positive)
    guider.set_cfg(cfg)
    sampler = comfy.samplers.sampler_object("euler")
    latent = torch.zeros_like(noise) if latent is None else latent
    guider.sample(
        noise, latent, sampler, torch.tensor([1.0, 0.75]), disable_pbar=True,
        callback=lambda i, denoised, x, n: seen.append(x - denoised), **more,
    )  # fmt: skip
    return seen[0]
