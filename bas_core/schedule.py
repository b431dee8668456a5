"""A schedule: what was fitted for sampling in a number of steps. It acts on the solver through one hook.

A SideNet's file holds schedules by CFG scale and number of model calls (`SideNetCard.schedules`).

    images = solve(field, sidenet, noise, card.schedules_for(2.0)[5])

Beside its times a schedule may hold

- *multistep coefficients*. The bi-anchor step knows two velocities, and what the SideNet makes of them. A linear
  multistep method weights all velocities so far. Both fit together: each step adds to its state a few differences that
  are zero where the velocity does not change, and a share of the step itself: a few-step sampler that goes a little
  farther or less far than the times say ends nearer. All coefficients zero is the published solver.
- *conditional-only calls*. CFG doubles every call, v = v_u + scale (v_c - v_u), and v_c - v_u changes less along a path
  than the velocity does. At some calls the unconditional branch is left out and the difference predicted from earlier
  calls, as linear adaptive guidance does (Castillo et al. 2023, arXiv 2312.12487). The NFE saved buy another step.
- an *analytic first step*. At t = 1 the velocity is the noise minus the mean of the data, and hardly more: a SideNet
  that keeps this mean replaces the first model call.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import as_grid, grid_between, has_short_first_step
from .guidance import Field
from .quadrature import get_rule

Row = Sequence[float]
Numbers = tuple[float, ...]

# A row's first coefficient that takes away what the SideNet made of the step.
DROPPED = -1.0


# --- the hook ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepState:
    """A state that the bi-anchor step is about to go on with.

    Attributes:
        index: the step's number from 0.
        last: whether the step is the last one, which ends after its predictor.
        x: [B, C, *spatial] the new state, at s.
        x_start: [B, C, *spatial] the state at t.
        t, s: times of the step's ends.
        velocity: [B, C, *spatial] guided velocity at t.
        predicted, end_velocity: after the corrector, the predictor's state and the guided velocity there; else None.
    """

    index: int
    last: bool
    x: Tensor
    x_start: Tensor
    t: float
    s: float
    velocity: Tensor
    predicted: Tensor | None = None
    end_velocity: Tensor | None = None

    @property
    def accepted(self) -> bool:
        """Whether x is the step's result, or the predictor's state where the model is called."""
        return self.last or self.predicted is not None


class StepHook:
    """What acts on the solver's steps from outside; this one changes nothing. One object serves one sampling."""

    def call_model(self, field: Field, index: int, x: Tensor, t: float, branches: int) -> Tensor:
        """The model call at anchor number `index`: [K, B, C, *spatial] velocities at (x, t)."""
        return field(x, t, branches)

    def asks_sidenet(self, index: int, corrector: bool) -> bool:
        """Whether what the SideNet predicts for the predictor, or the corrector, of step number `index` is used."""
        return True

    def adjust(self, state: StepState) -> Tensor:
        """The state [B, C, *spatial] to go on with, after a predictor or a corrector."""
        return state.x


class RunningSums:
    """Weighted sums of tensors that come one after another; as few of them as possible stay in memory.

    Kept are the tensors that sums to come have weights for or, where these are fewer, those sums as far as they go.

    Args:
        weights: for each sum, in the order in which they are taken, the weights by number of the tensor.
    """

    def __init__(self, weights: Sequence[Mapping[int, float]]) -> None:
        self.weights = list(weights)
        self.kept: list[Tensor] = []
        # For each sum to come, the weights of what is kept.
        self.shares: list[list[float]] = [[] for _ in weights]

    def add(self, number: int, tensor: Tensor) -> None:
        """The next tensor."""
        self.kept.append(tensor)
        for weights, share in zip(self.weights, self.shares, strict=True):
            share.append(weights.get(number, 0.0))
        self._forget()

    def take(self) -> Tensor | None:
        """The next sum, of the tensors so far; None where all weights are zero."""
        self.weights.pop(0)
        total = self._sum(self.shares.pop(0))
        self._forget()
        return total

    def _forget(self) -> None:
        used = [i for i in range(len(self.kept)) if any(share[i] for share in self.shares)]
        self.kept = [self.kept[i] for i in used]
        self.shares = [[share[i] for i in used] for share in self.shares]
        unfinished = [share for share in self.shares if any(share)]
        if len(self.kept) > len(unfinished):
            self.kept = [total for share in unfinished if (total := self._sum(share)) is not None]
            places = iter(range(len(unfinished)))
            rows = [next(places) if any(share) else None for share in self.shares]
            self.shares = [[float(i == row) for i in range(len(self.kept))] for row in rows]

    def _sum(self, share: Sequence[float]) -> Tensor | None:
        total = None
        for weight, tensor in zip(share, self.kept, strict=True):
            if weight:
                total = weight * tensor if total is None else torch.add(total, tensor, alpha=weight)
        return total


def velocity_weights(coefficients: Sequence[Row]) -> list[dict[int, float]]:
    """For each row of multistep coefficients, the weights of the anchors' velocities; see `Schedule.coefficients`."""
    found = []
    for number, row in enumerate(coefficients):
        step, corrected = divmod(number, 2)
        others = [j for j in range(step + 1 + corrected) if j != step]
        weights = dict(zip(others, row[1 + corrected : -1], strict=True))
        found.append(weights | {step: row[-1] - sum(weights.values())})
    return found


def branch_weights(cfg_coefficients: Sequence[Row]) -> list[dict[int, float]]:
    """For each conditional-only call, the weights of the calls' v_c - v_u (numbers 0, 2 …) and v_c (1, 3 …)."""
    found: list[dict[int, float]] = []
    complete: list[int] = []
    for call, row in enumerate(cfg_coefficients):
        if len(row):
            changes = row[len(complete) :]
            differences = {2 * j: w for j, w in zip(complete, row, strict=False)}
            found.append(differences | {2 * j + 1: -w for j, w in zip(range(call), changes, strict=True)})
        else:
            complete.append(call)
    return found


class ScheduleHook(StepHook):
    """Multistep coefficients and conditional-only calls in a sampling.

    Args:
        coefficients, cfg_coefficients: see `Schedule`.
        steps: N.
    """

    def __init__(self, coefficients: Sequence[Row], cfg_coefficients: Sequence[Row], steps: int) -> None:
        self.coefficients = coefficients
        self.conditional_only = [len(row) > 0 for row in cfg_coefficients]
        self.first_call = steps - len(cfg_coefficients)
        self.velocities = RunningSums(velocity_weights(coefficients))
        self.branches = RunningSums(branch_weights(cfg_coefficients))
        # The weight of a conditional-only call's own v_c in its prediction.
        self.own_weights = [-sum(w for j, w in row.items() if j % 2) for row in self.branches.weights]

    def call_model(self, field: Field, index: int, x: Tensor, t: float, branches: int) -> Tensor:
        """See `StepHook`; a conditional-only call where the schedule has coefficients for it."""
        call = index - self.first_call
        if call < 0 or not field.can_omit_unconditional:
            return field(x, t, branches)
        if self.conditional_only[call]:
            conditional, difference = self.predict_difference(field, call, x, t)
            both = torch.stack([conditional, conditional - difference])
            self.keep(call, conditional)
        else:
            both = field.call_model(x, t, 2)
            self.keep(call, both[0], both[0] - both[1])
        return field.cfg.combine(both, t)[None] if field.combined else both

    def predict_difference(self, field: Field, call: int, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """A conditional-only call: the conditional velocity and the predicted v_c - v_u."""
        conditional = field.call_conditional(x, t)
        others, own = self.branches.take(), self.own_weights.pop(0) * conditional
        return conditional, own if others is None else own + others

    def keep(self, call: int, conditional: Tensor, difference: Tensor | None = None) -> None:
        """Keep what a call showed, for conditional-only ones after it."""
        if difference is not None:
            self.branches.add(2 * call, difference)
        self.branches.add(2 * call + 1, conditional)

    def asks_sidenet(self, index: int, corrector: bool) -> bool:
        """See `StepHook`; not where the coefficients take it away again."""
        return not self.coefficients or self.coefficients[2 * index + corrector][0] != DROPPED

    def adjust(self, state: StepState) -> Tensor:
        """See `StepHook`; the state plus its weighted regressors."""
        if not self.coefficients:
            return state.x
        if state.predicted is None:
            if state.index == 0:
                self.velocities.add(0, state.velocity)
        elif state.end_velocity is not None:
            self.velocities.add(state.index + 1, state.end_velocity)
        row = self.coefficients[2 * state.index + (state.predicted is not None)]
        length = state.s - state.t
        straight = torch.add(state.x_start, state.velocity, alpha=length)
        x = torch.lerp(state.x, straight, -row[0]) if row[0] else state.x
        if state.predicted is not None and row[1]:
            x = torch.add(x, state.predicted - straight, alpha=row[1])
        total = self.velocities.take()
        return x if total is None else torch.add(x, total, alpha=length)


# --- the schedule -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Times of a sampling, and what was fitted on them. Sequences are kept as tuples of floats.

    Attributes:
        times: N + 1, descending (to sample) or ascending (to invert), within [0, 1].
        coefficients: 2 N - 1 rows of multistep coefficients, for each step i one after its predictor and one after its
            corrector. They weight what may be added to the state: with d = s - t and p = x_t + d v_i the end of a
            straight path, x - p; after the corrector also the predictor's state less p; d (v_j - v_i) for every
            other anchor j, the step's end included; and d v_i. All but the last are zero where the velocity is
            constant. Empty: the published solver.
        cfg_coefficients: one row for each of the last model calls: empty for a call of both branches, else the
            coefficients of a conditional-only call. They weight what v_c - v_u is predicted from: itself at earlier
            calls of both branches, and the change of v_c since every earlier call. Empty: both, always.
        analytic_first_step: a SideNet with a data mean replaces the first model call. For random noise only: noise
            from an inversion leads to its image and not to the mean.
        rule: name of the quadrature rule that the coefficients were fitted for; one with both ends.

    Raises:
        ValueError: the parts do not fit each other; the message says which, what was required and what came.
    """

    times: Sequence[float]
    coefficients: Sequence[Sequence[float]] = ()
    cfg_coefficients: Sequence[Sequence[float]] = ()
    analytic_first_step: bool = False
    rule: str = "lobatto4"

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", _numbers(self.times))
        for name in ("coefficients", "cfg_coefficients"):
            object.__setattr__(self, name, tuple(_numbers(row) for row in getattr(self, name)))
        if not get_rule(self.rule).has_both_ends:
            raise ValueError(f"A schedule needs a rule whose nodes include 0 and 1, such as lobatto4; got {self.rule}.")
        first = float(as_grid(torch.stack(self.grid))[0])
        if self.analytic_first_step and first != 1:
            raise ValueError(f"An analytic first step starts from pure noise, t = 1; these times start at {first:.4g}.")
        if self.coefficients:
            _check_coefficients(self.coefficients, self.steps)
        if self.cfg_coefficients:
            _check_cfg_coefficients(self.cfg_coefficients, self.steps, self.calls)

    @property
    def grid(self) -> tuple[Tensor, ...]:
        """N + 1 0-d times on the CPU, in float32."""
        return tuple(torch.tensor(self.times, dtype=torch.float32))

    @property
    def steps(self) -> int:
        """N."""
        return len(self.times) - 1

    @property
    def calls(self) -> int:
        """How often the model is called: once a step, less an analytic first step."""
        return self.steps - self.analytic_first_step

    @property
    def conditional_only(self) -> int:
        """How many of the calls leave out the unconditional branch."""
        return sum(len(row) > 0 for row in self.cfg_coefficients)

    @property
    def nfe(self) -> float:
        """Function evaluations; a conditional-only call counts one half."""
        return self.calls - self.conditional_only / 2

    @property
    def fitted(self) -> bool:
        """Whether the schedule holds more than times."""
        return bool(self.coefficients or self.cfg_coefficients)

    def hook(self) -> ScheduleHook:
        """What acts on the steps of one sampling."""
        return ScheduleHook(self.coefficients, self.cfg_coefficients, self.steps)

    def with_times(self, times: Sequence[float] | Tensor) -> Schedule:
        """The same schedule over times that were rounded or scaled; its first step is analytic from t = 1 only."""
        analytic = self.analytic_first_step and float(times[0]) == 1
        return dataclasses.replace(self, times=_numbers(times), analytic_first_step=analytic)

    def scaled(self, start: float, end: float = 0.0) -> Schedule:
        """The same schedule from another time than 1, where a model's sampling starts below it, or to another than 0,
        for a part of the path."""
        if (start, end) == (1, 0):
            return self
        return self.with_times(grid_between(torch.tensor(self.times, dtype=torch.float32), start, end))


def _numbers(values: Row | Tensor) -> Numbers:
    if isinstance(values, Tensor):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"A schedule's times and coefficients are sequences of numbers; got {type(values).__name__}.")
    return tuple(float(value) for value in values)


def _check_coefficients(rows: Sequence[Row], steps: int) -> None:
    """Refuse rows that do not fit so many steps."""
    expected = [2 + i // 2 + 2 * (i % 2) for i in range(2 * steps - 1)]
    lengths = [len(row) for row in rows]
    if lengths != expected:
        raise ValueError(f"Coefficients for {steps} steps come in rows of {expected} numbers; got {lengths}.")
    if not all(math.isfinite(value) for row in rows for value in row):
        raise ValueError("Coefficients must be finite.")


def _check_cfg_coefficients(rows: Sequence[Row], steps: int, calls: int) -> None:
    """Refuse rows that do not fit so many steps and model calls."""
    lengths = [len(row) for row in rows]
    complete = [sum(not length for length in lengths[:i]) for i in range(len(lengths))]
    expected = [length and complete[i] + i for i, length in enumerate(lengths)]
    if not steps - 1 <= len(rows) <= calls or lengths != expected:
        raise ValueError(
            f"CFG coefficients for {calls} model calls come in as many rows, or one fewer, the first of them empty. A "
            "row has one number for each earlier call and one for each earlier call of both branches; got rows of "
            f"{lengths} numbers."
        )
    if not all(math.isfinite(value) for row in rows for value in row):
        raise ValueError("CFG coefficients must be finite.")


def plain_schedule(times: Sequence[float] | Tensor, has_data_mean: bool = False) -> Schedule:
    """A schedule of times alone; its first step is analytic where the SideNet has a data mean and the step is short."""
    return Schedule(_numbers(times), analytic_first_step=has_data_mean and has_short_first_step(times))


def describe_schedule(schedule: Schedule) -> str:
    """A schedule in words, such as "7 steps, the first one analytic, 2 conditional-only calls"."""
    parts = [f"{schedule.steps} steps"]
    parts += ["the first one analytic"] if schedule.analytic_first_step else []
    parts += [f"{schedule.conditional_only} conditional-only calls"] if schedule.conditional_only else []
    parts += ["multistep coefficients"] if schedule.coefficients else []
    return ", ".join(parts)


def describe_schedules(schedules: Mapping[int, Schedule]) -> str:
    """Schedules in words, by number of model calls."""
    lines = (f"{nfe} model calls ({describe_schedule(schedules[nfe])})" for nfe in sorted(schedules))
    return "; ".join(lines) or "none: any number of steps"
