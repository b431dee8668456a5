"""A fitted run: everything that one run of the solver is told beforehand, as one value.

A SideNet's file holds a run for each number of backbone calls that it was fitted for (`SideNetCard.runs`). A plain time
grid is a run too, with nothing fitted.

    images = solve(field, sidenet, noise, card.runs[5])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import check_grid, same_grid, starts_short
from .guidance import Field
from .half_calls import HalfCallField, check_half_calls
from .quadrature import get_rule
from .step_weights import add_terms, check_step_weights, plain_numbers, row_of, terms
from .steps import Proposal

Row = Sequence[float] | Tensor


@dataclass(frozen=True)
class FittedRun:
    """The times of a run, and what was fitted on them.

    Sequences of numbers are kept as tuples. The trainer tunes runs by gradients, so times and rows may be tensors too.

    Attributes:
        times: [N + 1], descending (to sample) or ascending (to invert), within [0, 1].
        step_weights: 2 N - 1 rows, one for each state that the steps propose: what it adds to that state, see
            `step_weights.terms`. Empty: the published solver.
        half_calls: one row for each of the last calls of the run: weights of `half_calls.difference_terms` where the
            unconditional branch is left out, an empty row where the call is a whole one. Empty: all calls are whole.
        skip_first: the first call is saved, by a SideNet that knows the mean of the model's data. For noise from a
            random generator only: that from an inversion leads to one image and not to the mean.
        rule: name of the quadrature rule that the step weights were fitted for; one with both ends.

    Raises:
        ValueError: the parts do not fit each other; the message says which, what was required and what came.
    """

    times: Sequence[float] | Tensor
    step_weights: Sequence[Row] = ()
    half_calls: Sequence[Row] = ()
    skip_first: bool = False
    rule: str = "lobatto4"

    def __post_init__(self) -> None:
        for name in ("times", "step_weights", "half_calls"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        if not get_rule(self.rule).has_both_ends:
            raise ValueError(f"A run needs a rule whose nodes include 0 and 1, such as lobatto4; got {self.rule}.")
        times = [float(t) for t in check_grid(self._times).detach()]
        if self.skip_first and times[0] != 1:
            raise ValueError(f"Only a run from pure noise, t = 1, saves its first call; this begins at {times[0]:.4g}.")
        if self.step_weights:
            check_step_weights(self.step_weights, len(times) - 1)
        if self.half_calls:
            check_half_calls(self.half_calls, len(times) - 1, self.calls)

    @property
    def _times(self) -> Tensor:
        return self.times if isinstance(self.times, Tensor) else torch.tensor(self.times)

    @property
    def grid(self) -> tuple[Tensor, ...]:
        """N + 1 0-d times on the CPU, in float32 or better."""
        times = check_grid(self._times)
        return tuple(times.to(torch.promote_types(times.dtype, torch.float32)))

    @property
    def fitted(self) -> bool:
        """Whether it holds more than times."""
        return bool(self.step_weights or self.half_calls)

    @property
    def calls(self) -> int:
        """How often the backbone is called: once an interval, less the first if that is saved."""
        return len(self.times) - 1 - self.skip_first

    @property
    def halves(self) -> int:
        """How many of the calls evaluate one branch of guidance instead of two."""
        return sum(len(row) > 0 for row in self.half_calls)

    @property
    def cost(self) -> float:
        """What the calls cost, in whole calls."""
        return self.calls - self.halves / 2

    def over(self, times: Sequence[float] | Tensor) -> FittedRun:
        """The same run over times that were rounded or shrunk on their way; the first call is saved at t = 1 only."""
        return dataclasses.replace(self, times=times, skip_first=self.skip_first and float(times[0]) == 1)

    def scaled(self, start: float) -> FittedRun:
        """The same run for a model whose sampling begins at an earlier time than 1."""
        return self if start == 1 else self.over(self._times * start)

    def detached(self) -> FittedRun:
        """The same run in plain numbers."""

        weights, halves = (list(map(plain_numbers, rows)) for rows in (self.step_weights, self.half_calls))
        return dataclasses.replace(self, times=plain_numbers(self.times), step_weights=weights, half_calls=halves)

    def correct(self, proposal: Proposal) -> Tensor:
        """A proposed state [B, C, *spatial] with its weighted terms added: what steers the solver's steps."""
        if not self.step_weights:
            return proposal.x
        return add_terms(proposal.x, terms(proposal), self.step_weights[row_of(proposal)])

    def field_over(self, field: Field) -> Field:
        """The field that the run calls: with half calls, where it has two branches to choose from."""
        if not self.half_calls or field.pair is None:
            return field
        return HalfCallField(field, self._times, self.half_calls)


@dataclass(frozen=True)
class Inversion:
    """Two fitted runs over the same times: an image to its noise, and the noise to the image.

    Attributes:
        up: ascending, from a small time at which the image is left (`editing.START`).
        down: the way back, over the same times.

    Raises:
        ValueError: they are no such two runs; the message says why.
    """

    up: FittedRun
    down: FittedRun

    def __post_init__(self) -> None:
        times, back = (torch.stack(run.grid).detach().tolist() for run in (self.up, self.down))
        if times[0] > times[-1] or times[::-1] != back:
            raise ValueError(
                f"An inversion goes up its times and comes down the same ones; got {times} for the way up."
            )
        if self.up.halves or self.down.halves or self.down.skip_first:
            raise ValueError("An inversion's calls are whole ones, and all are made: its noise is one image's.")

    @property
    def calls(self) -> int:
        """Backbone calls each way."""
        return self.up.calls


def _frozen(values: Sequence[float] | Sequence[Row] | Tensor) -> Sequence[float] | Sequence[Row] | Tensor:
    if isinstance(values, Tensor):
        return values
    if not isinstance(values, Sequence):
        raise ValueError(f"A run's times and weights are tensors or sequences of numbers; got {type(values).__name__}.")
    return tuple(_frozen(v) if isinstance(v, Sequence | Tensor) else float(v) for v in values)  # type: ignore[return-value]


def run_over(
    times: Sequence[float] | Tensor, runs: Mapping[int, FittedRun] | None = None, knows_mean: bool = False
) -> FittedRun:
    """The run over times that come from elsewhere, such as ComfyUI's SIGMAS.

    Args:
        times: [N + 1].
        runs: fitted ones; the one over these times is taken.
        knows_mean: whether the SideNet can save a first call. It does where a run that is not fitted starts with a
            short interval (`grids.starts_short`).
    """
    for run in (runs or {}).values():
        if same_grid(times, run.times):
            return run.over(times)
    return FittedRun(times, skip_first=knows_mean and starts_short(times))


def describe_runs(runs: Mapping[int, FittedRun]) -> str:
    """Fitted runs in words, such as "5 calls (7 steps, the first call saved, 2 half calls, step weights)"."""

    def one(calls: int, run: FittedRun) -> str:
        parts = [f"{len(run.times) - 1} steps"]
        parts += ["the first call saved"] if run.skip_first else []
        parts += [f"{run.halves} half calls"] if run.halves else []
        parts += ["step weights"] if run.step_weights else []
        return f"{calls} calls ({', '.join(parts)})"

    return "; ".join(one(calls, runs[calls]) for calls in sorted(runs)) or "none: use any number of calls"
