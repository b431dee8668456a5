"""t in [0, 1], t = 1 is noise and t = 0 is data: x_t = (1 - t) x_0 + t noise, velocity v = dx/dt = noise - x_0.

Everything in the core follows this convention. Here are the conversions to and from the quantities that
networks predict (x_0, noise, velocity) and the paths that other models are trained on (variance exploding
and variance preserving), so that one solver serves flow and diffusion models.

States are [B, C, *spatial]; times are numbers, 0-d tensors or [B], one for each sample. ComfyUI's `CONST` models
and diffusers' flow-matching schedulers call the same t "sigma".
"""

from __future__ import annotations

import torch
from torch import Tensor

Time = Tensor | float


def per_sample(t: Time, x: Tensor) -> Tensor:
    """`t` shaped to broadcast over x [B, C, *spatial], in x's dtype; one number for all samples stays on the host, from
    where arithmetic takes it without a wait."""
    t = torch.as_tensor(t, dtype=x.dtype)
    return t if t.ndim == 0 else t.to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def time_of_each(t: Time, x: Tensor) -> Tensor:
    """[B] times for a model, of one time for all samples of x, in x's dtype and on its device; a time on the host is
    filled in there, which needs no transfer."""
    if isinstance(t, Tensor) and t.device == x.device:
        return t.to(x.dtype).expand(len(x))
    return x.new_full((len(x),), float(t))


def interpolate(x0: Tensor, noise: Tensor, t: Time) -> Tensor:
    """The state x_t = (1 - t) x_0 + t noise on the straight path between one image and one noise."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


# --- what a network predicts -----------------------------------------------------------------------------------


def velocity_to_x0(x: Tensor, v: Tensor, t: Time) -> Tensor:
    """x_0 = x_t - t v."""
    return x - per_sample(t, x) * v


def velocity_to_noise(x: Tensor, v: Tensor, t: Time) -> Tensor:
    """noise = x_t + (1 - t) v."""
    return x + (1 - per_sample(t, x)) * v


def x0_to_velocity(x: Tensor, x0: Tensor, t: Time) -> Tensor:
    """v = (x_t - x_0) / t. Undefined at t = 0, where the result is not finite."""
    return (x - x0) / per_sample(t, x)


def noise_to_velocity(x: Tensor, noise: Tensor, t: Time) -> Tensor:
    """v = (noise - x_t) / (1 - t). Undefined at t = 1, where the result is not finite."""
    return (noise - x) / (1 - per_sample(t, x))


# --- the variance-exploding path x_ve = x_0 + sigma noise ---------------------------------------------------------


def ve_sigma_to_time(sigma: Time) -> Time:
    """Flow time of a variance-exploding noise level: t = sigma / (1 + sigma)."""
    return sigma / (1 + sigma)


def time_to_ve_sigma(t: Time) -> Time:
    """Variance-exploding noise level of a flow time: sigma = t / (1 - t); infinite at t = 1."""
    return t / (1 - t)


def ve_to_flow(x_ve: Tensor, sigma: Time) -> Tensor:
    """State on the flow path, x_t = x_ve / (1 + sigma) at t = sigma / (1 + sigma)."""
    return x_ve / (1 + per_sample(sigma, x_ve))


# --- the variance-preserving path x_vp = sqrt(a) x_0 + sqrt(1 - a) noise, a = alphas_cumprod -------------------------


def vp_alpha_to_time(alpha_cumprod: Time) -> Tensor:
    """Flow time of a variance-preserving level: t = s / (r + s), r = sqrt(a), s = sqrt(1 - a)."""
    a = torch.as_tensor(alpha_cumprod)
    signal, noise = a.sqrt(), (1 - a).sqrt()
    return noise / (signal + noise)


def _vp_norm(t: Tensor) -> Tensor:
    """|(1 - t, t)|: a flow state divided by this is a variance-preserving state."""
    return torch.hypot(1 - t, t)


def flow_to_vp(x: Tensor, t: Time) -> Tensor:
    """State on the variance-preserving path from a flow state at the same signal-to-noise ratio."""
    return x / _vp_norm(per_sample(t, x))


def eps_to_velocity(x: Tensor, epsilon: Tensor, t: Time) -> Tensor:
    """Velocity from an eps-prediction model's output at the flow state x: v = (eps - x_t) / (1 - t), t < 1."""
    return noise_to_velocity(x, epsilon, t)


def v_prediction_to_velocity(x: Tensor, prediction: Tensor, t: Time) -> Tensor:
    """Flow velocity from a v-prediction (Salimans and Ho 2022: sqrt(a) noise - sqrt(1 - a) x_0) at flow state x.

    With n = |(1 - t, t)|: x_0 = ((1 - t) x / n^2) - t u / n and noise = t x / n^2 + (1 - t) u / n, hence
    v = noise - x_0 = ((2 t - 1) x / n + u) / n, finite on all of [0, 1].
    """
    t = per_sample(t, x)
    norm = _vp_norm(t)
    return ((2 * t - 1) * x / norm + prediction) / norm
