"""Recorded runs that are run again: their noises, their conditions, and where they should lead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...bas_core.guidance import Field
from ..backbones import Backbone
from .trajectories import Trajectories

# Held-out runs that the stages with the backbone in the loop are scored on.
SCORED_RUNS = 16


def joined(parts: Sequence[Field], sizes: Sequence[int]) -> Field:
    """One field of the samples of several, so many of each: for more samples than the model takes at once."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]

    def evaluate(x: Tensor, t: Tensor, branches: int) -> Tensor:
        pieces = zip(parts, x.split(list(sizes)), strict=True)
        return torch.cat([part.evaluate(some, t[: len(some)], branches) for part, some in pieces], 1)

    by_branch = zip(*(part.conditions for part in parts), strict=True)
    conditions = tuple(None if any(c is None for c in each) else torch.cat(each) for each in by_branch)
    return Field(evaluate, conditions, first.cfg, combined=first.combined, scale=first.scale)


def recomputed(field: Field) -> Field:
    """A field that keeps nothing for the backward pass but the states it was called with, and is called again there.

    So a run with gradients takes the memory of one call, whatever the number of its calls.
    """

    def evaluate(x: Tensor, t: Tensor, branches: int) -> Tensor:
        if not torch.is_grad_enabled():
            return field.evaluate(x, t, branches)
        found: Tensor = checkpoint(field.evaluate, x, t, branches, use_reentrant=False, preserve_rng_state=False)
        return found

    return Field(evaluate, field.conditions, field.cfg, combined=field.combined, scale=field.scale)


class RecomputedSideNet:
    """A SideNet that keeps nothing for the backward pass but what it was called with; its weights may be trained."""

    def __init__(self, sidenet: Any) -> None:
        self.sidenet = sidenet

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sidenet, name)

    def __call__(self, **inputs: Any) -> Tensor:
        """See `SideNet.forward`."""
        if not torch.is_grad_enabled():
            return self.sidenet(**inputs)
        found: Tensor = checkpoint(self.sidenet, use_reentrant=False, preserve_rng_state=False, **inputs)
        return found


@dataclass(frozen=True)
class Replay:
    """Recorded runs beside the model that they were recorded from.

    Attributes:
        backbone: the frozen model.
        trajectories: recorded runs, for noises and truth.
        about: what they say of themselves.
        spent: backbone calls by stage, in calls a run times runs.
    """

    backbone: Backbone
    trajectories: Trajectories
    about: dict[str, Any]
    spent: Counter[str] = field(default_factory=Counter)

    def runs(self) -> tuple[Tensor, Tensor]:
        """The rows of the trajectories that begin a run, and their CFG scales."""
        rows = torch.arange(0, len(self.trajectories), self.trajectories.branches)
        return rows, torch.zeros(len(rows)) if self.trajectories.scales is None else self.trajectories.scales[rows]

    def alike(self, count: int) -> Tensor:
        """The rows of so many runs of one CFG scale, the middle one, or of as many as there are."""
        rows, scales = self.runs()
        return rows[scales == scales.median()][:count]

    def field_of(self, rows: Tensor) -> Field:
        """The field that rows of trajectories were recorded from; the model is called with as many at once as it was
        then."""
        scale = (
            float(self.trajectories.scales[rows[0]])
            if self.trajectories.scales is not None
            else self.about["guidance"][0]
        )
        interval = tuple(self.about["guidance_interval"])
        size = self.about.get("record_batch") or len(rows)
        some = rows.split(size)
        labels = [self.trajectories.labels[each] for each in some]
        fields = [recomputed(self.backbone.field(each, scale, interval, self.about["cfg_mode"])) for each in labels]
        return joined(fields, [len(each) for each in some])

    def truth(self, rows: Tensor, t: Tensor) -> Tensor:
        """Recorded states at time t, on the backbone's device."""
        return self.trajectories.truth(rows, t).to(self.backbone.device)

    def noise(self, rows: Tensor) -> Tensor:
        """Where the runs began."""
        return self.trajectories.states[rows, torch.zeros_like(rows)].to(self.backbone.device)
