"""A surrogate of the model's velocity field, made of recorded trajectories and a few rollouts; it costs no model calls.

On a trajectory the velocity is the recorded one. A solver of few steps leaves the trajectory, and what comes of its
deviation d depends on how the velocity changes beside the trajectory, v(x + d) = v(x) + J d. For J there is

- a prior: that of a Gaussian with the spectrum of the recorded ends. Along a direction in which data has the variance
  s the velocity's derivative is (t - (1 - t) s) / ((1 - t)^2 s + t^2): 1 / t where there is noise alone, -1 / (1 - t)
  where the data spreads widely;
- what rollouts show: pairs of a deviation and the velocity's change. J is taken to be the prior plus a Gaussian random
  operator, alike at neighbouring times, and its mean given the pairs is used (Gaussian process regression; Rasmussen
  and Williams 2006, equation 2.25).

Only sums over a state's numbers are looked at. So a few hundred cosine coefficients, drawn by how much they change
along a path and weighted so that sums are kept on average, stand for all: a fit costs as much on a large model as on a
small one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..recording.trajectories import Trajectories

# Numbers of each state that are used.
COORDINATES = 384
# Share of the coordinates that are drawn evenly; the others by how much they change.
EVENLY = 0.5
# How far in log(t / (1 - t)) pairs tell of J at other times, and how much of a pair's change of velocity is not linear
# (share of variance).
TIME_SCALE, NONLINEAR = 1.0, 0.02


# --- the coordinates --------------------------------------------------------------------------------------------------


def cosine_basis(size: int) -> Tensor:
    """[size, size] the orthonormal cosine transform (DCT-II), one frequency a row."""
    k = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (k + 0.5) * k[:, None]) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def cosine_transform(x: Tensor) -> Tensor:
    """The cosine coefficients over the last two dimensions of states, in double precision."""
    height, width = x.shape[-2:]
    return cosine_basis(height) @ x.double() @ cosine_basis(width).T


def over_bands(values: Tensor) -> Tensor:
    """Values [C, *spatial] of cosine coefficients, each replaced by the mean over its channel and frequency."""
    height, width = values.shape[-2:]
    rows, columns = (torch.arange(n, dtype=torch.float64) * max(height, width) / n for n in (height, width))
    bands = torch.hypot(rows[:, None], columns).round().long().flatten()
    flat = values.flatten(1, -3).mean(1).flatten(1) if values.ndim == 4 else values.flatten(1)
    total = flat.new_zeros(len(flat), int(bands.max()) + 1)
    counts = total.new_zeros(total.shape[1]).index_add(0, bands, torch.ones(len(bands), dtype=total.dtype))
    means = (total.index_add(1, bands, flat) / counts.clamp_min(1))[:, bands].unflatten(1, (height, width))
    return means[:, None].expand(values.shape) if values.ndim == 4 else means


@dataclass(frozen=True)
class Coordinates:
    """Which numbers of a state are used.

    Attributes:
        index: [D] of its cosine coefficients.
        scale: [D] by which they are multiplied, so that sums of squares are those of the whole state on average.
    """

    index: Tensor
    scale: Tensor

    def of(self, x: Tensor) -> Tensor:
        """States [..., C, *spatial] of M samples -> [M, D], on the CPU in double precision; one after another."""
        rows = [cosine_transform(row.cpu()).flatten()[self.index] * self.scale for row in x]
        return torch.stack(rows)


def draw_coordinates(changes: Tensor, count: int = COORDINATES) -> Coordinates:
    """Coordinates for states whose cosine coefficients change along a path by the mean squares [C, *spatial]."""
    size = changes.numel()
    if size <= count:
        return Coordinates(torch.arange(size), torch.ones(size, dtype=torch.float64))
    shares = over_bands(changes).flatten()
    chances = EVENLY / size + (1 - EVENLY) * shares / shares.sum().clamp_min(1e-30)
    drawn = torch.multinomial(chances, count, replacement=True, generator=torch.Generator().manual_seed(size))
    return Coordinates(drawn, (count * chances[drawn]).rsqrt())


# --- trajectories in coordinates --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subsampled:
    """M trajectories of N points in D coordinates, in memory.

    Attributes:
        coordinates: which.
        times: [M, N] descending.
        states, velocities: [M, N, D].
        variances: [D] of the data.
    """

    coordinates: Coordinates
    times: Tensor
    states: Tensor
    velocities: Tensor
    variances: Tensor

    def ends(self, t: float = 0.0) -> Tensor:
        """[M, D] at t, not before the last point: a straight line from there."""
        return self.states[:, -1] - (self.times[:, -1:] - t) * self.velocities[:, -1]

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """States and velocities [G, M, D] at times [G], before the last point those of the last point.

        States by the cubic through states and velocities around a time, velocities by the cubic through four points.
        """
        points = self.times.shape[1]
        t = torch.maximum(t[:, None], self.times[:, -1])
        after = (self.times >= t[..., None]).sum(-1)
        right = after.clamp(1, points - 1)
        t0, t1 = self._gather(self.times, right - 1), self._gather(self.times, right)
        step, s = (t1 - t0)[..., None], ((t - t0) / (t1 - t0))[..., None]
        x0, x1 = self._gather(self.states, right - 1), self._gather(self.states, right)
        v0, v1 = self._gather(self.velocities, right - 1), self._gather(self.velocities, right)
        near, far = (1 + 2 * s) * (1 - s) ** 2, s**2 * (3 - 2 * s)
        states = near * x0 + far * x1 + step * (s * (1 - s) ** 2 * v0 - s**2 * (1 - s) * v1)
        four = after.clamp(2, points - 2)[..., None] + torch.arange(-2, 2)
        around = self.times[torch.arange(len(self.times))[:, None], four]
        velocities = torch.zeros_like(states)
        for i in range(4):
            factor = torch.ones_like(t)
            for j in range(4):
                if i != j:
                    factor = factor * (t - around[..., j]) / (around[..., i] - around[..., j])
            velocities = velocities + factor[..., None] * self._gather(self.velocities, four[..., i])
        return states, velocities

    def like(self, trajectories: Trajectories, rows: Tensor) -> Subsampled:
        """Other trajectories in the same coordinates."""
        return _read(trajectories, rows, self.coordinates, self.variances)

    @staticmethod
    def _gather(values: Tensor, points: Tensor) -> Tensor:
        """[M, N, ...] at points [G, M] -> [G, M, ...]."""
        return values[torch.arange(len(values)), points]


def subsampled(trajectories: Trajectories, rows: Tensor, count: int = COORDINATES) -> Subsampled:
    """Some trajectories of combined CFG in `count` coordinates; they are read one after another, twice."""
    changes: Tensor | None = None
    ends: list[Tensor] = []
    for row in rows.tolist():
        velocities = cosine_transform(trajectories.velocities[row])
        squares = velocities.diff(dim=0).square().mean(0)
        changes = squares if changes is None else changes + squares
        last = trajectories.states[row][-1:].double() - trajectories.times[row, -1] * trajectories.velocities[row][-1:]
        ends.append(cosine_transform(last)[0])
    if changes is None:
        raise ValueError("There are no trajectories to make a surrogate of.")
    coordinates = draw_coordinates(changes, count)
    data = torch.stack(ends)
    variances = over_bands((data - data.mean(0)).square().mean(0) * len(data) / max(1, len(data) - 1))
    return _read(trajectories, rows, coordinates, variances.flatten()[coordinates.index])


def _read(trajectories: Trajectories, rows: Tensor, coordinates: Coordinates, variances: Tensor) -> Subsampled:
    states, velocities = (
        torch.stack([coordinates.of(part[row]) for row in rows.tolist()])
        for part in (trajectories.states, trajectories.velocities)
    )
    return Subsampled(coordinates, trajectories.times[rows].double(), states, velocities, variances)


# --- the surrogate ----------------------------------------------------------------------------------------------------


def warped(t: Tensor) -> Tensor:
    """log(t / (1 - t)), finite at the ends: in it a velocity field changes about evenly."""
    return torch.logit(t, eps=0.003)


@dataclass
class Surrogate:
    """A velocity field made of trajectories.

    Attributes:
        trajectories: M of them.
        pairs: of each trajectory: (time, deviation [D], change of velocity [D]) that rollouts showed.
    """

    trajectories: Subsampled
    pairs: list[list[tuple[float, Tensor, Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pairs = self.pairs or [[] for _ in range(len(self.trajectories.times))]
        self._known: tuple[Tensor, Tensor, Tensor] | None = None

    def learn(self) -> None:
        """Take in the pairs that were added."""
        most = max(map(len, self.pairs))
        if not most:
            return
        samples, count, size = len(self.pairs), most, len(self.trajectories.variances)
        times = torch.full((samples, count), 0.5, dtype=torch.float64)
        deviations, changes = (torch.zeros(samples, count, size, dtype=torch.float64) for _ in range(2))
        for m, pairs in enumerate(self.pairs):
            for i, (t, deviation, change) in enumerate(pairs):
                times[m, i], deviations[m, i], changes[m, i] = t, deviation, change
        rest = changes - self.prior(times) * deviations
        alike = _alike(warped(times)[:, :, None] - warped(times)[:, None])
        gram = alike * (deviations @ deviations.mT)
        squares = deviations.square().sum(-1)
        gram = gram + torch.diag_embed(NONLINEAR * squares + 1e-9 * squares.mean() + 1e-30)
        self._known = times, deviations, torch.linalg.solve(gram, rest)

    def part(self, rows: Tensor) -> Surrogate:
        """Of some of the trajectories, with what was learned of them."""
        own = self.trajectories
        times, states, velocities = (values[rows] for values in (own.times, own.states, own.velocities))
        found = Surrogate(replace(own, times=times, states=states, velocities=velocities))
        if self._known is not None:
            at, deviations, shares = self._known
            found._known = at[rows], deviations[rows], shares[rows]
        return found

    def prior(self, t: Tensor) -> Tensor:
        """[..., D] derivative of the velocity at times [...], if data were Gaussian."""
        t, s = t[..., None], self.trajectories.variances
        return (t - (1 - t) * s) / ((1 - t) ** 2 * s + t**2)

    def change(self, t: Tensor, deviations: Tensor) -> Tensor:
        """The velocities' changes [G, M, D] at times [G] for deviations [G, M, D] from the trajectories."""
        found = self.prior(t)[:, None] * deviations
        if self._known is not None:
            times, known, shares = self._known
            alike = _alike(warped(t)[:, None, None] - warped(times))
            products = torch.einsum("gmd,mnd->gmn", deviations, known) * alike
            found = found + torch.einsum("gmn,mnd->gmd", products, shares)
        return found

    def end_errors(
        self,
        times: Tensor,
        weights: Tensor,
        extra: Tensor | None = None,
        network: Tensor | None = None,
        predictions: Tensor | None = None,
    ) -> Tensor:
        """How far linear multistep methods end from the trajectories' ends.

        Args:
            times, weights: [G, N + 1], [G, N, N] of G methods, see `LinearForm`.
            extra: [N, M, D] what is added to the velocity of each call, whatever its state; see `Rollout`.
            network: [G, N] how much of `predictions` is added, see `LinearForm`.
            predictions: [N, M, D] what a SideNet predicts of each step, whatever its state; see `Rollout`.

        Returns:
            [G, M, D].
        """
        noise = self.trajectories.states[:, 0]
        x = noise.expand(len(times), *noise.shape)
        velocities: list[Tensor] = []
        for k in range(weights.shape[1]):
            states, v = self.trajectories.at(times[:, k])
            v = v + self.change(times[:, k], x - states) if k else v
            velocities.append(v if extra is None else v + extra[k])
            x = noise + torch.einsum("gj,gjmd->gmd", weights[:, k, : k + 1], torch.stack(velocities, 1))
            if network is not None and predictions is not None:
                x = x + torch.einsum("gj,jmd->gmd", network[:, : k + 1], predictions[: k + 1])
        return x - self.trajectories.ends(float(times[0, -1]))


def _alike(distance: Tensor) -> Tensor:
    return torch.exp(-0.5 * (distance / TIME_SCALE) ** 2)


def mean_error(errors: Tensor, size: int) -> Tensor:
    """[...] mean over samples of the RMSE, from errors [..., M, D] of states with `size` numbers."""
    return (errors.square().sum(-1) / size).sqrt().mean(-1)
