"""The solver never waits for the device but once, at its end; counted on a stand-in of an accelerator."""

import pytest
import torch
from ba_solver.bas_core import (
    Control,
    Guidance,
    NonFiniteError,
    Schedule,
    edit,
    editing_grid,
    invert,
    model_field,
    solve,
    time_grid,
    with_strength,
)
from ba_solver.lab.counted_device import CountedDevice
from ba_solver.training.baselines import BASELINES, run_baseline
from greedy_fit import Fitting, fit_schedule
from problems import NULL, noise, small_sidenet, small_sit

STEPS = 6
INTERVAL = (0.0, 0.7)
SHIFTED = Schedule(
    time_grid(STEPS, 3.0, -0.2).tolist(),
    [[0.01] * (2 + i // 2 + 2 * (i % 2)) for i in range(2 * STEPS - 1)],
    rule="lobatto2",
)
CONDITIONAL_ONLY = Schedule(SHIFTED.times, SHIFTED.coefficients, [[], [], [0.1] * 4, [], [0.1] * 7], rule="lobatto2")
ANALYTIC = Schedule(SHIFTED.times, analytic_first_step=True)


def networks(device, **changes):
    """A SiT and a SideNet for it on the device, with inputs."""
    sizes = {"in_channels": 3, "patch_size": 2, "dtype": torch.float32}
    sit, net = small_sit(dtype=torch.float32), small_sidenet(**{**sizes, **changes})
    x, labels = noise(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 2])
    given = (x, labels, torch.full_like(labels, NULL))
    return device.put_module(sit), device.put_module(net), *map(device.put, given)


def counted(
    schedule,
    guidance=None,
    mode="per_branch",
    strength=1.0,
    without=False,
    changes=None,
    before=True,
    float64=True,
    **options,
):
    """Transfers to the host and to the device, in a first and a second sampling: tables are made in the first."""
    guidance, found = guidance or Guidance(1.0), []
    with torch.no_grad(), CountedDevice(float64) as device:
        sit, net, x, cond, uncond = networks(device, **(changes or {}))
        predictor = None if without else with_strength(net, strength)
        for _ in range(2):
            counts = device.to_host, device.to_device
            branches = (cond, uncond) if guidance.scale != 1 else (cond, None)
            field = model_field(sit, *branches, guidance, mode)
            field.finite.before_callbacks = before
            solve(field, predictor, x, schedule, **options)
            found.append((device.to_host - counts[0], device.to_device - counts[1]))
    return found


TWO, TRANSFORMER = {"anchors": 2}, {"anchors": 2, "architecture": "transformer", "cfg_input": True}
CASES = {
    "no network": {"without": True},
    "network": {},
    "two anchors": {"changes": TWO},
    "transformer": {"changes": TRANSFORMER},
    "strength": {"changes": TWO, "strength": 0.5},
    "chunks": {"changes": TWO, "chunk": 1},
    "single anchor": {"method": "single_anchor"},
    **{
        f"{mode} {name}": {"mode": mode, **options}
        for mode in ("per_branch", "combined")
        for name, options in {
            "guided": {"guidance": Guidance(2.0), "changes": TWO},
            "in an interval": {"guidance": Guidance(2.0, INTERVAL), "changes": TRANSFORMER},
            "coefficients": {"guidance": Guidance(2.0), "schedule": SHIFTED, "changes": TWO},
            "conditional-only calls": {"guidance": Guidance(2.0), "schedule": CONDITIONAL_ONLY, "changes": TWO},
            "no network": {"guidance": Guidance(2.0), "without": True},
        }.items()
    },
    "analytic first step": {"schedule": ANALYTIC, "changes": {**TWO, "data_mean_size": 4}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_for_the_device_once_at_the_end(case):
    options = {"schedule": time_grid(STEPS), **CASES[case]}
    first, second = counted(**options)
    assert second == (1, 0)
    # A table of positions is sent when a size is first seen.
    assert first == (1, int(options.get("changes") is TRANSFORMER))


def test_a_callback_waits_once_a_step_or_where_it_is_asked_not_to_never():
    waits = [counted(time_grid(STEPS), callback=lambda step: step.denoised, before=b) for b in (True, False)]
    assert [first for first, _ in waits] == [(STEPS, 0), (1, 0)]


@pytest.mark.parametrize("callback", [None, lambda step: None])
def test_nan_is_found_though_nothing_waits_for_it(callback):
    """In the call, in the SideNet, and in what is integrated; the message names the step and the time."""
    with torch.no_grad(), CountedDevice() as device:
        sit, net, x, cond, _ = networks(device, anchors=2)

        def broken(x, t, y):
            return torch.where((t < 0.6)[:, None, None, None], torch.full_like(x, float("inf")), sit(x, t, y))

        with pytest.raises(NonFiniteError, match=r"Step 3 of 6, from t = 0\.6667: The backbone .* 2 of 2 .* call 4"):
            solve(model_field(broken, cond), net, x, time_grid(STEPS), callback=callback)
        net.output_conv.bias += float("nan")
        with pytest.raises(NonFiniteError, match="Step 1 of 6, from t = 1: The SideNet"):
            solve(model_field(sit, cond), net, x, time_grid(STEPS), callback=callback)
        with pytest.raises(NonFiniteError, match=r"Step 1 of 6, from t = 1: The integration"):
            solve(
                model_field(lambda x, t: torch.full_like(x, 3e38)),
                None,
                x - 3.4e38,
                time_grid(STEPS),
                callback=callback,
            )
        with pytest.raises(ValueError, match="x must be finite"):
            solve(model_field(sit, cond), None, x + float("inf"), time_grid(STEPS), callback=callback)


def test_no_callback_sees_nan():
    seen = []
    with pytest.raises(NonFiniteError, match="Step 2 of 4"):
        solve(
            model_field(lambda x, t: x * torch.where(t < 0.8, float("nan"), 1.0)[:, None, None, None]),
            None,
            noise(1, 1, 2, 2),
            torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0]),
            callback=lambda step: seen.append(step.x_next),
        )
    assert len(seen) == 1 and seen[0].isfinite().all()


def test_a_field_that_was_stopped_serves_again():
    """What was gathered until then is forgotten."""
    field, x = model_field(lambda x, t: x * float("nan")), noise(1, 1, 2, 2)

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        field.finite.before_callbacks = False
        solve(field, None, x, time_grid(4), callback=stop)
    field.finite.read()
    with pytest.raises(NonFiniteError, match=r"^The backbone returned NaN"):
        field(x, 0.5)


# --- devices without double precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_sampling_takes_no_double_precision_of_the_device(case):
    counted(**{"schedule": time_grid(STEPS), **CASES[case], "float64": False})


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 2, 8, 8)], ids=["image", "video"])
def test_editing_takes_no_double_precision_of_the_device(shape):
    with torch.no_grad(), CountedDevice(float64=False) as device:
        net = device.put_module(small_sidenet(in_channels=3, anchors=2, num_classes=0, dtype=torch.float32))
        field, image = model_field(lambda x, t: torch.sin(x)), device.put(noise(*shape, dtype=torch.float32))
        source = invert(field, net, image, editing_grid(time_grid(4)))
        mask = device.put(torch.ones(1, 1, *[1] * (len(shape) - 2)))
        out = edit(field, net, source, Control(0.3, fade=0.5), mask)
    assert out.held.isfinite().all()


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_take_no_double_precision_of_the_device(name):
    with torch.no_grad(), CountedDevice(float64=False) as device:
        x = device.put(noise(1, 1, 2, 2, dtype=torch.float32))
        end = run_baseline(name, model_field(lambda x, t: torch.sin(x)), x, 0.1 + 0.8 * time_grid(4))
    assert end.held.isfinite().all()


def test_fitting_takes_no_double_precision_of_the_device():
    with torch.no_grad(), CountedDevice(float64=False) as device:
        x = device.put(noise(4, 1, 4, 4, dtype=torch.float32))
        labels = device.put(torch.zeros(4)), device.put(torch.ones(4))
        field = model_field(lambda x, t, y: torch.sin(x + y[:, None, None, None]), *labels, Guidance(2.0), "combined")
        schedule = fit_schedule(Fitting(None, field, x, lambda t: x * 0.5), Schedule(SHIFTED.times), True)[1]
        solve(field, None, x, schedule)
    assert schedule.conditional_only == 2 and schedule.coefficients
