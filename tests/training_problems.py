"""A backbone with known velocities for the training tests: `python:training_problems:swirl_backbone`."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from ba_solver.bas_core import model_field
from ba_solver.training.backbones import Backbone
from ba_solver.training.recording import trajectories
from ba_solver.training.recording.reference_solver import (
    LAST_TIME,
    batch_generator,
    default_times,
    jittered,
    record_trajectory,
)
from ba_solver.training.recording.trajectories import Trajectories

SHAPE = (2, 4, 4)
BACKBONE = "python:training_problems:swirl_backbone"


def swirl(x, t, y):
    """A curved field that depends on state, time and class; class 2 is the unconditional branch."""
    turn = torch.stack([-x[:, 1], x[:, 0]], 1)
    return 3.0 * turn * (1 + y[:, None, None, None] * torch.cos(4 * t)[:, None, None, None] / 2) - x


def swirl_backbone(device, dtype):
    return Backbone(
        name="swirl",
        kind="python",
        fingerprint="swirl-1",
        shape=SHAPE,
        velocity=lambda x, t, y, scale: swirl(x, t, y),
        conditions=2,
        null=2,
        num_classes=2,
        device=device,
    )


GAUSSIAN_MEAN = torch.linspace(-1, 1, 32).reshape(SHAPE)


def gaussian_backbone(device, dtype):
    """The flow to normal data around `GAUSSIAN_MEAN`: at t = 1 its velocity is exactly the noise minus that."""

    def velocity(x, t, y, scale):
        t = t[:, None, None, None]
        variance = t**2 + 0.3 * (1 - t) ** 2
        return (t - 0.3 * (1 - t)) / variance * (x - (1 - t) * GAUSSIAN_MEAN) - GAUSSIAN_MEAN

    return Backbone(
        name="gaussian", kind="python", fingerprint="gaussian-1", shape=SHAPE, velocity=velocity, conditions=2
    )


def two_points_backbone(device, dtype):
    """Every number of the data is one above or below `GAUSSIAN_MEAN`: the same at t = 1, and curved paths after it."""

    def velocity(x, t, y, scale):
        t = t[:, None, None, None]
        data = GAUSSIAN_MEAN + torch.tanh((1 - t) * (x - (1 - t) * GAUSSIAN_MEAN) / t**2)
        return (x - data) / t

    return Backbone(name="two points", kind="python", fingerprint="two-1", shape=SHAPE, velocity=velocity, conditions=2)


def broken_backbone(device, dtype):
    """Returns NaN near the data."""
    whole = swirl_backbone(device, dtype)
    return Backbone(
        **{**vars(whole), "velocity": lambda x, t, y, scale: swirl(x, t, y) / (t > 0.3)[:, None, None, None]}
    )


def not_a_backbone(device, dtype):
    return 5


def other_backbone(device, dtype):
    return Backbone(**{**vars(swirl_backbone(device, dtype)), "name": "other", "fingerprint": "swirl-2"})


def larger_backbone(device, dtype):
    return Backbone(**{**vars(swirl_backbone(device, dtype)), "shape": (2, 8, 8)})


def trajectories_of(field, labels, points, seed=3, until=LAST_TIME, batch=8):
    """Trajectories of a field `(x, t, y)`, one for every label, in memory."""
    parts = []
    for index, rows in enumerate(labels.split(batch)):
        generator = batch_generator(seed, index)
        times = jittered(default_times(points, until=until), generator)
        noise = torch.randn((len(rows), *SHAPE), generator=generator)
        parts.append((times.expand(len(rows), -1), *record_trajectory(model_field(field, rows), noise, times)))
    return Trajectories(*(torch.cat(column).clone() for column in zip(*parts, strict=True)), labels)


def environment():
    """For a process of its own, which finds what this one finds."""
    package = str(Path(trajectories.__file__).resolve().parents[1].parent)
    paths = os.pathsep.join([*(p for p in sys.path if p), package])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def in_two_processes(command, folder):
    """Run a command of `ba-solver` in two CPU processes, and return what each printed."""
    logs = folder / "logs"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--log-dir", str(logs), "--redirects", "3", "-m", "ba_solver.training"]
    done = subprocess.run(
        [*launch, *command], env=environment(), capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [path.read_text() for path in sorted(logs.rglob("stdout.log"))]
    assert len(said) == 2
    return said


def dying_backbone(device, dtype):
    """The process ends without a word, as by kill -9, at the model call after so many samples as DIES_AFTER says."""
    whole, left = swirl_backbone(device, dtype), [int(os.environ["DIES_AFTER"])]

    def velocity(x, t, y, scale):
        left[0] -= len(x)
        if left[0] < 0:
            os._exit(9)
        return swirl(x, t, y)

    return Backbone(**{**vars(whole), "velocity": velocity})
