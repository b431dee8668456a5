"""What making a SideNet holds on the device, beside the model; the meta device stands for it, its bytes are counted."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from ba_solver.bas_core import Schedule, solve, time_grid
from ba_solver.training.backbones import Backbone, BackboneChoice
from ba_solver.training.backbones.base import samples_at_once
from ba_solver.training.backbones.pipeline_network import Clock, Network, Packing
from ba_solver.training.measuring.evaluate import Evaluation, draw_references, measure_all
from ba_solver.training.network.new_sidenet import data_mean
from ba_solver.training.recording import repeatable
from ba_solver.training.recording.record import Recording, record
from ba_solver.training.recording.reference_solver import record_trajectory
from ba_solver.training.recording.replay import Replay, SideNetInParts
from ba_solver.training.recording.trajectories import Trajectories, open_trajectories
from ba_solver.training.schedules.search import search_schedules
from ba_solver.training.schedules.solvers import baseline_solver
from problems import class_velocity, labels, model_field, noise, small_sidenet
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
SHAPES = {"image": (2, 16, 16), "video": (2, 3, 16, 16)}


class LiveBytes(TorchDispatchMode):
    """The most bytes that lay on a device at a time. What is copied from the meta device is random.

    Like Apple's GPUs the meta device has no float64 here.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.peak, self.live = torch.device(device), 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function is aten.copy_.default and arguments[1].is_meta and not arguments[0].is_meta:
            return arguments[0].normal_()
        if function is aten._to_copy.default and arguments[0].is_meta and keywords.get("device", "meta").type != "meta":
            return torch.randn(arguments[0].shape, dtype=keywords.get("dtype") or arguments[0].dtype)
        found = function(*arguments, **keywords)
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device.type:
                if tensor.is_meta and tensor.dtype == torch.float64:
                    raise TypeError("float64 on the device")
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: (weak, size) for key, (weak, size) in self.live.items() if not weak.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return found


def model(kind, guided):
    """Velocities that have a shape alone: the meta device keeps no numbers."""
    return Backbone(
        name=kind,
        kind="python",
        fingerprint=kind,
        shape=SHAPES[kind],
        velocity=lambda x, t, y, scale: torch.zeros_like(x),
        conditions=2,
        null=2 if guided else None,
        device=torch.device("meta"),
    )


@contextmanager
def at_most(states, backbone):
    """So many states of float32 on the device, and the few numbers that go with them."""
    with LiveBytes("meta") as device:
        yield
    size = 4 * torch.Size(backbone.shape).numel()
    assert 0 < device.peak < states * size + size / 2, f"{device.peak / size:.1f} states"


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("guided", [False, True])
def test_quick_holds_the_states_of_one_model_call_on_the_device(kind, guided, tmp_path, monkeypatch):
    """The batch's states, once more for each branch, and the branches' velocities; however many runs and steps."""
    backbone, batch = model(kind, guided), {"image": 4, "video": 1}[kind]
    choice = BackboneChoice(backbone="python:x", guidance=(2.0 if guided else 1.0,))
    states = batch * (1 + 2 * (1 + guided))
    monkeypatch.setattr(repeatable, "ALIKE", float("inf"))  # what comes back from the meta device is not numbers
    with at_most(states, backbone):
        record(choice, Recording(trajectories=9, points=24, prefixes=0, jitter=False), tmp_path, backbone)
    trajectories, metadata = open_trajectories([tmp_path])
    assert metadata["record_batch"] == batch
    mean = data_mean(trajectories, 1.0, 4, tolerance=9.0)
    with at_most(states, backbone):
        search_schedules(*(Replay(backbone, part, metadata) for part in trajectories.split(2)), [4, 5], mean, (2, 1))


@pytest.mark.parametrize("kind", SHAPES)
def test_evaluating_holds_the_states_of_one_model_call_on_the_device(kind):
    backbone, batch = model(kind, True), {"image": 4, "video": 1}[kind]
    evaluation = Evaluation(nfe="5", noises=6, search_noises=5, reference=32)

    def field_of(conditions):
        return backbone.field_in_main_memory(conditions, 2.0, 0)

    with at_most(batch * 5, backbone):
        paths, search = draw_references(evaluation, backbone, field_of, 1)
        measure_all([(baseline_solver("unipc"), 5, "uniform", (1.0, 0.0))], paths)
    assert search.truth(torch.tensor(0.5)).shape == (5, *backbone.shape)
    # What is only measured from keeps its ends alone.
    assert paths[0].truth.args[0].shape[0] == len(paths[0].ends) == batch
    assert paths[0].truth.func.__self__.states.shape[1] == 2


def test_a_trajectory_is_recorded_into_its_place():
    """States and velocities once, not once more while they are put together."""
    field, start, times = model_field(class_velocity, labels(4)[0]), noise(4, 2, 16, 16), time_grid(60, 2.0)
    with LiveBytes("cpu") as memory:
        states, velocities = record_trajectory(field, start, times)
    assert memory.peak < 1.2 * (states.nbytes + velocities.nbytes)


def test_a_video_goes_through_the_model_alone():
    assert samples_at_once(0, (16, 21, 60, 104)) == 1 and samples_at_once(3, (16, 21, 60, 104)) == 3
    assert samples_at_once(0, (16, 128, 128)) == samples_at_once(0, (16, 1, 128, 128)) == 4


def test_a_sidenet_in_parts_is_the_sidenet():
    sidenet, (classes, _) = small_sidenet(anchors=2), labels(5)
    field, x = model_field(class_velocity, classes), noise(5, 2, 8, 8)
    for schedule in (time_grid(4), Schedule(time_grid(4).tolist())):
        whole, parts = (solve(field, each, x, schedule) for each in (sidenet, SideNetInParts(sidenet, x.device, 3)))
        torch.testing.assert_close(parts, whole)


def test_the_data_mean_is_read_state_by_state():
    """As of all at once; and the memory of a few states."""
    generator = torch.Generator().manual_seed(0)
    states, velocities = (torch.randn(40, 2, 2, 8, 8, generator=generator) for _ in range(2))
    trajectories = Trajectories(torch.tensor([1.0, 0.01]).expand(40, -1), states, velocities, torch.zeros(40))
    implied = states[:, 0] - velocities[:, 0]
    share = (implied - implied.mean(0)).square().mean() / velocities[:, 0].square().mean()
    assert data_mean(trajectories, 1.0, 8, tolerance=0.99 * share.item()) is None
    with LiveBytes("cpu") as memory:
        found = data_mean(trajectories, 1.0, 8, tolerance=1.01 * share.item())
    torch.testing.assert_close(found, implied.mean(0))
    assert memory.peak < 10 * 8 * implied[0].numel()


def test_the_timesteps_of_a_diffusion_model_are_found_off_the_device():
    clock = Clock(0.0, 1.0, "epsilon", np.linspace(0, 1, 11))
    torch.testing.assert_close(clock.timestep(torch.tensor([0.5])), torch.tensor([5.0]))
    with LiveBytes("meta"):
        assert clock.timestep(torch.ones(3, device="meta")).shape == (3,)


def test_the_encodings_of_prompts_wait_in_main_memory():
    """And go to the device for the call that takes them."""
    asked = []

    def module(hidden_states, timestep, return_dict, **arguments):
        asked.append(arguments)
        return (hidden_states,)

    conditions = [{"encoding": torch.ones(1, 4, 8), "more": {"mask": torch.ones(1, 4)}} for _ in range(3)]
    packing, clock = Packing(8, 8, packed=False), Clock(0.0, 1.0, "flow")
    network = Network(module, conditions, packing, clock, False, "hidden_states", torch.float32, torch.device("meta"))
    x, t = torch.ones(2, 1, 8, 8, device="meta"), torch.ones(2, device="meta")
    network(x, t, torch.tensor([2, 0]), 1.0)
    assert asked[0]["encoding"].is_meta and asked[0]["more"]["mask"].is_meta
    assert asked[0]["encoding"].shape == (2, 4, 8) and not conditions[0]["encoding"].is_meta
