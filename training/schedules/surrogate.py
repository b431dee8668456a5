"""The recorded paths in the model's place: what its velocity would be on them and near them, without a call.

On a path the velocity is what was recorded. A solver of few steps leaves the path, and what its early errors grow to is
decided by how the velocity changes beside it. That is learned from a few real runs: where they left the path they saw
both, how far and by how much the velocity was another. So many grids can be tried at no cost, and what comes out is
weighted on real runs afterwards.

Nothing here looks at one number of a state beside another, but for sums over all of them. So a few hundred numbers of
each state, drawn at random, stand for all, and a search costs as much on a large model as on a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...bas_core.guidance import Field
from ...bas_core.prediction import StraightLine
from ...bas_core.sidenet import spread_mean
from ..network.new_sidenet import pooled
from ..recording.reference_solver import LAST_TIME
from ..recording.trajectories import Trajectories

# Numbers of each state that are kept.
KEPT = 512
# Before anything is known of a model: how the velocity changes beside the path, over the distance from it. Deviations
# along what is about to be decided grow; on the models looked at by 2 to 3 in the middle of the path, and hardly in its
# first part (see docs/training.md).
USUAL_GAIN, GAIN_FROM = -3.0, 0.1
# Of the mean square of what was seen beside the path: seen twice, it is nearly the same twice.
RIDGE = 0.1

Gain = Callable[[float], float]


def usual_gain(t: float) -> float:
    """The gain that is taken for a model of which nothing is known."""
    return USUAL_GAIN * min(1.0, (1 - t) / GAIN_FROM)


class MeanLine(StraightLine):
    """A straight line through two anchors, and a first velocity from the mean of the data [D, 1, 1], or one a run."""

    has_data_mean = True

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def analytic_velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """See `SideNet.analytic_velocity`."""
        return (x - self.mean) / t.to(x)


@dataclass(frozen=True)
class SubsampledTrajectories:
    """Recorded paths, subsampled.

    Attributes:
        trajectories: M runs in memory; states and velocities [M, N + 1, D, 1, 1].
        index: [D] which numbers of a state were kept.
        means: [M, D, 1, 1] the mean of the data as other conditions' runs show it, or None where it is not known.
    """

    trajectories: Trajectories
    index: Tensor
    means: Tensor | None

    def __len__(self) -> int:
        return len(self.trajectories)

    def first(self, count: int) -> SubsampledTrajectories:
        """The first runs."""
        return SubsampledTrajectories(
            self.trajectories.rows(slice(None, count)), self.index, None if self.means is None else self.means[:count]
        )

    def thin(self, x: Tensor) -> Tensor:
        """States [M, ...] as they are kept: [M, D, 1, 1]."""
        return x.flatten(1)[:, self.index.to(x.device), None, None].cpu().float()

    def truth(self, t: Tensor) -> Tensor:
        """[M, D, 1, 1] states at time t."""
        return self.trajectories.truth(torch.arange(len(self)), t)


def subsampled(
    trajectories: Trajectories, rows: Tensor, data_mean_size: int, kept: int = KEPT
) -> SubsampledTrajectories:
    """Some of the runs, subsampled; of each but the part that is kept is read and forgotten.

    Args:
        trajectories: guided ones.
        rows: which.
        data_mean_size: side of the grid that the mean of the data is kept on; 0 = it is not kept.
        kept: how many numbers of each state.
    """
    shape = trajectories.states.shape[2:]
    size = int(np.prod(shape))
    index = torch.randperm(size, generator=torch.Generator().manual_seed(size))[:kept]
    parts: list[tuple[Tensor, Tensor]] = []
    firsts: list[Tensor] = []
    for row in rows.tolist():
        states, velocities = trajectories.states[row].float(), trajectories.velocities[row].float()
        parts.append((states.flatten(1)[:, index], velocities.flatten(1)[:, index]))
        firsts += [pooled(states[0] - velocities[0], data_mean_size)] if data_mean_size else []
    x, v = (torch.stack(part)[..., None, None] for part in zip(*parts, strict=True))
    labels = trajectories.labels[rows]
    means = None
    if data_mean_size:
        others = [spread_mean(mean, shape).flatten()[index] for mean in means_of_others(torch.stack(firsts), labels)]
        means = torch.stack(others)[..., None, None]
    return SubsampledTrajectories(Trajectories(trajectories.times[rows], x, v, labels), index, means)


def means_of_others(firsts: Tensor, labels: Tensor) -> list[Tensor]:
    """For each run the mean [C, H, W] of what runs of other conditions show, or of other runs where all are alike."""
    found = []
    for row, label in enumerate(labels):
        chosen = labels != label
        if not chosen.any():
            chosen = torch.arange(len(labels)) != row
        found.append(firsts[chosen].mean(0) if chosen.any() else firsts[row])
    return found


def velocity_at(trajectories: Trajectories, t: float) -> Tensor:
    """[M, ...] recorded velocities at a time, by the cubic through the four points around it."""
    times = trajectories.times.double()
    t = max(t, LAST_TIME)
    after = (times >= t).sum(1).clamp(2, times.shape[1] - 2)
    at = after[:, None] + torch.arange(-2, 2)
    near = times.gather(1, at)
    apart = near[:, :, None] - near[:, None, :] + torch.eye(4)
    weights = ((t - near)[:, None, :].expand(-1, 4, -1) * (1 - torch.eye(4)) + torch.eye(4)).prod(2) / apart.prod(2)
    rows = torch.arange(len(times))
    parts = [trajectories.velocities[rows, at[:, i]] for i in range(4)]
    return sum(
        (w.float().view(-1, *[1] * (v.ndim - 1)) * v for w, v in zip(weights.T, parts, strict=True)),
        torch.zeros_like(parts[0]),
    )


@dataclass(frozen=True)
class Deviations:
    """What real runs saw beside the paths, by time from 1 down.

    Attributes:
        times: K of them, the first 1, where a run has not left its path.
        away: [K, M, D] how far they were from the path.
        change: [K, M, D] by how much the velocity was another than on it.
    """

    times: Sequence[float]
    away: Tensor
    change: Tensor

    def at(self, t: float) -> tuple[Tensor, Tensor]:
        """[M, D] both, between the two times around t."""
        place = float(np.interp(-t, [-time for time in self.times], range(len(self.times))))
        low = min(int(place), len(self.times) - 2)
        share = place - low
        away, change = ((1 - share) * part[low] + share * part[low + 1] for part in (self.away, self.change))
        return away, change


def deviations_of(subsampled: SubsampledTrajectories, calls: Sequence[tuple[float, Tensor, Tensor]]) -> Deviations:
    """What the calls of real runs from the subsampled' noises saw.

    Args:
        subsampled: the paths of these runs.
        calls: time, state and velocity [M, D, 1, 1] of each.
    """
    nothing = torch.zeros(len(subsampled), len(subsampled.index))
    times, away, change = [1.0], [nothing], [nothing]
    for t, x, v in calls:
        if t < times[-1]:
            times.append(t)
            away.append((x - subsampled.truth(torch.tensor(t)))[..., 0, 0])
            change.append((v - velocity_at(subsampled.trajectories, t))[..., 0, 0])
    return Deviations(times, torch.stack(away), torch.stack(change))


def gain_of(seen: Sequence[Deviations]) -> Gain:
    """By time, the share of the distance from the path that the velocity changes by, over all runs that saw some."""
    found: dict[float, float] = {}
    for part in seen:
        for t, away, change in zip(part.times, part.away, part.change, strict=True):
            if away.square().sum() > 0 and t > 2 * LAST_TIME:
                found[t] = float((change * away).sum() / away.square().sum())
    if not found:
        return usual_gain
    times = sorted(found)
    return lambda t: float(np.interp(t, times, [found[time] for time in times]))


class Surrogate:
    """A velocity field made of paths alone.

    A state's distance from its path is split in what real runs have seen there, whose change of velocity is known, and
    the rest, which changes it by the gain.

    Args:
        subsampled: the paths.
        seen: what real runs from the same noises saw beside them.
    """

    def __init__(self, subsampled: SubsampledTrajectories, seen: Sequence[Deviations] = ()) -> None:
        self.subsampled, self.seen = subsampled, seen
        self.gain = gain_of(seen)

    def field(self) -> Field:
        """It as the solver takes it."""
        return Field(self._evaluate, (None,))

    def _evaluate(self, x: Tensor, t: Tensor, branches: int) -> Tensor:
        time = float(t[0])
        away = (x - self.subsampled.truth(torch.tensor(max(time, LAST_TIME))))[..., 0, 0]
        change = self.gain(time) * away
        if self.seen:
            known, changes = (torch.stack(part, 2) for part in zip(*(seen.at(time) for seen in self.seen), strict=True))
            gram = known.mT @ known
            size = gram.diagonal(dim1=1, dim2=2).mean(1)
            gram = gram + (RIDGE * size + 1e-12)[:, None, None] * torch.eye(len(self.seen))
            shares = torch.linalg.solve(gram, known.mT @ away[..., None])
            change = change + ((changes - self.gain(time) * known) @ shares)[..., 0]
        return (velocity_at(self.subsampled.trajectories, time) + change[..., None, None])[None]
