"""The time shift of schedulers that stretch their times to a last one (Qwen-Image's, LTX's), against those times."""

import math
from types import SimpleNamespace

import pytest
import torch
from ba_solver.bas_core import time_grid

diffusers = pytest.importorskip("diffusers")
np = pytest.importorskip("numpy")

from ba_solver.training.backbones.pipeline_network import shift_of  # noqa: E402
from ba_solver.training.backbones.pipeline_watch import Watch  # noqa: E402

# Qwen-Image's and LTX's settings, at the `mu` of a large image.
QWEN, LTX = {"shift_terminal": 0.02}, {"shift_terminal": 0.1}


class Pipeline:
    """As far as the shift goes."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def __call__(self, num_inference_steps=50):
        pass


def own_times(scheduler, steps, mu):
    """As the pipelines ask for them; without the 0 that is put at the end."""
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), **({} if mu is None else {"mu": mu}))
    assert scheduler.sigmas[-1] == 0
    return scheduler.sigmas[:-1]


@pytest.mark.parametrize(
    ("settings", "mu"),
    [
        ({**QWEN, "use_dynamic_shifting": True}, 0.834),
        ({**LTX, "use_dynamic_shifting": True}, 2.05),
        ({**QWEN, "use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.5),
        ({**QWEN, "shift": 3.0}, None),
    ],
    ids=["Qwen-Image", "LTX", "linear", "constant"],
)
def test_stretched_times_are_our_family_squeezed_to_the_last_time(settings, mu):
    """Exactly: N times from 1 to the terminal one are a grid of N - 1 intervals with the shift that is found."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    last = settings["shift_terminal"]
    shift = shift_of(Pipeline(scheduler), Watch(shift_exponent=mu))
    times = own_times(scheduler, 50, mu)
    torch.testing.assert_close(times, last + (1 - last) * time_grid(49, shift), rtol=0, atol=1e-6)
    unstretched = settings.get("shift", 1.0) if mu is None else mu if "time_shift_type" in settings else math.exp(mu)
    off = (times - (last + (1 - last) * time_grid(49, unstretched))).abs().max()
    assert off > 5e-3, "the scheduler's plain shift would be another grid"


@pytest.mark.parametrize(("settings", "mu", "shift"), [({"use_dynamic_shifting": True}, 0.8, math.exp(0.8)),
                                                       ({"shift": 3.0}, None, 3.0)])  # fmt: skip
def test_without_a_terminal_time_the_shift_is_the_schedulers(settings, mu, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    assert shift_of(Pipeline(scheduler), Watch(shift_exponent=mu)) == pytest.approx(shift, rel=1e-12)


def test_a_scheduler_without_any_shift_has_none():
    assert shift_of(SimpleNamespace(scheduler=SimpleNamespace(config={})), Watch()) == 1.0
