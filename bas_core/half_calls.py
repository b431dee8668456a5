"""Half calls: guided velocities for which one branch is evaluated instead of two.

Classifier-free guidance doubles every call: v = v_u + scale (v_c - v_u). The difference v_c - v_u changes less along a
path than the velocity does, so at some calls the unconditional branch is left out and the difference predicted from
what earlier calls have shown, by weights that are fitted on recorded runs (`training.runs.fitting`), as linear adaptive
guidance predicts it (Castillo et al. 2023, arXiv 2312.12487). What that saves buys more anchors at the same cost.
Every term is zero where velocities do not change: where an inpaint mask keeps the image, so is the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .guidance import NO_GUIDANCE, Field, combined
from .step_weights import add_terms, plain_numbers

Rows = Sequence[Sequence[float] | Tensor]
Times = Sequence[float] | Sequence[Tensor] | Tensor


class Seen(NamedTuple):
    """What a call has shown: the conditional velocity, and how far the unconditional one is from it if that is known.

    Attributes:
        conditional: [B, C, *spatial].
        difference: v_c - v_u, [B, C, *spatial]; None at half calls.
    """

    conditional: Tensor
    difference: Tensor | None


def difference_terms(conditional: Tensor, seen: Sequence[Seen]) -> list[Tensor]:
    """What v_c - v_u is predicted from: itself at earlier whole calls, and how v_c has changed since every call."""
    known = [call.difference for call in seen if call.difference is not None]
    return known + [conditional - call.conditional for call in seen]


class HalfCallField(Field):
    """A guided field that leaves the unconditional branch out at some calls; made anew for every run.

    Args:
        field: what is sampled, guided or in branches; it counts the calls too.
        times: of the run; the field is called at each of them but the last, in turn.
        rows: for the last anchors of the run, weights of `difference_terms`; an empty row is a whole call. Anchors
            before them are called whole and not remembered.
    """

    def __init__(self, field: Field, times: Times, rows: Rows) -> None:
        pair = field.pair
        if pair is None:
            raise ValueError("Half calls need a field with two branches that are guided over the whole range of times.")
        if pair is field:
            super().__init__(self._branches, field.conditions, field.guidance, field.scale)
        else:
            super().__init__(combined(self._branches, pair.guidance), field.conditions, NO_GUIDANCE, field.scale)
        self.whole, self.two = field, pair
        self.anchors = [float(t) for t in times][:-1]
        self.rows = rows
        self.seen: list[Seen] = []

    def _branches(self, x: Tensor, t: Tensor, count: int) -> Tensor:
        self.whole.calls += 1
        now = float(t[0])
        index = min(range(len(self.anchors)), key=lambda i: abs(self.anchors[i] - now))
        place = index - (len(self.anchors) - len(self.rows))
        if place < 0 or count == 1:  # not among the rows' anchors, or no more than the conditional branch is asked for
            return self.two.evaluate(x, t, count)
        if not len(self.rows[place]):
            branches = self.two.evaluate(x, t, 2)
            # A copy: a view would keep both branches in memory until the run's end.
            self.seen.append(Seen(branches[0].clone(), branches[0] - branches[1]))
            return branches
        self.halves += 1
        self.whole.halves += 1
        conditional, difference = self.half_call(x, t, place)
        self.seen.append(Seen(conditional, None))
        return torch.stack([conditional, conditional - difference])

    def half_call(self, x: Tensor, t: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """The conditional velocity and the predicted difference, [B, C, *spatial] each."""
        conditional = self.two.evaluate(x, t, 1)[0]
        found = difference_terms(conditional, self.seen)
        return conditional, add_terms(torch.zeros_like(conditional), found, self.rows[place])


def check_half_calls(rows: Rows, intervals: int, calls: int) -> None:
    """Refuse rows that do not fit a run of so many intervals and calls.

    Raises:
        ValueError: there are too few or too many rows or numbers, or one is not finite.
    """
    lengths = [len(row) for row in rows]
    whole = [sum(not length for length in lengths[:i]) for i in range(len(lengths))]
    wanted = [length and whole[i] + i for i, length in enumerate(lengths)]
    if not intervals - 1 <= len(rows) <= calls or lengths != wanted:
        raise ValueError(
            f"Half calls for {calls} calls come in as many rows, or one fewer where the first call is not remembered, "
            f"the first one empty, with as many numbers as calls and whole calls came before; got rows of {lengths} "
            "numbers."
        )
    if not all(math.isfinite(weight) for row in rows for weight in plain_numbers(row)):
        raise ValueError("Weights of half calls must be finite.")
