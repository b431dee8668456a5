"""Training examples from trajectories: the solver's queries of the SideNet, with recorded velocities as answers.

All ordered pairs (or triples, with a second anchor) of a trajectory's points are usable, in both directions. Those are
drawn that the solver asks for: a number of steps, a grid and an interval of it are drawn at random, and each query
(forward predictor, backward corrector) is moved to the nearest recorded points. Where the first step is analytic, the
anchor's velocity at t = 1 is the analytic one instead of the recorded one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...bas_core.flow import per_sample
from ...bas_core.grids import grid_between, has_short_first_step, time_grid
from ...bas_core.quadrature import Rule
from ..recording.trajectories import Points, Trajectories

KINDS = ("between", "beyond", "first", "last")


@dataclass(frozen=True)
class Examples:
    """A batch of SideNet queries.

    Attributes:
        x, v: [B, C, *spatial] at the near anchor.
        t: [B] its time.
        h: [B] step to the target, positive toward the data.
        slope: [B, C, *spatial] change of velocity per unit of h between the anchors; 0 without a second anchor.
        span: [B] step to the second anchor; 0 without one.
        target: [B, C, *spatial] recorded velocity at t - h.
        labels: [B].
        kinds: [B] indices into `KINDS`.
        scales: [B] CFG scales; None = all alike.
    """

    x: Tensor
    v: Tensor
    t: Tensor
    h: Tensor
    slope: Tensor
    span: Tensor
    target: Tensor
    labels: Tensor
    kinds: Tensor
    scales: Tensor | None = None

    def apply(self, function: Callable[[Tensor], Tensor]) -> Examples:
        """The examples with a function applied to every column, such as one that moves or selects them."""
        columns: dict[str, Any] = {
            name: None if value is None else function(value) for name, value in vars(self).items()
        }
        return Examples(**columns)

    def straight_line(self) -> Tensor:
        """What the multistep method predicts: the line through the anchors."""
        return self.v + self.slope * per_sample(self.h, self.v)


@dataclass(frozen=True)
class QueryRange:
    """Which queries to draw.

    Attributes:
        nfe: fewest and most model calls.
        shift: lowest and highest time shift of the grids (drawn log-uniformly).
        cosine: lowest and highest cosine blend.
        ascending: share of examples in the other direction (toward noise), for inversion.
        part: the times from and to which samplings go.
        analytic_first_step: share of the samplings with an analytic first step, of those whose first interval is short.
    """

    nfe: tuple[int, int] = (4, 12)
    shift: tuple[float, float] = (0.8, 3.5)
    cosine: tuple[float, float] = (-0.3, 0.6)
    ascending: float = 0.1
    part: tuple[float, float] = (1.0, 0.0)
    analytic_first_step: float = 0.0


class Queries(NamedTuple):
    """Times to query at.

    Attributes:
        times: [B, 3] of (near anchor, second anchor, target); without a second anchor, its time is the first's.
        kinds: [B] indices into `KINDS`.
        analytic: [B] whether the sampling has an analytic first step.
    """

    times: Tensor
    kinds: Tensor
    analytic: Tensor

    def of(self, rows: Tensor) -> Queries:
        """Some of them."""
        return Queries(*(column[rows] for column in self))


def draw_queries(rule: Rule, anchors: int, count: int, ranges: QueryRange, generator: torch.Generator) -> Queries:
    """Draw queries: for each a sampling, and one of its queries."""
    uniform = torch.rand(count, 6, generator=generator)
    rows: list[tuple[float, float, float]] = []
    kinds: list[int] = []
    analytic: list[bool] = []
    ahead = [c for c in rule.nodes if c > 0]
    inner = [c for c in rule.nodes if 0 < c < 1]
    low, high = ranges.nfe
    for a, b, c, d, e, f in uniform.tolist():
        intervals = low + int(a * (high - low + 1 + bool(ranges.analytic_first_step)))
        shift = ranges.shift[0] * (ranges.shift[1] / ranges.shift[0]) ** b
        cosine = ranges.cosine[0] + c * (ranges.cosine[1] - ranges.cosine[0])
        grid = grid_between(time_grid(intervals, shift, cosine), *ranges.part).tolist()
        last = intervals - 1
        # All queries of a sampling are equally likely, but those of the first interval, where one anchor must do, come
        # three times as often.
        queries = [(i, node, True) for i in (0, 0, *range(intervals)) for node in ahead]
        queries += [(i, node, False) for i in range(last) for node in inner if anchors == 2 or node > 0.5]
        i, node, forward = queries[int(d * len(queries))]
        if e < ranges.ascending:
            grid = grid[::-1]
        analytic.append(f < ranges.analytic_first_step and has_short_first_step(grid))
        left, right = grid[i], grid[i + 1]
        target = left + node * (right - left)
        if forward:
            near, far = left, (grid[i - 1] if i and anchors == 2 else left)
            kind = "last" if i == last else "first" if i == 0 else "beyond"
        else:
            near, far = (left, right) if node <= 0.5 else (right, left)
            far, kind = (far if anchors == 2 else near), "between"
        rows.append((near, far, target))
        kinds.append(KINDS.index(kind))
    return Queries(torch.tensor(rows), torch.tensor(kinds), torch.tensor(analytic))


@dataclass(frozen=True)
class Drawn:
    """A batch whose states are not read yet.

    Attributes:
        sources: trajectories, the queries that they answer, and a row for each query.
        mean: of the data, [C, *spatial]; for analytic first steps.
    """

    sources: Sequence[tuple[Trajectories, Queries, Tensor]]
    mean: Tensor | None

    def read(self, part: Callable[[Tensor], Tensor] = lambda rows: rows) -> Examples:
        """The examples, or those whose numbers `part` picks out of all; the others are not read."""
        wanted = torch.zeros(sum(len(rows) for _, _, rows in self.sources), dtype=torch.bool)
        wanted[part(torch.arange(len(wanted)))] = True
        masks = wanted.split([len(rows) for _, _, rows in self.sources])
        parts = [
            read_examples(source, queries.of(chosen), rows[chosen], self.mean)
            for (source, queries, rows), chosen in zip(self.sources, masks, strict=True)
            if chosen.any()
        ]
        columns = zip(*(vars(each).values() for each in parts), strict=True)
        batch: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        return Examples(*batch)


def draw_examples(
    trajectories: Trajectories,
    rule: Rule,
    anchors: int,
    count: int,
    ranges: QueryRange,
    generator: torch.Generator,
    prefixes: Trajectories | None = None,
    mean: Tensor | None = None,
) -> Drawn:
    """Draw a batch of training examples; see the module's docstring.

    Args:
        trajectories: whole ones.
        rule, anchors: whose queries are drawn.
        count: B.
        ranges: see `QueryRange`.
        generator: of the draws.
        prefixes: they answer the queries within their stretch. At t = 1 the velocity hardly depends on the noise; the
            SideNet must read the trajectory off the noise itself, which takes many different noises to learn.
        mean: of the data, [C, *spatial]; for analytic first steps.
    """
    queries = draw_queries(rule, anchors, count, ranges, generator)
    early = torch.zeros(count, dtype=torch.bool)
    if prefixes is not None:
        early = queries.times.amin(1) >= prefixes.times[:, -1].max()
    sources = []
    for source, chosen in ((prefixes, early), (trajectories, ~early)):
        if source is not None and chosen.any():
            rows = torch.randint(len(source), (int(chosen.sum()),), generator=generator)
            sources.append((source, queries.of(chosen), rows))
    return Drawn(sources, mean)


def read_examples(trajectories: Trajectories, queries: Queries, rows: Tensor, mean: Tensor | None = None) -> Examples:
    """Answer queries, each from the trajectory of its row."""
    wanted = queries.times
    times = trajectories.times[rows]
    near, far, target = (nearest(times, wanted[:, i]) for i in range(3))
    # Rounding to recorded points must not move the target onto an anchor, nor the second anchor onto the first.
    target = step_off(target, near, wanted[:, 2] < wanted[:, 0], times.shape[1])
    alone = (wanted[:, 0] == wanted[:, 1]) | (near == far)

    def at(values: Points, index: Tensor) -> Tensor:
        return values[rows, index]

    def anchor_velocities(index: Tensor) -> Tensor:
        v = at(trajectories.velocities, index)
        first = (queries.analytic & (index == 0)).nonzero()[:, 0]
        if mean is not None and len(first):
            v[first] = trajectories.states[rows[first], index[first]] - mean
        return v

    t = at(trajectories.times, near)
    span = torch.where(alone, 0.0, t - at(trajectories.times, far))
    v = anchor_velocities(near)
    per_step = torch.where(alone, 0.0, 1 / torch.where(alone, 1.0, span))
    slope = (anchor_velocities(far) - v) * per_sample(per_step, v)
    return Examples(
        x=at(trajectories.states, near),
        v=v,
        t=t,
        h=t - at(trajectories.times, target),
        slope=slope,
        span=span,
        target=at(trajectories.velocities, target),
        labels=trajectories.labels[rows],
        kinds=queries.kinds,
        scales=None if trajectories.scales is None else trajectories.scales[rows],
    )


def nearest(times: Tensor, wanted: Tensor) -> Tensor:
    """Index of the point of each trajectory nearest to the wanted time: [B, P], [B] -> [B]."""
    return (times - wanted[:, None]).abs().argmin(dim=1)


def step_off(index: Tensor, near: Tensor, toward_data: Tensor, points: int) -> Tensor:
    """Move an index that equals the anchor's by one, in the direction that it should lie in, or back at an end."""
    moved = torch.where(toward_data, near + 1, near - 1)
    moved = torch.where(moved == points, near - 1, moved).abs()
    return torch.where(index == near, moved, index)
