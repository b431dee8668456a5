"""A surrogate of the model's velocity field, made of recorded trajectories; it costs no model calls.

On a trajectory the velocity is the recorded one. A solver of few steps leaves the trajectory, and how its early errors
grow depends on how the velocity changes beside it. That is learned from a few rollouts on the model, which show both:
how far they were from the trajectory, and by how much the velocity differed.

Only sums over a state's numbers are looked at. So a few hundred of them, drawn at random, stand for all, and a search
costs as much on a large model as on a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...bas_core.flow import per_sample
from ...bas_core.guidance import Field
from ...bas_core.prediction import StraightLine
from ...bas_core.sidenet import spread_mean
from ..network.new_sidenet import pooled
from ..recording.reference_solver import LAST_TIME
from ..recording.trajectories import Trajectories

# Numbers of each state that are used.
COORDINATES = 512
# The gain before a rollout: the velocity's change beside the trajectory, over the distance from it. On the models
# looked at, -2 to -3 in the middle of the path, and about 0 in its first tenth (docs/training.md).
DEFAULT_GAIN, FULL_FROM = -3.0, 0.1
# Over the mean square of the deviations: two rollouts of one state hardly differ.
DEVIATION_RIDGE = 0.1

Gain = Callable[[float], float]


def default_gain(t: float) -> float:
    """The gain for a model of which no rollouts are known."""
    return DEFAULT_GAIN * min(1.0, (1 - t) / FULL_FROM)


class MeanLine(StraightLine):
    """A straight line through two anchors, and a first velocity from the data mean [D, 1, 1], or one a trajectory."""

    has_data_mean = True

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def analytic_velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """See `SideNet.analytic_velocity`."""
        return (x - self.mean) / t.to(x)


@dataclass(frozen=True)
class SubsampledTrajectories:
    """Trajectories with D numbers of each state, in memory.

    Attributes:
        trajectories: M of them; states and velocities [M, N, D, 1, 1].
        index: [D] which numbers of a state.
        means: [M, D, 1, 1] the data mean as trajectories of other conditions show it; None where it is not wanted.
    """

    trajectories: Trajectories
    index: Tensor
    means: Tensor | None

    def __len__(self) -> int:
        return len(self.trajectories)

    def first(self, count: int) -> SubsampledTrajectories:
        """The first few."""
        means = None if self.means is None else self.means[:count]
        return SubsampledTrajectories(self.trajectories.rows(slice(None, count)), self.index, means)

    def subsample(self, x: Tensor) -> Tensor:
        """The numbers [M, D, 1, 1] of states [M, ...], on the CPU."""
        return x.flatten(1)[:, self.index.to(x.device), None, None].cpu().float()

    @property
    def noise(self) -> Tensor:
        """[M, D, 1, 1] where they begin."""
        rows = torch.arange(len(self))
        return self.trajectories.states[rows, torch.zeros_like(rows)]

    def truth(self, t: Tensor) -> Tensor:
        """[M, D, 1, 1] states at time t."""
        return self.trajectories.truth(torch.arange(len(self)), t)


def subsampled(
    trajectories: Trajectories, rows: Tensor, data_mean_size: int, count: int = COORDINATES
) -> SubsampledTrajectories:
    """Some of the trajectories with `count` numbers of each state; they are read one after another.

    Args:
        trajectories: of combined CFG.
        rows: which.
        data_mean_size: side of the grid that the data mean is averaged on; 0 = no data mean.
        count: D.
    """
    shape = trajectories.states.shape[2:]
    size = int(np.prod(shape))
    index = torch.randperm(size, generator=torch.Generator().manual_seed(size))[:count]
    parts: list[tuple[Tensor, Tensor]] = []
    means: list[Tensor] = []
    for row in rows.tolist():
        states, velocities = trajectories.states[row].float(), trajectories.velocities[row].float()
        parts.append((states.flatten(1)[:, index], velocities.flatten(1)[:, index]))
        means += [pooled(states[0] - velocities[0], data_mean_size)] if data_mean_size else []
    x, v = (torch.stack(part)[..., None, None] for part in zip(*parts, strict=True))
    labels = trajectories.labels[rows]
    some = Trajectories(trajectories.times[rows], x, v, labels)
    if not data_mean_size:
        return SubsampledTrajectories(some, index, None)
    others = [spread_mean(mean, shape).flatten()[index] for mean in means_of_others(torch.stack(means), labels)]
    return SubsampledTrajectories(some, index, torch.stack(others)[..., None, None])


def means_of_others(means: Tensor, labels: Tensor) -> list[Tensor]:
    """For each trajectory the mean [C, H, W] over those of other conditions, or over all others where there are none.

    A trajectory's own condition tells nothing about prompts that were not recorded.
    """
    found = []
    for row, label in enumerate(labels):
        chosen = labels != label
        if not chosen.any():
            chosen = torch.arange(len(labels)) != row
        found.append(means[chosen].mean(0) if chosen.any() else means[row])
    return found


def velocity_at(trajectories: Trajectories, t: float) -> Tensor:
    """[M, ...] recorded velocities at a time, by the cubic through the four points around it."""
    times = trajectories.times.double()
    t = max(t, LAST_TIME)
    after = (times >= t).sum(1).clamp(2, times.shape[1] - 2)
    points = after[:, None] + torch.arange(-2, 2)
    near = times.gather(1, points)
    gaps = near[:, :, None] - near[:, None, :] + torch.eye(4)
    factors = ((t - near)[:, None, :].expand(-1, 4, -1) * (1 - torch.eye(4)) + torch.eye(4)).prod(2) / gaps.prod(2)
    rows = torch.arange(len(times))
    parts = [trajectories.velocities[rows, points[:, i]] for i in range(4)]
    return torch.stack([per_sample(f, v) * v for f, v in zip(factors.T, parts, strict=True)]).sum(0)


@dataclass(frozen=True)
class Deviations:
    """How rollouts on the model deviated from their trajectories, by time from 1 down.

    Attributes:
        times: K of them, the first 1, where there is no deviation.
        states: [K, M, D] distance from the trajectory.
        velocities: [K, M, D] difference from the recorded velocity.
    """

    times: Sequence[float]
    states: Tensor
    velocities: Tensor

    def at(self, t: float) -> tuple[Tensor, Tensor]:
        """[M, D] both, between the two times around t."""
        place = float(np.interp(-t, [-time for time in self.times], range(len(self.times))))
        low = min(int(place), len(self.times) - 2)
        share = place - low
        states, velocities = (torch.lerp(part[low], part[low + 1], share) for part in (self.states, self.velocities))
        return states, velocities


def deviations_of(trajectories: SubsampledTrajectories, calls: Sequence[tuple[float, Tensor, Tensor]]) -> Deviations:
    """The deviations of rollouts from the noises of some trajectories.

    Args:
        trajectories: M of them.
        calls: time, state and velocity [M, D, 1, 1] of each model call.
    """
    nothing = torch.zeros(len(trajectories), len(trajectories.index))
    times, states, velocities = [1.0], [nothing], [nothing]
    for t, x, v in calls:
        if t < times[-1]:
            times.append(t)
            states.append((x - trajectories.truth(torch.tensor(t)))[..., 0, 0])
            velocities.append((v - velocity_at(trajectories.trajectories, t))[..., 0, 0])
    return Deviations(times, torch.stack(states), torch.stack(velocities))


def gain_of(deviations: Sequence[Deviations]) -> Gain:
    """The gain by time: the velocities' deviations regressed on the states'."""
    found: dict[float, float] = {}
    for part in deviations:
        for t, states, velocities in zip(part.times, part.states, part.velocities, strict=True):
            if states.square().sum() > 0 and t > 2 * LAST_TIME:
                found[t] = float((velocities * states).sum() / states.square().sum())
    if not found:
        return default_gain
    times = sorted(found)
    return lambda t: float(np.interp(t, times, [found[time] for time in times]))


class Surrogate:
    """A velocity field made of trajectories.

    A state's distance from its trajectory is split into a combination of the rollouts' deviations, whose change of
    velocity is known, and a rest, which changes the velocity by the gain.

    Args:
        trajectories: M of them.
        deviations: of rollouts from the same noises.
    """

    def __init__(self, trajectories: SubsampledTrajectories, deviations: Sequence[Deviations] = ()) -> None:
        self.trajectories, self.deviations = trajectories, deviations
        self.gain = gain_of(deviations)

    def field(self) -> Field:
        """The surrogate as the solver takes it."""
        return Field(self._evaluate, (None,))

    def _evaluate(self, x: Tensor, t: Tensor, branches: int) -> Tensor:
        time = float(t[0])
        distance = (x - self.trajectories.truth(torch.tensor(max(time, LAST_TIME))))[..., 0, 0]
        change = self.gain(time) * distance
        if self.deviations:
            parts = zip(*(part.at(time) for part in self.deviations), strict=True)
            states, velocities = (torch.stack(part, 2) for part in parts)
            gram = states.mT @ states
            size = gram.diagonal(dim1=1, dim2=2).mean(1)
            gram = gram + per_sample(DEVIATION_RIDGE * size + 1e-12, gram) * torch.eye(len(self.deviations))
            shares = torch.linalg.solve(gram, states.mT @ distance[..., None])
            change = change + ((velocities - self.gain(time) * states) @ shares)[..., 0]
        return (velocity_at(self.trajectories.trajectories, time) + change[..., None, None])[None]
