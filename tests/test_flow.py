"""Conversions between velocity, x_0, noise, sigma and the other Gaussian paths, against their definitions."""

import pytest
import torch
from ba_solver.bas_core import flow, time_grid, time_shift
from problems import noise, spread

TIMES = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64)
SHAPES = [(5, 2, 3, 4), (5, 2, 2, 3, 4)]


def velocity_to_v_prediction(x, v, t):
    """The inverse of `v_prediction_to_velocity`."""
    norm = torch.hypot(1 - spread(t, x), spread(t, x))
    return v * norm - (2 * spread(t, x) - 1) * x / norm


def flow_to_ve(x, t):
    """State on the variance-exploding path."""
    return x / (1 - spread(t, x))


def vp_to_flow(x, t):
    """State on the flow path of a variance-preserving one."""
    return x * torch.hypot(1 - spread(t, x), spread(t, x))


def time_to_vp_alpha(t):
    """alphas_cumprod of a flow time."""
    return (1 - t) ** 2 / ((1 - t) ** 2 + t**2)


# Name, there, back again; each a function of the state, the quantity and the time.
PAIRS = [
    ("x0", flow.velocity_to_x0, flow.x0_to_velocity),
    ("noise", flow.velocity_to_noise, flow.noise_to_velocity),
    ("v-prediction", velocity_to_v_prediction, flow.v_prediction_to_velocity),
    ("ve", lambda x, q, t: flow_to_ve(q, t), lambda x, q, t: flow.ve_to_flow(q, flow.time_to_ve_sigma(t))),
    ("vp", lambda x, q, t: flow.flow_to_vp(q, t), lambda x, q, t: vp_to_flow(q, t)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=["image", "video"])
@pytest.mark.parametrize(("there", "back"), [pair[1:] for pair in PAIRS], ids=[pair[0] for pair in PAIRS])
def test_round_trips_are_exact_to_float_precision(there, back, shape, dtype):
    """A few units in the last place, times the 1/t and 1/(1 - t) that the conversions themselves divide by."""
    x, q, t = noise(*shape, dtype=dtype), noise(*shape, seed=1, dtype=dtype), TIMES.to(dtype)
    error = (back(x, there(x, q, t), t) - q).abs().flatten(1).amax(1)
    bound = 16 * torch.finfo(dtype).eps / torch.minimum(t, 1 - t)
    assert (error <= bound).all(), (error, bound)
    assert dtype != torch.float64 or error.max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("there", "back"), [(flow.time_to_ve_sigma, flow.ve_sigma_to_time), (time_to_vp_alpha, flow.vp_alpha_to_time)]
)
def test_time_round_trips(there, back, dtype):
    """A few units in the last place, times the 1/t by which rounding alphas_cumprod near 1 forgets the noise."""
    t = TIMES.to(dtype)
    assert ((back(there(t)) - t).abs() <= 2 * torch.finfo(dtype).eps / torch.minimum(t, 1 - t)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=["image", "video"])
def test_conversions_follow_from_the_definitions(shape):
    """x_0 and noise are known; every kind of prediction made from them must give v = noise - x_0."""
    x0, eps, t = noise(*shape), noise(*shape, seed=1), TIMES
    time = spread(t, x0)
    x, v = (1 - time) * x0 + time * eps, eps - x0
    a = (1 - time) ** 2 / ((1 - time) ** 2 + time**2)
    sigma = time / (1 - time)
    x_ve, x_vp = x0 + sigma * eps, a.sqrt() * x0 + (1 - a).sqrt() * eps
    v_prediction = a.sqrt() * eps - (1 - a).sqrt() * x0
    for name, got, expected in (
        ("interpolate", flow.interpolate(x0, eps, t), x),
        ("x0", flow.velocity_to_x0(x, v, t), x0),
        ("noise", flow.velocity_to_noise(x, v, t), eps),
        ("from x0", flow.x0_to_velocity(x, x0, t), v),
        ("from noise", flow.noise_to_velocity(x, eps, t), v),
        ("from eps-prediction", flow.eps_to_velocity(x, eps, t), v),
        ("from v-prediction", flow.v_prediction_to_velocity(x, v_prediction, t), v),
        ("to v-prediction", velocity_to_v_prediction(x, v, t), v_prediction),
        ("from exploding", flow.ve_to_flow(x_ve, sigma.flatten()), x),
        ("to exploding", flow_to_ve(x, t), x_ve),
        ("from preserving", vp_to_flow(x_vp, t), x),
        ("to preserving", flow.flow_to_vp(x, t), x_vp),
        ("sigma", flow.time_to_ve_sigma(t), sigma.flatten()),
        ("alpha", time_to_vp_alpha(t), a.flatten()),
        ("time of sigma", flow.ve_sigma_to_time(sigma.flatten()), t),
        ("time of alpha", flow.vp_alpha_to_time(a.flatten()), t),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_one_time_for_all_samples_may_be_a_number_a_0d_tensor_or_one_each():
    x, v = noise(3, 2, 2, 2), noise(3, 2, 2, 2, seed=1)
    expected = x - 0.3 * v
    for t in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64)):
        assert torch.equal(flow.velocity_to_x0(x, v, t), expected)


def test_v_prediction_converts_at_both_ends_of_the_path():
    """At t = 0 the v-prediction is the noise, at t = 1 it is -x_0; both conversions stay finite there."""
    x0, eps = noise(2, 1, 2, 2), noise(2, 1, 2, 2, seed=1)
    for t, x, prediction in ((0.0, x0, eps), (1.0, eps, -x0)):
        torch.testing.assert_close(flow.v_prediction_to_velocity(x, prediction, t), eps - x0)
        torch.testing.assert_close(velocity_to_v_prediction(x, eps - x0, t), prediction)


def test_time_shift_multiplies_sigma():
    """Shifting by s is the same as s times the variance-exploding noise level."""
    shifted = time_shift(TIMES, 3.0)
    torch.testing.assert_close(flow.time_to_ve_sigma(shifted), 3.0 * flow.time_to_ve_sigma(TIMES), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("shift", "cosine"), [(1.0, 0.0), (3.0, 0.0), (0.5, 0.0), (1.0, 1.0), (2.0, -1.0), (1.3, 0.2)])
def test_time_grids_run_from_exactly_noise_to_exactly_data(shift, cosine):
    times = time_grid(7, shift, cosine, torch.float64)
    assert len(times) == 8 and times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    if shift != 1 and not cosine:
        assert (times[3] > 1 - 3 / 7) == (shift > 1), "a shift above 1 spends more steps near the noise"


def test_the_default_grid_is_the_papers():
    assert torch.equal(time_grid(7), torch.linspace(1, 0, 8))
