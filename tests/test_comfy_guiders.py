"""What the guider really does, in real ComfyUI: nodes of packs that change CFG are sampled, and recorded, as what they
are."""

import comfyui
import pytest
import torch

comfyui.require()

import comfy.samplers
import comfy_models as models
from ba_solver.training.recording.trajectories import open_trajectories
from comfy_extras import nodes_custom_sampler, nodes_perpneg, nodes_video_model
from test_comfy_make import as_in_comfyui, made, sidenet_file  # noqa: F401
from test_comfy_order import euler_velocity
from test_comfy_sampling import CLOSE, WHOLE_CALLS, reference, run, sampler, sidenet_with_conditional_calls

pytestmark = pytest.mark.comfyui


def cfg_override(cfg):
    def change(model):
        node = getattr(nodes_custom_sampler, "CFGOverride", None)
        if node is None:
            pytest.skip("newer ComfyUI has CFG Override")
        return node.execute(model, cfg, 0.0, 0.5).result[0]

    return change


def automatic_cfg(model):
    """Extraltodeus/ComfyUI-AutomaticCFG: a scale that follows the branches' difference."""
    changed = model.clone()

    def scaled(a):
        difference = a["cond"] - a["uncond"]
        return a["uncond"] + difference * (a["cond_scale"] / (1 + difference.std((1, 2, 3), keepdim=True)))

    changed.set_model_sampler_cfg_function(scaled)
    return changed


def skimmed_cfg(model):
    """Extraltodeus/Skimmed_CFG: the branches are changed before CFG, where they agree."""
    changed = model.clone()

    def skim(a):
        cond, uncond = a["conds_out"][:2]
        return [torch.where((cond * uncond) > 0, 0.8 * cond + 0.2 * uncond, cond), uncond]

    changed.set_model_sampler_pre_cfg_function(skim)
    return changed


def guidance_limiter(model):
    """pamparamm/ComfyUI-ppm: no CFG at the ends of the path."""
    changed = model.clone()

    def limit(a):
        inside = 0.2 < float(a["sigma"][0]) < 0.9
        return a["denoised"] if inside else a["cond_denoised"]

    changed.set_model_sampler_post_cfg_function(limit)
    return changed


def tiled_diffusion(model):
    """shiimizu/ComfyUI-TiledDiffusion: the state is drawn in two tiles."""
    changed = model.clone()

    def tiles(apply, a):
        halves = [apply(half, a["timestep"], **a["c"]) for half in a["input"].chunk(2, dim=-1)]
        return torch.cat(halves, dim=-1)

    changed.set_model_unet_function_wrapper(tiles)
    return changed


def video_linear_cfg(model):
    return nodes_video_model.VideoLinearCFGGuidance().patch(model, 1.0)[0]


CHANGES = {
    "CFG Override to 1": cfg_override(1.0),
    "CFG Override to 6": cfg_override(6.0),
    "AutomaticCFG": automatic_cfg,
    "Skimmed CFG": skimmed_cfg,
    "guidance limiter": guidance_limiter,
    "Tiled Diffusion": tiled_diffusion,
    "VideoLinearCFG": video_linear_cfg,
}


@pytest.mark.parametrize("velocity", ["combined", "per_branch"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_cfg_is_sampled_as_what_it_is(change, velocity, tmp_path, caplog):
    """Its combined velocity in whole calls, and one line that says so."""
    model, path = models.make_model("sd3"), tmp_path / "conditional.safetensors"
    net, _ = sidenet_with_conditional_calls(path, velocity)
    changed, sigmas = CHANGES[change](model), torch.tensor([1.0, 0.8, 0.25, 0.0])
    ours = run(models.with_sidenet(changed, net), "sd3", sampler(follow_sigmas=True), sigmas)
    assert caplog.text.count(WHOLE_CALLS) == 1
    torch.testing.assert_close(ours, run(changed, "sd3", reference(path), sigmas), **CLOSE)
    assert (ours - run(models.with_sidenet(model, net), "sd3", sampler(follow_sigmas=True), sigmas)).abs().max() > 1e-3


@pytest.mark.parametrize("change", CHANGES)
def test_changed_cfg_is_recorded_as_what_it_is(change):
    model, negative = CHANGES[change](models.make_model("sd3")), models.text("sd3", 2)
    positive = models.text("sd3", 0)
    made(model, [positive], torch.zeros(1, 16, 8, 8), negative=negative, cfg=3.0)
    trajectories = open_trajectories((sidenet_file().with_suffix(".trajectories"),))[0]
    noise, velocity = trajectories.states[0][0][None], trajectories.velocities[0][0][None]
    ours = euler_velocity(model, positive, noise, negative=negative, cfg=3.0)
    torch.testing.assert_close(velocity, ours, atol=5e-3, rtol=2e-3)


def test_sigmas_of_other_nodes_get_the_fitted_schedule(tmp_path):
    """Detailers and tiled upscalers know names of schedulers alone, and some round their sigmas."""
    net, fitted = sidenet_with_conditional_calls(tmp_path / "conditional.safetensors", "combined")
    applied = models.with_sidenet(models.make_model("sd3"), net)
    sigmas = comfy.samplers.calculate_sigmas(applied.get_model_object("model_sampling"), "simple", 3)
    whole = run(applied, "sd3", sampler(), sigmas)
    for given in (
        (100 * sigmas).round() / 100,
        0.99 * sigmas + 0.01 * (sigmas == 1),
        torch.tensor([1.0, 0.7, 0.3, 0.0]),
    ):
        torch.testing.assert_close(run(applied, "sd3", sampler(), given), whole, **CLOSE)
    plain = run(applied, "sd3", sampler(follow_sigmas=True), sigmas)
    assert (whole - plain).abs().max() > 1e-2 and fitted.conditional_only


def test_perp_neg_guider_is_sampled_on_its_guided_velocity(tmp_path, caplog):
    model, path = models.make_model("sd3"), tmp_path / "conditional.safetensors"
    net, _ = sidenet_with_conditional_calls(path, "per_branch")

    def guider(model):
        made = nodes_perpneg.Guider_PerpNeg(model)
        made.set_conds(*(models.text("sd3", seed) for seed in (1, 2, 3)))
        made.set_cfg(3.0, 1.0)
        return made

    applied, sigmas = models.with_sidenet(model, net), torch.tensor([1.0, 0.8, 0.25, 0.0])
    ours = run(applied, "sd3", sampler(follow_sigmas=True), sigmas, guider=guider(applied))
    assert caplog.text.count(WHOLE_CALLS) == 1
    torch.testing.assert_close(ours, run(model, "sd3", reference(path), sigmas, guider=guider(model)), **CLOSE)


def test_a_guider_class_that_a_pack_has_changed_is_not_taken_apart(tmp_path, caplog, monkeypatch):
    """shiimizu/ComfyUI_smZNodes replaces CFGGuider's own functions."""
    whole = comfy.samplers.CFGGuider.predict_noise

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006, the signature is ComfyUI's
        return 0.9 * whole(self, x, timestep, model_options, seed)

    monkeypatch.setattr(comfy.samplers.CFGGuider, "predict_noise", predict_noise)
    path = tmp_path / "conditional.safetensors"
    net, _ = sidenet_with_conditional_calls(path, "per_branch")
    model, sigmas = models.make_model("sd3"), torch.tensor([1.0, 0.8, 0.25, 0.0])
    ours = run(models.with_sidenet(model, net), "sd3", sampler(follow_sigmas=True), sigmas)
    assert WHOLE_CALLS in caplog.text
    torch.testing.assert_close(ours, run(model, "sd3", reference(path), sigmas), **CLOSE)
