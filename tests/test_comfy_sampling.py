"""The sampler in ComfyUI, on its own model classes: it computes what the core computes on the same velocities."""

import logging

import comfyui
import pytest
import torch

comfyui.require()

import comfy.controlnet
import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy_models as models
from ba_solver.bas_core import (
    Field,
    Guidance,
    NonFiniteError,
    SideNetCard,
    load_sidenet,
    solve,
    with_strength,
)
from ba_solver.bas_core.flow import time_to_ve_sigma, ve_sigma_to_time, ve_to_flow, x0_to_velocity
from ba_solver.bas_core.guidance import NO_GUIDANCE
from ba_solver.bas_core.schedule import Schedule
from ba_solver.lab.counted_device import CountedDevice
from ba_solver.nodes import notify
from ba_solver.nodes.models import compatibility
from ba_solver.nodes.models.attach import applied_sidenet
from ba_solver.nodes.models.compatibility import facts_of
from ba_solver.nodes.models.parameterization import flow_interval
from ba_solver.nodes.sampling.guider import guider_for
from ba_solver.nodes.sampling.sampler import METHODS, Options, sample_ba_solver
from ba_solver.nodes.sampling.sidenet import sidenet_chunk
from ba_solver.nodes.sampling_nodes import BASampler, BAScheduler
from ba_solver.nodes.sidenet_nodes import ApplySideNet
from comfy.k_diffusion.sampling import sample_euler
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG

pytestmark = pytest.mark.comfyui

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
CHANNELS = {name: models.TINY[name].latent[0] for name in models.NAMES}


@pytest.fixture(autouse=True)
def no_gradients():
    """As ComfyUI runs its nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture
def sidenet(tmp_path):
    """Makes a SideNet file and reads it; `sidenet.path` is the last file."""

    def make(channels, velocity="combined", **config):
        make.path = tmp_path / "random.safetensors"
        card = SideNetCard(cfg_mode=velocity, cfg_range=(1.0, 10.0))
        return models.make_sidenet(make.path, channels, card, **config)

    return make


@pytest.fixture(scope="module")
def model():
    """One MODEL a kind for the whole module: whatever a test leaves on it, another test will notice."""
    made = {}

    def get(name):
        if name not in made:
            with torch.inference_mode(False):
                made[name] = models.make_model(name)
        return made[name]

    return get


def sigmas_of(model, steps=4, scheduler="simple"):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def sampler(**options):
    return comfy.samplers.KSAMPLER(sample_ba_solver, {"options": Options(**options)})


def run(model, name, sampler, sigmas, cfg=3.0, batch=1, guider=None, **more):
    """SamplerCustom, or SamplerCustomAdvanced with a guider; returns the latent."""
    z = more.pop("z", None)
    z = models.noise(name, batch) if z is None else z
    latent = more.pop("latent", torch.zeros_like(z))
    if guider is not None:
        return guider.sample(z, latent, sampler, sigmas, **more)
    arguments = (model, z, cfg, sampler, sigmas, models.text(name, 1), models.text(name, 2), latent)
    return comfy.sample.sample_custom(*arguments, **more)


def reference(path, strength=1.0, branches=False, guidance=None, calls=None, scale=1.0, over=Schedule, **more):
    """A sampler that calls `bas_core.solve` by itself on what ComfyUI's model function returns; `over` makes the run
    of its times."""
    network = None if path is None else load_sidenet(path)[0]

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        flow = not hasattr(model.inner_model.inner_model.model_sampling, "log_sigmas") or float(sigmas[0]) <= 1
        times = sigmas.cpu() if flow else ve_sigma_to_time(sigmas.cpu())
        sigma_of = {float(t): s for t, s in zip(times, sigmas, strict=True)}

        def velocities(y, t, count):
            if calls is not None:
                calls.append(float(t[0]))
            sigma = sigma_of[float(t[0])]
            state = y if flow else y * (1 + sigma)
            if guidance:
                guider = model.inner_model
                conds = [guider.conds["positive"], guider.conds["negative"]][:count]
                options = extra_args["model_options"]
                out = comfy.samplers.calc_cond_batch(guider.inner_model, conds, state, sigma.expand(len(y)), options)
            else:
                out = [model(state, sigma.expand(len(y)), **extra_args)]
            return torch.stack([x0_to_velocity(y, denoised, t) for denoised in out])

        conditions = (None, None) if guidance and guidance.scale != 1 else (None,)
        combined = bool(guidance) and not branches
        field = Field(velocities, conditions, guidance or NO_GUIDANCE, combined=combined, scale=scale)
        start = x if flow else ve_to_flow(x, sigmas[0])
        end = solve(field, with_strength(network, strength), start, over(times), **more)
        return end if flow else end * (1 + sigmas[-1])

    return comfy.samplers.KSAMPLER(sample)


# --- the result is the core's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("anchors", [1, 2])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", models.NAMES)
def test_result_is_the_cores_on_the_same_velocities(name, cfg, anchors, model, sidenet):
    applied = models.with_sidenet(model(name), sidenet(CHANNELS[name], anchors=anchors))
    sigmas, calls = sigmas_of(applied), []
    ours = run(applied, name, sampler(), sigmas, cfg)
    theirs = run(applied, name, reference(sidenet.path, calls=calls), sigmas, cfg)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert len(calls) == 4
    without = run(applied, name, sampler(method="multistep"), sigmas, cfg)
    assert (ours - without).abs().max() > 100 * CLOSE["atol"], "the random SideNet must do something"


def grid_of(model, times):
    """A schedule's times as sigmas of a MODEL, scaled where its sampling starts below t = 1."""
    model_sampling = model.get_model_object("model_sampling")
    if hasattr(model_sampling, "log_sigmas"):
        top = torch.as_tensor(float(model_sampling.sigma_max), dtype=torch.float64)
        start = ve_sigma_to_time(top)
        return torch.cat([top[None], time_to_ve_sigma(start * torch.tensor(times[1:], dtype=torch.float64))]).float()
    return torch.tensor(times)


def smooth(z):
    """Noise whose neighbours are alike, as an inversion's may be."""
    return torch.nn.functional.interpolate(z.flatten(2).unflatten(2, z.shape[-2:])[..., ::2, ::2], z.shape[-2:])


@pytest.mark.parametrize("velocity", ["combined", "per_branch"])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_first_step_is_analytic_from_random_noise(name, velocity, model, tmp_path):
    """From other noise, and where a mask keeps a part, the model is called there: as many calls in all."""
    fitted, path = Schedule([1.0, 0.9, 0.6, 0.3, 0.0], analytic_first_step=True), tmp_path / "mean.safetensors"
    card = SideNetCard(velocity, (1.0, 10.0), schedules={3.0: {3: fitted}})
    net = models.make_sidenet(path, CHANNELS[name], card, anchors=2, data_mean_size=4)
    applied, branches = models.with_sidenet(model(name), net), velocity == "per_branch"
    guidance = Guidance(3.0) if branches else None
    plain = Schedule([1.0, 0.6, 0.3, 0.0])
    for z, schedule in ((models.noise(name), fitted), (smooth(models.noise(name)), plain)):
        calls = []
        ours = run(applied, name, sampler(), sigmas_of(applied, 3), z=z)
        solver = reference(path, 1.0, branches, guidance, calls=calls, over=lambda times, s=schedule: s)
        torch.testing.assert_close(ours, run(model(name), name, solver, torch.tensor(schedule.times), z=z), **CLOSE)
        assert len(calls) == 3


ANALYTIC = Schedule([1.0, 0.9, 0.6, 0.3, 0.0], analytic_first_step=True)
WEIGHTED = Schedule([1.0, 0.8, 0.4, 0.0], [[0.1] * (2 + row // 2 + 2 * (row % 2)) for row in range(5)])


@pytest.mark.parametrize(("fitted", "first"), [(ANALYTIC, 0), (ANALYTIC, 7), (WEIGHTED, 0)])
def test_inpainting_keeps_exactly_what_is_kept(fitted, first, model, tmp_path):
    """With a data mean that is far off, and with coefficients that leave a straight path; as Euler keeps it."""
    card = SideNetCard("combined", (1.0, 10.0), schedules={3.0: {3: fitted}})
    net = models.make_sidenet(tmp_path / "mean.safetensors", 16, card, anchors=2, data_mean_size=4)
    with torch.no_grad():
        net.network.data_mean.add_(first)
    applied = models.with_sidenet(model("sd3"), net)
    z, latent = models.noise("sd3"), models.noise("sd3", seed=4)
    mask = torch.zeros(1, 1, *z.shape[2:])
    mask[..., : z.shape[-1] // 2] = 1
    ends = [
        run(applied, "sd3", which, sigmas_of(applied, 3), z=z, latent=latent, noise_mask=mask)
        for which in (sampler(), comfy.samplers.ksampler("euler"))
    ]
    kept = slice(z.shape[-1] // 2, None)
    for end in ends:
        torch.testing.assert_close(end[..., kept], latent[..., kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("velocity", ["combined", "per_branch"])
@pytest.mark.parametrize("name", ["sd3", "wan", "sdxl"])
def test_conditional_only_calls_leave_the_negative_out(name, velocity, model, tmp_path, caplog):
    """As in the core, whatever the scheduler; with CFG changed by another node both branches are evaluated, in no more
    calls than steps, and the user is told."""
    grid, path = [1.0, 0.8, 0.5, 0.25, 0.0], tmp_path / "conditional.safetensors"
    rows = [[], [0.7, -0.2], [], [0.4, 0.3, 0.1, -0.2, 0.2]]
    fitted = Schedule(grid, cfg_coefficients=rows)
    card = SideNetCard(velocity, (1.0, 10.0), schedules={3.0: {3: fitted}})
    applied = models.with_sidenet(model(name), models.make_sidenet(path, CHANNELS[name], card, anchors=2))
    sigmas, evaluated = sigmas_of(applied, 3, "normal"), []
    network = model(name).model.diffusion_model
    hook = network.register_forward_hook(lambda module, inputs, output: evaluated.append(len(inputs[0])))
    try:
        ours = run(applied, name, sampler(), sigmas)
        assert sum(evaluated) == 2 + 1 + 2 + 1
        options, branches = {"guidance": Guidance(3.0)}, velocity == "per_branch"
        own = grid_of(applied, grid)
        theirs = reference(path, branches=branches, over=fitted.with_times, **options)
        torch.testing.assert_close(ours, run(model(name), name, theirs, own), **CLOSE)
        whole = run(model(name), name, reference(path, branches=branches, **options), own)
        assert (ours - whole).abs().max() > 100 * CLOSE["atol"]

        evaluated.clear()
        assert not run(applied, name, sampler(), sigmas, 1.0).isnan().any() and sum(evaluated) == 3
        evaluated.clear()
        changed = applied.clone()
        changed.set_model_sampler_post_cfg_function(lambda arguments: arguments["denoised"])
        run(changed, name, sampler(), sigmas)
        assert sum(evaluated) == 6 and WHOLE_CALLS in caplog.text
    finally:
        hook.remove()


def with_apg(model):
    return APG.execute(model, 0.0, 2.0, 0.5).result[0]  # with momentum: it remembers the last call


def with_own_evaluation(model):
    changed = model.clone()
    changed.set_model_sampler_calc_cond_batch_function(
        lambda arguments: comfy.samplers.calc_cond_batch(
            arguments["model"], arguments["conds"], arguments["input"], arguments["sigma"], arguments["model_options"]
        )
    )
    return changed


def with_wrapper(kind):
    def change(model):
        changed = model.clone()
        changed.add_wrapper(kind, lambda executor, *arguments, **named: executor(*arguments, **named))
        return changed

    return change


def with_patch_that_asks(model):
    """Adds half of the difference to the positive where it finds both branches in a batch."""
    changed = model.clone()

    def patch(apply, arguments):
        out = apply(arguments["input"], arguments["timestep"], **arguments["c"])
        if sorted(arguments["cond_or_uncond"]) == [0, 1]:
            positive, negative = (arguments["cond_or_uncond"].index(side) for side in (0, 1))
            out[positive] += 0.5 * (out[positive] - out[negative])
        return out

    changed.set_model_unet_function_wrapper(patch)
    return changed


def with_post_cfg(model):
    changed = model.clone()
    changed.set_model_sampler_post_cfg_function(lambda arguments: arguments["denoised"] * 0.9)
    return changed


def with_attention_patch(model):
    changed = model.clone()
    changed.set_model_patch(lambda *arguments: arguments[0], "attn1_patch")
    return changed


def reference_within(path, interval):
    """A sampler of the core's on what ComfyUI's model function returns, and on the positive alone outside."""

    def sample(model, x, sigmas, extra_args=None, **_):
        guider, options = model.inner_model, extra_args["model_options"]

        def velocities(y, t, count):
            sigma, (lo, hi) = t[0].expand(len(y)), interval
            if lo < t[0] <= hi:
                out = model(y, sigma, **extra_args)
            else:
                out = comfy.samplers.calc_cond_batch(guider.inner_model, [guider.conds["positive"]], y, sigma, options)[
                    0
                ]
            return x0_to_velocity(y, out, t)[None]

        return solve(Field(velocities), load_sidenet(path)[0], x, sigmas)

    return comfy.samplers.KSAMPLER(sample)


HOOKS = {
    "APG": with_apg,
    "own evaluation": with_own_evaluation,
    "post-CFG function": with_post_cfg,
    "attention patch": with_attention_patch,
    "PREDICT_NOISE wrapper": with_wrapper(WrappersMP.PREDICT_NOISE),
    "CALC_COND_BATCH wrapper": with_wrapper(WrappersMP.CALC_COND_BATCH),
    "APPLY_MODEL wrapper": with_wrapper(WrappersMP.APPLY_MODEL),
    "DIFFUSION_MODEL wrapper": with_wrapper(WrappersMP.DIFFUSION_MODEL),
    "model function wrapper": with_patch_that_asks,
}
CONDITIONAL_CALLS = [1.0, 0.8, 0.5, 0.25, 0.0], [[], [0.7, -0.2], [], [0.4, 0.3, 0.1, -0.2, 0.2]]
WHOLE_CALLS = "Positive and negative are evaluated at every call"


def sidenet_with_conditional_calls(path, velocity):
    """A SideNet with a schedule of four calls, two of them conditional-only; and its schedule."""
    fitted = Schedule(CONDITIONAL_CALLS[0], cfg_coefficients=CONDITIONAL_CALLS[1])
    card = SideNetCard(velocity, (1.0, 10.0), schedules={3.0: {3: fitted}})
    return models.make_sidenet(path, 16, card, anchors=2), fitted


@pytest.mark.parametrize("velocity", ["combined", "per_branch"])
@pytest.mark.parametrize("change", HOOKS.values(), ids=HOOKS)
def test_hooks_have_whole_calls_and_the_combined_velocity(change, velocity, model, tmp_path, caplog):
    path = tmp_path / "conditional.safetensors"
    net, _ = sidenet_with_conditional_calls(path, velocity)
    sigmas = BAScheduler.execute(models.with_sidenet(model("sd3"), net), 3).result[0]
    ours = run(models.with_sidenet(change(model("sd3")), net), "sd3", sampler(), sigmas)
    assert caplog.text.count(WHOLE_CALLS) == 1
    theirs = run(change(model("sd3")), "sd3", reference(path), sigmas)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    if change in (with_apg, with_patch_that_asks, with_post_cfg):  # the power of this test: they do act
        plain = run(model("sd3"), "sd3", reference(path), sigmas)
        assert (theirs - plain).abs().max() > 100 * CLOSE["atol"]


@pytest.mark.parametrize("velocity", ["combined", "per_branch"])
def test_a_sampling_function_of_another_pack_has_whole_calls(velocity, model, tmp_path, monkeypatch, caplog):
    """AnimateDiff-Evolved puts its own in ComfyUI's place; it never calls the hooks before CFG."""

    def animated(model, x, timestep, uncond, cond, cond_scale, model_options=None, seed=None):
        outs = comfy.samplers.calc_cond_batch(model, [cond, uncond], x, timestep, model_options or {})
        return outs[1] + (outs[0] - outs[1]) * cond_scale

    path = tmp_path / "conditional.safetensors"
    net, _ = sidenet_with_conditional_calls(path, velocity)
    applied, sigmas = models.with_sidenet(model("sd3"), net), torch.tensor([1.0, 0.8, 0.25, 0.0])
    monkeypatch.setattr(comfy.samplers, "sampling_function", animated)
    ours = run(applied, "sd3", sampler(), sigmas)
    assert WHOLE_CALLS in caplog.text
    spread_times = BAScheduler.execute(applied, 3).result[0]
    torch.testing.assert_close(ours, run(model("sd3"), "sd3", reference(path), spread_times), **CLOSE)


@pytest.mark.parametrize("velocity", ["combined", "per_branch"])
def test_a_function_around_the_model_that_hides_the_latent(velocity, model, tmp_path):
    """Detail Daemon hands a sampler a function with `inner_model` and `sigmas` alone; what a mask keeps stays exact."""
    path = tmp_path / "conditional.safetensors"
    net, _ = sidenet_with_conditional_calls(path, velocity)
    inner = sampler()

    def daemon(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def wrapped(x, sigma, **more):
            return model(x, sigma, **more)

        wrapped.inner_model, wrapped.sigmas = model.inner_model, model.sigmas
        return inner.sampler_function(
            wrapped, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **inner.extra_options
        )

    applied = models.with_sidenet(model("sd3"), net)
    z, latent = models.noise("sd3"), models.noise("sd3", seed=4)
    mask = torch.zeros(1, 1, *z.shape[2:])
    mask[..., : z.shape[-1] // 2] = 1
    end = run(
        applied, "sd3", comfy.samplers.KSAMPLER(daemon), sigmas_of(applied, 3), z=z, latent=latent, noise_mask=mask
    )
    kept = slice(z.shape[-1] // 2, None)
    torch.testing.assert_close(end[..., kept], latent[..., kept], rtol=1e-5, atol=1e-5)
    assert (
        end.isfinite().all() and run(applied, "sd3", comfy.samplers.KSAMPLER(daemon), sigmas_of(applied, 3)).std() > 0
    )


def test_a_negative_that_is_used_at_cfg_1_reaches_our_guiders(model):
    """NAG sets this option, so that distilled models have a negative."""
    changed = model("sd3").clone()
    changed.set_model_sampler_post_cfg_function(lambda a: a["denoised"], disable_cfg1_optimization=True)
    for which, expected in ((model("sd3"), {"positive"}), (changed, {"positive", "negative"})):
        guider = guider_for(which, models.text("sd3", 1), models.text("sd3", 2), 1.0)
        assert set(guider.original_conds) == expected


def with_lora(model):
    changed = model.clone()
    changed.add_patches(some_patch(changed))
    return changed


def with_compilation(model):
    changed = model.clone()
    set_torch_compile_wrapper(changed, backend="eager")
    return changed


def with_context_windows(model):
    return with_wrapper(WrappersMP.PREPARE_SAMPLING)(model)


@pytest.mark.parametrize("change", [with_lora, with_compilation, with_context_windows])
def test_weights_compilation_and_preparation_are_no_hooks(change, model, tmp_path, caplog):
    path = tmp_path / "conditional.safetensors"
    net, fitted = sidenet_with_conditional_calls(path, "combined")
    applied = models.with_sidenet(change(model("sd3")), net)
    sigmas = BAScheduler.execute(applied, 3).result[0]
    ours = run(applied, "sd3", sampler(), sigmas)
    assert WHOLE_CALLS not in caplog.text
    solver = reference(path, guidance=Guidance(3.0), over=fitted.with_times)
    theirs = run(change(model("sd3")), "sd3", solver, torch.tensor(fitted.times))
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("velocity", ["combined", "per_branch"])
@pytest.mark.parametrize("change", [with_apg, with_patch_that_asks])
def test_cfg_range_leaves_what_acts_before_cfg_no_zeros(change, velocity, model, sidenet):
    """Outside the range the positive is taken as the model gives it."""
    applied = models.with_sidenet(change(model("sd3")), sidenet(16, velocity))
    sigmas, interval = sigmas_of(applied), (0.0, top_of_cfg(applied, 0.4))
    ours = run(applied, "sd3", sampler(start_percent=0.4), sigmas)
    solver = reference_within(sidenet.path, interval)
    torch.testing.assert_close(ours, run(change(model("sd3")), "sd3", solver, sigmas), **CLOSE)


def top_of_cfg(model, percent):
    """The flow time up to which CFG applies from a share of the sampling on."""
    model_sampling = model.get_model_object("model_sampling")
    sigma = model_sampling.percent_to_sigma(percent)
    return sigma if float(model_sampling.sigma_max) <= 1 else sigma / (1 + sigma)


@pytest.mark.parametrize("name", models.NAMES)
def test_cfg_range_is_comfyuis_percent(name, model):
    model_sampling = model(name).get_model_object("model_sampling")
    assert flow_interval(model_sampling, 0.0, 1.0) == (0.0, 1.0)
    lo, hi = flow_interval(model_sampling, 0.3, 0.6)
    assert (lo, hi) == pytest.approx((top_of_cfg(model(name), 0.6), top_of_cfg(model(name), 0.3))) and 0 < lo < hi < 1
    for start, end in ((-0.1, 1.0), (0.6, 0.3), (0.0, 1.1)):
        with pytest.raises(ValueError, match="start_percent and end_percent must lie between 0 and 1"):
            Options(start_percent=start, end_percent=end)


@pytest.mark.parametrize("velocity", ["combined", "per_branch"])
@pytest.mark.parametrize("name", ["flux", "wan", "sdxl"])
def test_step_weights_act_on_the_grid_that_they_were_fitted_on(name, velocity, model, tmp_path):
    """As in the core; and not on other grids, with part of the SideNet's strength or another quadrature."""
    grid, path = [1.0, 0.8, 0.5, 0.25, 0.0], tmp_path / "weighted.safetensors"
    generator = torch.Generator().manual_seed(3)
    rows = [(0.2 * torch.randn((2 + row // 2 + 2 * (row % 2)), generator=generator)).tolist() for row in range(7)]
    fitted = Schedule(grid, rows)
    card = SideNetCard(velocity, (1.0, 10.0), schedules={3.0: {4: fitted}})
    net = models.make_sidenet(path, CHANNELS[name], card, anchors=2)
    applied, branches = models.with_sidenet(model(name), net), velocity == "per_branch"
    guidance = Guidance(3.0) if branches else None
    sigmas = BAScheduler.execute(applied, 4).result[0]
    ours = run(applied, name, sampler(), sigmas)
    solver = reference(path, 1.0, branches, guidance, over=fitted.with_times)
    torch.testing.assert_close(ours, run(model(name), name, solver, sigmas), **CLOSE)
    plain = reference(path, 1.0, branches, guidance)
    assert (ours - run(model(name), name, plain, sigmas)).abs().max() > 100 * CLOSE["atol"]

    # Whatever the scheduler and the strength; not at sigmas that are to be followed, nor with another quadrature.
    others = sigmas_of(applied)
    fits, followed = {"over": lambda times: fitted.with_times(times)}, {}
    cases = (
        (others, {}, 1.0, sigmas, fits),
        (sigmas_of(applied, 4, "beta"), {}, 0.5, sigmas, fits),
        (others, {"follow_sigmas": True}, 1.0, others, followed),
        (others, {"rule": "lobatto3"}, 1.0, others, {"rule": "lobatto3"}),
    )
    for asked, options, strength, sampled, expected in cases:
        found = run(models.with_sidenet(model(name), net, strength), name, sampler(**options), asked)
        solver = reference(path, strength, branches, guidance, **expected)
        torch.testing.assert_close(found, run(model(name), name, solver, sampled), **CLOSE)


@pytest.mark.parametrize("steps", [2, 4, 5, 7, 9, 13])
def test_no_number_of_steps_makes_more_calls(steps, model, tmp_path):
    """Of one SideNet with schedules for 3 (two calls conditional-only, the first step analytic) and 6."""
    rows = [[], [0.5, 0.1], [], [0.1, 0.1, 0.1, 0.1, 0.1]]
    small = Schedule([1.0, 0.93, 0.8, 0.5, 0.25, 0.0], cfg_coefficients=rows, analytic_first_step=True)
    card = SideNetCard(schedules={3.0: {3: small, 6: Schedule([1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0])}})
    net = models.make_sidenet(tmp_path / "two.safetensors", 16, card, anchors=2, data_mean_size=4)
    applied, evaluated, seen = models.with_sidenet(model("sd3"), net), [], []
    hook = applied.model.diffusion_model.register_forward_hook(lambda m, i, output: evaluated.append(len(output)))
    try:
        run(applied, "sd3", sampler(), sigmas_of(applied, steps), callback=lambda i, x0, x, n: seen.append((i, n)))
    finally:
        hook.remove()
    assert sum(evaluated) <= 2 * steps
    assert [n for _, n in seen] == [steps] * len(seen) and seen[0][0] == 0 and seen[-1][0] == steps - 1
    assert [i for i, _ in seen] == sorted(i for i, _ in seen)


def test_parts_are_sampled_on_their_share_of_the_fitted_times(model, tmp_path):
    """SplitSigmas: as many calls as the part has steps, at times between the fitted ones, without coefficients."""
    grid = [1.0, 0.9, 0.75, 0.5, 0.2, 0.0]
    rows = [[0.1] * (2 + row // 2 + 2 * (row % 2)) for row in range(9)]
    card = SideNetCard(schedules={3.0: {5: Schedule(grid, rows)}})
    net = models.make_sidenet(tmp_path / "part.safetensors", 16, card, anchors=2)
    applied, times = models.with_sidenet(model("sd3"), net), []
    applied.set_model_sampler_post_cfg_function(lambda a: times.append(float(a["sigma"][0])) or a["denoised"])
    sigmas = torch.tensor([1.0, 0.97, 0.75, 0.3, 0.1, 0.0])
    x = run(applied, "sd3", sampler(), sigmas[:3])
    run(applied, "sd3", sampler(), sigmas[2:], z=torch.zeros_like(x), latent=x)
    assert times == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.2], abs=1e-4)


def test_one_line_says_what_is_done(model, tmp_path, caplog):
    card = SideNetCard(schedules={3.0: {3: Schedule([1.0, 0.9, 0.6, 0.3, 0.0], analytic_first_step=True)}})
    net = models.make_sidenet(tmp_path / "line.safetensors", 16, card, anchors=2, data_mean_size=4)
    applied = models.with_sidenet(model("sd3"), net, 0.8)
    cases = (
        (applied, sigmas_of(applied, 3), {}, ("3 model calls", "CFG 3", "strength 0.8", "plain steps")),
        (applied, sigmas_of(applied, 3), {"z": smooth(models.noise("sd3"))}, ("the noise is not random",)),
        (applied, sigmas_of(applied, 6)[2:], {}, ("4 model calls", "part of the path")),
        (model("sd3"), sigmas_of(applied, 3), {}, ("3 model calls", "multistep", "without a SideNet")),
    )
    for where, sigmas, more, words in cases:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run(where, "sd3", sampler(), sigmas, **more)
        lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("BA-solver:") and r.levelno == 20]
        assert len(lines) == 1 and all(word in lines[0] for word in words), lines


def test_others_see_the_sigmas_that_are_sampled(model, tmp_path):
    """`sample_sigmas`, which context windows look up."""
    card = SideNetCard(schedules={3.0: {4: Schedule([1.0, 0.8, 0.5, 0.25, 0.0])}})
    net = models.make_sidenet(tmp_path / "sigmas.safetensors", 16, card, anchors=2)
    applied, seen = models.with_sidenet(model("sd3"), net), []

    def look(arguments):
        sampled = arguments["model_options"]["transformer_options"]["sample_sigmas"]
        seen.append((sampled.tolist(), float(arguments["sigma"][0])))
        return arguments["denoised"]

    applied.set_model_sampler_post_cfg_function(look)
    run(applied, "sd3", sampler(), sigmas_of(applied, 4))
    for number, (sampled, sigma) in enumerate(seen):
        assert sampled == pytest.approx([1.0, 0.8, 0.5, 0.25, 0.0]) and sigma == pytest.approx(sampled[number])


def test_a_note_is_shown_once_however_many_tiles_a_node_samples(caplog, monkeypatch):
    shown = []
    monkeypatch.setattr(notify, "_show_on_node", shown.append)
    with caplog.at_level(logging.WARNING):
        for prompt in ("a", "b"):
            with CurrentNodeContext(prompt, "7"):
                for _ in range(16):
                    notify.warn("it is less accurate.")
    assert caplog.text.count("it is less accurate.") == 2 and shown == ["Note: it is less accurate."] * 2


def test_a_largest_sigma_that_was_rounded_up_is_1(model, sidenet):
    applied = models.with_sidenet(model("sd3"), sidenet(16))
    sigmas = sigmas_of(applied)
    rounded = sigmas.clone()
    rounded[0] = 1.0000001
    torch.testing.assert_close(run(applied, "sd3", sampler(), rounded), run(applied, "sd3", sampler(), sigmas), **CLOSE)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", models.NAMES)
def test_branch_sidenets_see_the_branches(name, cfg, model, sidenet):
    applied = models.with_sidenet(model(name), sidenet(CHANNELS[name], "per_branch"))
    sigmas = sigmas_of(applied)
    ours = run(applied, name, sampler(start_percent=0.4), sigmas, cfg)
    guidance = Guidance(cfg, (0.0, top_of_cfg(applied, 0.4)))
    theirs = run(applied, name, reference(sidenet.path, branches=True, guidance=guidance), sigmas, cfg)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    if cfg > 1:
        guided = run(applied, name, reference(sidenet.path), sigmas, cfg)
        assert (ours - guided).abs().max() > 100 * CLOSE["atol"], "branch and guided mode must differ"


@pytest.mark.parametrize("name", models.NAMES)
def test_multistep_and_strength_zero_are_the_cores_baseline(name, model, sidenet):
    for anchors in (1, 2):
        zero = models.with_sidenet(model(name), sidenet(CHANNELS[name], anchors=anchors), 0.0)
        sigmas = sigmas_of(zero)
        baseline = run(zero, name, reference(None), sigmas)
        torch.testing.assert_close(run(zero, name, sampler(), sigmas), baseline, **CLOSE)
        bare = run(model(name), name, sampler(method="multistep"), sigmas)
        torch.testing.assert_close(bare, baseline, **CLOSE)
        half = models.with_sidenet(model(name), sidenet(CHANNELS[name], anchors=anchors), 0.5)
        torch.testing.assert_close(
            run(half, name, sampler(), sigmas), run(half, name, reference(sidenet.path, 0.5), sigmas), **CLOSE
        )


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_the_cores(method, model, sidenet):
    applied = models.with_sidenet(model("sd3"), sidenet(16))
    sigmas = sigmas_of(applied)
    path, core = (None, "bi_anchor") if method == "multistep" else (sidenet.path, method)
    ours = run(applied, "sd3", sampler(method=method), sigmas)
    torch.testing.assert_close(ours, run(applied, "sd3", reference(path, method=core), sigmas), **CLOSE)


# --- guiders ------------------------------------------------------------------------------------------------------


def dual(model, nested):
    guider = Guider_DualCFG(model)
    guider.set_conds(*(models.text("sd3", seed) for seed in (1, 2, 3)))
    guider.set_cfg(3.0, 2.0, nested=nested)
    return guider


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("velocity", ["combined", "per_branch"])
def test_dual_guider_is_sampled_on_its_guided_velocity(velocity, nested, model, sidenet, caplog):
    applied = models.with_sidenet(model("sd3"), sidenet(16, velocity))
    sigmas = sigmas_of(applied)
    with caplog.at_level(logging.WARNING):
        ours = run(applied, "sd3", sampler(), sigmas, guider=dual(applied, nested))
    assert (WHOLE_CALLS in caplog.text) == (velocity == "per_branch")
    theirs = run(applied, "sd3", reference(sidenet.path), sigmas, guider=dual(applied, nested))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    with pytest.raises(ValueError, match="start_percent and end_percent work with"):
        run(applied, "sd3", sampler(start_percent=0.4), sigmas, guider=dual(applied, nested))


def test_basic_guider_with_flux_guidance(model, sidenet):
    applied = models.with_sidenet(model("flux"), sidenet(16))
    sigmas, outcomes = sigmas_of(applied), []
    for guidance in (1.0, 6.0):
        guider = Guider_Basic(applied)
        guider.set_conds([[c, {**d, "guidance": guidance}] for c, d in models.text("flux", 1)])
        ours = run(applied, "flux", sampler(), sigmas, guider=guider)
        torch.testing.assert_close(ours, run(applied, "flux", reference(sidenet.path), sigmas, guider=guider), **CLOSE)
        outcomes.append(ours)
    assert (outcomes[0] - outcomes[1]).abs().max() > 0.01, "FLUX guidance must reach the model"


def flux_guided(model, guidance):
    """BasicGuider behind FluxGuidance; without it where guidance is None."""
    guider, told = Guider_Basic(model), {} if guidance is None else {"guidance": guidance}
    guider.set_conds([[c, {**d, **told}] for c, d in models.text("flux", 1)])
    return guider


@pytest.mark.parametrize(("name", "given", "told"), [("sd3", 3.0, 3.0), ("flux", 6.0, 6.0), ("flux", None, 3.5)])
def test_sidenets_that_take_the_guidance_are_told_it(name, given, told, model, sidenet):
    """CFG, or what FluxGuidance says to a model that takes its guidance as an input, or that model's default."""
    applied = models.with_sidenet(model(name), sidenet(16, cfg_input=True))
    sigmas, how = sigmas_of(applied), {"cfg": given}
    if name == "flux":
        how = {"guider": flux_guided(applied, given)}
    ours = run(applied, name, sampler(), sigmas, **how)
    torch.testing.assert_close(ours, run(applied, name, reference(sidenet.path, scale=told), sigmas, **how), **CLOSE)
    other = run(applied, name, reference(sidenet.path, scale=1.0), sigmas, **how)
    assert (ours - other).abs().max() > 10 * CLOSE["atol"], "the SideNet must heed what it is told"


def test_cfg_range_leaves_the_negative_out_outside_it(model, sidenet):
    applied = models.with_sidenet(model("sd3"), sidenet(16))
    sigmas, evaluated = sigmas_of(applied), []
    network = applied.model.diffusion_model
    hook = network.register_forward_hook(lambda module, inputs, output: evaluated.append(len(inputs[0])))
    try:
        run(applied, "sd3", sampler(start_percent=0.4, end_percent=0.7), sigmas)
    finally:
        hook.remove()
    top, low = (top_of_cfg(applied, percent) for percent in (0.4, 0.7))
    assert evaluated == [2 if low < sigma <= top else 1 for sigma in sigmas[:-1]] == [1, 1, 2, 1]


# --- what people do with samplers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.NAMES)
def test_batch_equals_single_runs(name, model, sidenet):
    applied = models.with_sidenet(model(name), sidenet(CHANNELS[name]))
    z, sigmas = models.noise(name, 3), sigmas_of(applied)
    together = run(applied, name, sampler(), sigmas, z=z)
    for i in range(3):
        alone = run(applied, name, sampler(), sigmas, z=z[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, **CLOSE)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("velocity", ["combined", "per_branch"])
@pytest.mark.parametrize("name", ["flux", "wan", "sdxl"])
def test_mask_keeps_the_rest_of_the_image(name, velocity, soft, model, sidenet):
    applied = models.with_sidenet(model(name), sidenet(CHANNELS[name], velocity))
    z, sigmas = models.noise(name, 2), sigmas_of(applied)
    latent = models.noise(name, 2, seed=9) * 0.5
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    if soft:
        mask[..., 3] = 0.5
    ours = run(applied, name, sampler(), sigmas, z=z, latent=latent, noise_mask=mask)
    kept, drawn = (ours - latent)[..., 4:], (ours - latent)[..., :3]
    assert kept.abs().max() < 1e-3
    assert drawn.abs().mean() > 0.05
    plain = models.with_sidenet(model(name), applied_sidenet(applied), 0.0)
    baseline = run(plain, name, sampler(), sigmas, z=z, latent=latent, noise_mask=mask)
    assert (ours - baseline)[..., :3].abs().max() > 0.01, "the SideNet must act inside the mask"


def test_unblended_sidenet_predictions_would_spoil_the_kept_part(model, sidenet, monkeypatch):
    """The power of the test above: without blending, the kept part changes."""
    applied = models.with_sidenet(model("flux"), sidenet(16))
    monkeypatch.setattr("ba_solver.nodes.sampling.sampler.predictor_of", lambda caller, sidenet: sidenet.network)
    z, latent = models.noise("flux"), models.noise("flux", seed=9)
    mask = torch.zeros(1, 1, 8, 8)
    ours = run(applied, "flux", sampler(), sigmas_of(applied), z=z, latent=latent, noise_mask=mask)
    assert (ours - latent).abs().max() > 1e-2


def test_mask_that_changes_with_sigma(model, sidenet):
    """Differential diffusion's hook, which draws everything at sigma 0: no backbone call is there, and no mask."""
    applied = models.with_sidenet(model("flux"), sidenet(16))
    asked = []

    def change(sigma, mask, extra_options):
        asked.append(float(sigma[0]))
        return (mask >= sigma[0]).to(mask)

    applied.set_model_denoise_mask_function(change)
    z, latent = models.noise("flux"), models.noise("flux", seed=9)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    ours = run(applied, "flux", sampler(), sigmas_of(applied), z=z, latent=latent, noise_mask=mask)
    assert (ours - latent)[..., 5:].abs().max() < 1e-3 < (ours - latent)[..., :4].abs().mean()
    assert min(asked) > 0


def some_patch(model):
    key = next(
        k
        for k in model.model.state_dict()
        if k.endswith("weight") and "block" in k and model.model.state_dict()[k].ndim == 2
    )
    return {
        key: (
            "diff",
            (torch.randn(model.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(3)) * 0.2,),
        )
    }


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_lora_patches_act_before_or_after_the_sidenet(name, model, sidenet):
    net = sidenet(CHANNELS[name])
    sigmas = sigmas_of(model(name))
    unpatched = run(models.with_sidenet(model(name), net), name, sampler(), sigmas)
    first, second = model(name).clone(), models.with_sidenet(model(name), net)
    first.add_patches(some_patch(first))
    first = models.with_sidenet(first, net)
    second.add_patches(some_patch(second))
    outcomes = [run(m, name, sampler(), sigmas) for m in (first, second)]
    torch.testing.assert_close(*outcomes, **CLOSE)
    torch.testing.assert_close(outcomes[0], run(first, name, reference(sidenet.path), sigmas), **CLOSE)
    assert (outcomes[0] - unpatched).abs().max() > 0.01
    again = run(models.with_sidenet(model(name), net), name, sampler(), sigmas)
    torch.testing.assert_close(again, unpatched, **CLOSE)


class ControlStub(comfy.controlnet.ControlBase):
    """A control that adds a constant to the middle of the network."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        middle = torch.full((x_noisy.shape[0], 128, x_noisy.shape[2] // 2, x_noisy.shape[3] // 2), 0.5)
        return {"middle": [middle * self.strength], "input": [], "output": []}

    def copy(self):
        made = ControlStub()
        self.copy_to(made)
        return made

    def get_models(self):
        return []


@pytest.mark.parametrize("velocity", ["combined", "per_branch"])
def test_controlnet_acts(velocity, model, sidenet):
    applied = models.with_sidenet(model("sdxl"), sidenet(4, velocity))
    sigmas, z, latent = sigmas_of(applied), models.noise("sdxl"), torch.zeros(1, 4, 8, 8)
    positive = [
        [c, {**d, "control": ControlStub(), "control_apply_to_uncond": True}] for c, d in models.text("sdxl", 1)
    ]
    negative = models.text("sdxl", 2)
    ours = comfy.sample.sample_custom(applied, z, 3.0, sampler(), sigmas, positive, negative, latent)
    check = reference(sidenet.path, branches=velocity == "per_branch", guidance=Guidance(3.0))
    theirs = comfy.sample.sample_custom(applied, z, 3.0, check, sigmas, positive, negative, latent)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert (ours - run(applied, "sdxl", sampler(), sigmas)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_area_conditioning_acts(name, model, sidenet):
    applied = models.with_sidenet(model(name), sidenet(CHANNELS[name], "per_branch"))
    sigmas, z = sigmas_of(applied), models.noise(name)
    left = [[c, {**d, "area": (8, 4, 0, 0), "strength": 1.0}] for c, d in models.text(name, 5)]
    arguments = (sigmas, models.text(name, 1) + left, models.text(name, 2), torch.zeros_like(z))
    ours = comfy.sample.sample_custom(applied, z, 3.0, sampler(), *arguments)
    check = reference(sidenet.path, branches=True, guidance=Guidance(3.0))
    torch.testing.assert_close(ours, comfy.sample.sample_custom(applied, z, 3.0, check, *arguments), **CLOSE)


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_partial_sigmas_and_two_samplers_in_a_row(name, model, sidenet):
    """Sigmas that end above zero and start below the top, as KSampler (Advanced) and SplitSigmas make them."""
    applied = models.with_sidenet(model(name), sidenet(CHANNELS[name]))
    sigmas, z = sigmas_of(applied, 6), models.noise(name)
    outcomes = []
    for solver in (sampler(), reference(sidenet.path)):
        first = run(applied, name, solver, sigmas[:4], z=z)
        outcomes.append(run(applied, name, solver, sigmas[3:], z=torch.zeros_like(z), latent=first))
    torch.testing.assert_close(*outcomes, **CLOSE)
    assert outcomes[0].isfinite().all()
    euler = run(applied, name, comfy.samplers.ksampler("euler"), sigmas[:4], z=z)
    assert (first - euler).abs().mean() < euler.abs().mean(), "the leftover noise is scaled as ComfyUI's own"


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_ksampler_takes_every_scheduler_denoise_and_step_range(name, scheduler, model, sidenet):
    applied = models.with_sidenet(model(name), sidenet(CHANNELS[name]))
    z, latent = models.noise(name), models.noise(name, seed=4)
    parts = {"denoise": 0.5}, {"start_step": 2, "last_step": 4, "force_full_denoise": True}, {"last_step": 3}
    for part in parts:
        given = (models.text(name, 1), models.text(name, 2), latent)
        out = comfy.sample.sample(applied, z, 6, 3.0, "ba_solver", scheduler, *given, **part)
        assert out.isfinite().all() and out.std() > 0.01


def test_ksampler_equals_the_sampler_node(model, sidenet):
    applied = models.with_sidenet(model("sd3"), sidenet(16))
    z, texts = models.noise("sd3"), (models.text("sd3", 1), models.text("sd3", 2))
    ours = comfy.sample.sample(applied, z, 4, 3.0, "ba_solver", "simple", *texts, torch.zeros_like(z))
    torch.testing.assert_close(
        ours, run(applied, "sd3", BASampler.execute("bi_anchor").result[0], sigmas_of(applied), z=z), **CLOSE
    )


def test_ksampler_without_a_sidenet_is_the_multistep_method(model):
    z, texts = models.noise("sd3"), (models.text("sd3", 1), models.text("sd3", 2))
    ours = comfy.sample.sample(model("sd3"), z, 4, 3.0, "ba_solver", "simple", *texts, torch.zeros_like(z))
    theirs = run(model("sd3"), "sd3", sampler(method="multistep"), sigmas_of(model("sd3")), z=z)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", ["wan", "sdxl"])
def test_callback_sees_every_step_as_of_other_samplers(name, model, sidenet):
    applied = models.with_sidenet(model(name), sidenet(CHANNELS[name]))
    seen = {"ba": [], "euler": []}

    def watch(who):
        return lambda step, x0, x, total: seen[who].append((step, total, x0.clone(), x.clone()))

    sigmas = sigmas_of(applied)
    run(applied, name, sampler(), sigmas, callback=watch("ba"))
    run(applied, name, comfy.samplers.ksampler("euler"), sigmas, callback=watch("euler"))
    assert [s[:2] for s in seen["ba"]] == [s[:2] for s in seen["euler"]] == [(i, 4) for i in range(4)]
    # The first step starts from the same state and sees the same image.
    torch.testing.assert_close(seen["ba"][0][2], seen["euler"][0][2], **CLOSE)
    torch.testing.assert_close(seen["ba"][0][3], seen["euler"][0][3], **CLOSE)


class AcrossTheDevice:
    """ComfyUI's model on the host, called with states of a `CountedDevice`."""

    def __init__(self, model, device):
        self.model, self.device = model, device

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, x, sigma, **extra):
        return self.device.put(self.model(x.held.clone(), sigma.held.clone(), **extra))


def transfers_in(sample, applied, steps, **options):
    """To the host and to the device, in a sampling by a function of k-diffusion's kind, with a callback."""
    found = []

    def counted(model, x, sigmas, extra_args=None, callback=None, disable=None):
        network = applied_sidenet(applied).network
        held = [(part, dict(part._parameters), part.__dict__.get("table")) for part in network.modules()]
        try:
            with CountedDevice() as device:
                device.put_module(network)
                given = AcrossTheDevice(model, device), device.put(x), device.put(sigmas)
                end = sample(*given, extra_args=extra_args, callback=lambda values: values["denoised"] * 2, **options)
        finally:
            for part, parameters, table in held:
                part._parameters.update(parameters)
                part.__dict__["table"] = table
        found.append((device.to_host, device.to_device))
        return end.held

    # A denoise below 1: the first step is a model call, whatever the SideNet knows.
    run(applied, "sd3", comfy.samplers.KSAMPLER(counted), sigmas_of(applied, steps)[1:])
    return found[0]


@pytest.mark.parametrize(
    "options", [{}, {"method": "multistep"}, {"method": "single_anchor"}, {"start_percent": 0.4}], ids=str
)
def test_a_step_waits_for_the_device_no_more_often_than_eulers(options, model, sidenet, monkeypatch):
    """Model call and callback included; what is sent before the first step and read after the last does not count."""
    free, host = comfy.model_management.get_free_memory, torch.device("cpu")
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda _, *rest, **named: free(host, *rest, **named))
    applied = models.with_sidenet(model("sd3"), sidenet(16, anchors=2))
    ours = [transfers_in(sample_ba_solver, applied, n, options=Options(**options)) for n in (4, 8)]
    eulers = [transfers_in(sample_euler, applied, n) for n in (4, 8)]
    for few, many, eulers_few, eulers_many in zip(*ours, *eulers, strict=True):
        assert many - few <= eulers_many - eulers_few, (ours, eulers)


def test_interruption_leaves_the_next_run_clean(model, sidenet):
    applied = models.with_sidenet(model("flux"), sidenet(16, "per_branch"))
    sigmas = sigmas_of(applied)
    expected = run(applied, "flux", sampler(start_percent=0.4), sigmas)

    def stop(step, x0, x, total):
        if step == 1:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(applied, "flux", sampler(start_percent=0.4), sigmas, callback=stop)
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(applied, "flux", sampler(), sigmas)
    torch.testing.assert_close(run(applied, "flux", sampler(start_percent=0.4), sigmas), expected, **CLOSE)


def test_same_graph_twice_and_in_another_resolution(model, sidenet):
    applied = models.with_sidenet(model("flux"), sidenet(16, patch_size=4))
    sigmas = sigmas_of(applied)
    first = run(applied, "flux", sampler(), sigmas)
    for latent in ((16, 10, 6), (16, 7, 9)):
        z = models.noise("flux", latent=latent)
        ours = run(applied, "flux", sampler(), sigmas, z=z)
        torch.testing.assert_close(ours, run(applied, "flux", reference(sidenet.path), sigmas, z=z), **CLOSE)
    torch.testing.assert_close(run(applied, "flux", sampler(), sigmas), first, **CLOSE)


# --- the MODEL ------------------------------------------------------------------------------------------------------


def traces(model):
    return {
        "additional": {k: len(v) for k, v in model.additional_models.items()},
        "attachments": sorted(model.attachments),
        "options": {k: v for k, v in model.model_options.items() if k != "transformer_options"},
        "transformer_options": dict(model.model_options.get("transformer_options", {})),
        "wrappers": dict(model.wrappers),
        "callbacks": {k: {i: len(c) for i, c in v.items()} for k, v in model.callbacks.items()},
        "patches": len(model.patches),
        "modules": [n for n, _ in model.model.named_modules()],
    }


def test_applying_and_sampling_leave_no_trace(model, sidenet):
    bare = model("sd3")
    before, sigmas = traces(bare), sigmas_of(bare)
    euler = run(bare, "sd3", comfy.samplers.ksampler("euler"), sigmas)
    applied = models.with_sidenet(bare, sidenet(16, "per_branch"))
    kept = traces(applied)
    run(applied, "sd3", sampler(start_percent=0.4), sigmas)
    assert traces(bare) == before and applied_sidenet(bare) is None
    assert traces(applied) == kept
    torch.testing.assert_close(run(bare, "sd3", comfy.samplers.ksampler("euler"), sigmas), euler, **CLOSE)
    torch.testing.assert_close(run(applied, "sd3", comfy.samplers.ksampler("euler"), sigmas), euler, **CLOSE)


def test_clones_keep_the_sidenet_and_replacing_it_replaces(model, sidenet):
    applied = models.with_sidenet(model("sd3"), sidenet(16), 0.5)
    clone = applied.clone().clone()
    assert applied_sidenet(clone).strength == 0.5
    sigmas = sigmas_of(applied)
    torch.testing.assert_close(run(clone, "sd3", sampler(), sigmas), run(applied, "sd3", sampler(), sigmas), **CLOSE)
    other = models.with_sidenet(clone, sidenet(16, seed=5))
    assert applied_sidenet(other).strength == 1 and applied_sidenet(clone).strength == 0.5


def test_merged_models_are_sampled(model, sidenet):
    applied = models.with_sidenet(model("sd3"), sidenet(16))
    with torch.inference_mode(False):
        other = models.make_model("sd3", seed=8)
    merged = applied.clone()
    for key, patch in other.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patch}, 0.5, 0.5)
    sigmas = sigmas_of(applied)
    ours = run(merged, "sd3", sampler(), sigmas)
    torch.testing.assert_close(ours, run(merged, "sd3", reference(sidenet.path), sigmas), **CLOSE)
    assert (ours - run(applied, "sd3", sampler(), sigmas)).abs().max() > 0.01


def test_comfyui_loads_the_sidenet_with_the_model(model, sidenet):
    applied = models.with_sidenet(model("sd3"), sidenet(16))
    seen = []
    run(applied, "sd3", sampler(), sigmas_of(applied), callback=lambda *_: seen.append(
        {type(m.model.model).__name__ for m in comfy.model_management.current_loaded_models if m.model is not None}
    ))  # fmt: skip
    assert {"SD3", "SideNet"} <= seen[0]


def test_partly_loaded_sidenet(model, sidenet):
    """What --lowvram does to a network: most layers stay where they are and are cast as they are used."""
    applied = models.with_sidenet(model("sd3"), sidenet(16))
    sigmas = sigmas_of(applied)
    whole = run(applied, "sd3", sampler(), sigmas)
    patcher = applied_sidenet(applied).patcher
    patcher.unpatch_model()
    patcher.load(patcher.load_device, lowvram_model_memory=1000)
    torch.testing.assert_close(run(applied, "sd3", sampler(), sigmas), whole, **CLOSE)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_sidenets(dtype, tolerance, model, sidenet, monkeypatch):
    from ba_solver.nodes import folders

    whole = sidenet(16, num_classes=0)
    monkeypatch.setattr(folders.ModelFolder, "path", lambda self, name: sidenet.path)
    half = applied_sidenet(ApplySideNet.execute(model("sd3"), "random", weight_dtype=dtype).result[0])
    assert half.network.output_conv.weight.dtype == getattr(torch, dtype)
    sigmas = sigmas_of(model("sd3"))
    outcomes = [run(models.with_sidenet(model("sd3"), net), "sd3", sampler(), sigmas) for net in (whole, half)]
    difference = (outcomes[0] - outcomes[1]).abs().max() / outcomes[0].abs().max()
    assert 0 < difference < tolerance


def test_sidenet_memory_is_bounded_without_changing_the_result(model, sidenet, monkeypatch):
    applied = models.with_sidenet(model("sd3"), sidenet(16))
    z, sigmas = models.noise("sd3", 2), sigmas_of(applied)
    whole = run(applied, "sd3", sampler(), sigmas, z=z)
    monkeypatch.setattr("ba_solver.nodes.sampling.sampler.sidenet_chunk", lambda sidenet, x: 2)
    torch.testing.assert_close(run(applied, "sd3", sampler(), sigmas, z=z), whole, **CLOSE)


# --- BA-Solver Scheduler ------------------------------------------------------------------------------------------


def test_scheduler_counts_calls_and_uses_the_learned_grid(model, tmp_path):
    grid = [1.0, 0.9, 0.7, 0.4, 0.0]
    card = SideNetCard(schedules={1.0: {4: Schedule(grid)}})
    for name in ("sd3", "sdxl"):
        net = models.make_sidenet(tmp_path / "grid.safetensors", CHANNELS[name], card)
        applied = models.with_sidenet(model(name), net)
        learned = BAScheduler.execute(applied, 4).result[0]
        top = 1.0 if name == "sd3" else float(applied.get_model_object("model_sampling").sigma_max)
        highest = 1.0 if name == "sd3" else top / (1 + top)  # where the model's path begins in flow time
        expected = [t if name == "sd3" else t * highest / (1 - t * highest) for t in grid]
        assert learned.tolist() == pytest.approx(expected, rel=1e-5)
        for calls in (1, 5, 9):
            sigmas = BAScheduler.execute(applied, calls).result[0]
            assert len(sigmas) == calls + 1 and sigmas[0] == pytest.approx(top) and sigmas[-1] == 0
            assert (sigmas.diff() < 0).all()
        own = BAScheduler.execute(applied, 4, schedule="model default").result[0]
        assert torch.equal(own, sigmas_of(applied, 4))
        assert torch.equal(BAScheduler.execute(model(name), 4).result[0], own)
        part = BAScheduler.execute(applied, 4, 0.5).result[0]
        assert len(part) == 5 and 0 < part[0] < top
        assert len(BAScheduler.execute(applied, 4, 0.0).result[0]) == 0


def test_scheduler_gives_a_sigma_for_every_step(model, tmp_path):
    """The end of an analytic first step is none of the steps' own; the sampler adds it."""
    card = SideNetCard(schedules={1.0: {4: Schedule([1.0, 0.94, 0.8, 0.6, 0.3, 0.0], analytic_first_step=True)}})
    net = models.make_sidenet(tmp_path / "mean.safetensors", CHANNELS["sd3"], card, data_mean_size=4)
    applied = models.with_sidenet(model("sd3"), net)
    assert BAScheduler.execute(applied, 4).result[0].tolist() == pytest.approx([1.0, 0.8, 0.6, 0.3, 0.0])
    for steps in (1, 2, 8):
        assert len(BAScheduler.execute(applied, steps).result[0]) == steps + 1
    assert len(BAScheduler.execute(applied, 4, 0.5).result[0]) == 5


# --- bad input ----------------------------------------------------------------------------------------------------


def test_sidenet_of_another_model_is_refused_in_words(model, sidenet, tmp_path, caplog):
    with pytest.raises(ValueError, match="takes latents of 16 channels, and this MODEL's have 4"):
        ApplySideNet.execute(model("sdxl"), sidenet=sidenet(16))
    card = SideNetCard(backbone={"name": "FLUX.1-dev", "kind": "flux"})
    flux = models.make_sidenet(tmp_path / "flux.safetensors", 16, card)
    with pytest.raises(ValueError, match=r"made for FLUX.1-dev, and this MODEL is of kind 'sd3'"):
        ApplySideNet.execute(model("sd3"), sidenet=flux)
    assert (
        compatibility.errors(flux, facts_of(model("flux")))
        == compatibility.warnings(flux, facts_of(model("flux")))
        == []
    )
    with caplog.at_level(logging.WARNING):
        ApplySideNet.execute(model("sd3"), sidenet=sidenet(16))
    assert "does not say which model it was made for" in caplog.text
    # The trainer reaches a pipeline through diffusers, and cannot know what ComfyUI calls the model.
    card = SideNetCard(backbone={"name": "FLUX.1-dev", "kind": "diffusers"})
    foreign = models.make_sidenet(tmp_path / "foreign.safetensors", 16, card)
    assert compatibility.errors(foreign, facts_of(model("flux"))) == []
    assert compatibility.errors(foreign, facts_of(model("sd3"))) == [], "16 channels too, and nothing else to compare"
    for name in ("flux", "sd3"):
        doubt = compatibility.warnings(foreign, facts_of(model(name)))[0]
        assert "made for FLUX.1-dev outside ComfyUI" in doubt and f"of kind '{name}'" in doubt


def test_model_without_flow_or_diffusion_is_refused(model, sidenet):
    import comfy.model_sampling

    class Other(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.IMG_TO_IMG):
        pass

    strange = model("sdxl").clone()
    strange.add_object_patch("model_sampling", Other())
    with pytest.raises(ValueError, match="this MODEL's sampling is of another kind"):
        ApplySideNet.execute(strange, sidenet=sidenet(4))
    with pytest.raises(ValueError, match="this MODEL's sampling is of another kind"):
        run(strange, "sdxl", sampler(method="multistep"), torch.tensor([2.0, 1.0, 0.0]))


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([0.2, 0.5, 1.0], "must fall.*leave out Flip Sigmas"),
        ([1.0, 0.5, 0.5, 0.0], "must fall.*without repeating"),
        ([14.6, 2.0, 0.0], "flow model, whose sigmas lie between 0 and 1"),
        ([1.0, float("nan"), 0.0], "must be finite"),
    ],
)
def test_bad_sigmas_are_refused_in_words(sigmas, message, model):
    with pytest.raises(ValueError, match=message):
        run(model("sd3"), "sd3", sampler(method="multistep"), torch.tensor(sigmas))


def test_no_sigmas_leave_the_latent_as_it_is(model, sidenet):
    applied = models.with_sidenet(model("sd3"), sidenet(16))
    latent = models.noise("sd3", seed=4)
    assert torch.equal(run(applied, "sd3", sampler(), torch.FloatTensor([]), latent=latent), latent)
    one = run(applied, "sd3", sampler(), torch.tensor([0.0]), latent=latent)
    torch.testing.assert_close(one, latent, **CLOSE)


def test_latent_of_wrong_channels_is_refused(model, sidenet):
    applied = models.with_sidenet(model("sd3"), sidenet(16))
    z = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="takes latents of 16 channels; this one has 4"):
        run(applied, "sd3", sampler(), sigmas_of(applied), z=z, latent=torch.ones_like(z))


def test_nan_from_the_model_is_named(model, sidenet):
    applied = models.with_sidenet(model("sd3"), sidenet(16))

    def spoil(arguments):
        late = float(arguments["sigma"][0]) < 0.8
        return arguments["denoised"] * (float("nan") if late else 1.0)

    applied.set_model_sampler_post_cfg_function(spoil)
    with pytest.raises(NonFiniteError, match=r"Step 2 of 4, from t = 0\.\d+.*backbone returned NaN.*at call 3"):
        run(applied, "sd3", sampler(), sigmas_of(applied))


def test_class_conditional_sidenet_needs_labels(model, sidenet):
    applied = models.with_sidenet(model("sd3"), sidenet(16, num_classes=10))
    with pytest.raises(ValueError, match="takes class labels, and the positive conditioning has none"):
        run(applied, "sd3", sampler(), sigmas_of(applied))
    run(applied, "sd3", sampler(method="multistep"), sigmas_of(applied))


def test_rule_without_both_ends_is_refused(model, sidenet):
    applied = models.with_sidenet(model("sd3"), sidenet(16))
    with pytest.raises(ValueError, match="bi_anchor needs a rule whose nodes include 0 and 1"):
        run(applied, "sd3", sampler(rule="legendre3"), sigmas_of(applied))


def test_cfg_outside_the_trained_range_is_said(model, tmp_path, caplog):
    net = models.make_sidenet(tmp_path / "range.safetensors", 16, SideNetCard(cfg_range=(1.0, 2.0)))
    applied = models.with_sidenet(model("sd3"), net)
    for cfg, said in ((2.0, False), (5.0, True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(applied, "sd3", sampler(), sigmas_of(applied), cfg)
        assert ("was made for CFG 1 to 2; at 5 it is less accurate" in caplog.text) == said


def test_flux_guidance_outside_the_trained_range_is_said(model, tmp_path, caplog):
    """The trainer records FLUX.1-dev with its guidance as an input; CFG stays at 1 there, and that is no doubt."""
    net = models.make_sidenet(tmp_path / "flux.safetensors", 16, SideNetCard(cfg_range=(3.5, 3.5)))
    applied = models.with_sidenet(model("flux"), net)
    cases = (
        ({"guider": flux_guided(applied, 3.5)}, []),
        ({"guider": flux_guided(applied, None)}, []),
        ({"guider": flux_guided(applied, 1.5)}, ["guidance 3.5; at 1.5"]),
        ({"cfg": 3.5}, ["CFG 1; at 3.5"]),
    )
    for how, said in cases:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(applied, "flux", sampler(), sigmas_of(applied), **how)
        warned = [record.getMessage() for record in caplog.records if "less accurate" in record.getMessage()]
        assert len(warned) == len(said) and all(part in text for part, text in zip(said, warned, strict=True)), warned


# --- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["conv", "transformer"])
@pytest.mark.parametrize("name", ["attention_basic", "attention_split", "attention_sub_quad", "attention_pytorch"])
def test_a_sidenet_attends_by_comfyuis_function(name, architecture, model, sidenet, monkeypatch):
    """Whichever was chosen; all of them compute the same."""
    applied = models.with_sidenet(model("wan"), sidenet(16, architecture=architecture, anchors=2))
    chosen, shapes = getattr(attention, name), []

    def optimized_attention(q, *rest, **named):
        shapes.append(tuple(q.shape))
        return chosen(q, *rest, **named)

    expected = run(applied, "wan", reference(sidenet.path), sigmas_of(applied))
    # ComfyUI's models hold the function that was there when they were imported; the SideNet looks it up.
    monkeypatch.setattr(attention, "optimized_attention", optimized_attention)
    torch.testing.assert_close(run(applied, "wan", sampler(follow_sigmas=True), sigmas_of(applied)), expected, **CLOSE)
    assert shapes and all(len(shape) == 4 for shape in shapes)


def test_a_node_that_replaces_attention_on_a_model_replaces_the_sidenets_too(model, sidenet):
    applied = models.with_sidenet(model("wan"), sidenet(16, anchors=2))
    patched, seen = applied.clone(), []

    def override(function, q, *rest, **named):
        seen.append(bool(named.get("skip_output_reshape")))
        return function(q, *rest, **named)

    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    expected = run(applied, "wan", sampler(), sigmas_of(applied))
    assert not seen
    torch.testing.assert_close(run(patched, "wan", sampler(), sigmas_of(applied)), expected, **CLOSE)
    assert any(seen), "only the SideNet keeps the heads apart"
    seen.clear()
    run(applied, "wan", sampler(), sigmas_of(applied))
    assert not seen, "the next sampling is as before"


def test_chunks_count_the_memory_of_the_attention_that_was_chosen(model, sidenet, monkeypatch):
    """Without a fused function the matrix of attention has to fit too."""
    applied = models.with_sidenet(model("sd3"), sidenet(16, anchors=2))
    network = applied_sidenet(applied)
    free = 2 * 10 * (16 * 16 * 4096 * 4 + 2 * 4096**2 * 8)  # for ten samples, of width 16 with two heads
    monkeypatch.setattr(type(network.patcher), "get_free_memory", lambda self, device: free)
    x, chunks = torch.zeros(1, 16, 64, 64), {}
    for name in ("attention_split", "attention_pytorch"):
        monkeypatch.setattr(attention, "optimized_attention", getattr(attention, name))
        chunks[name] = sidenet_chunk(network, x)
    config = network.network.config
    assert (config.base_channels, config.num_heads, config.patch_size) == (16, 2, 1)
    assert chunks["attention_split"] == 10 and chunks["attention_pytorch"] > 100
