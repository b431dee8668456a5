"""Recorded trajectories beside the model that they were recorded from, to sample from their noises again."""

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


def field_of_batches(parts: Sequence[Field], sizes: Sequence[int]) -> Field:
    """One field over the samples of several, for more samples than the model takes at once."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]

    def evaluate(x: Tensor, t: Tensor, branches: int) -> Tensor:
        pieces = zip(parts, x.split(list(sizes)), strict=True)
        return torch.cat([part.evaluate(piece, t[: len(piece)], branches) for part, piece in pieces], 1)

    columns = zip(*(part.conditions for part in parts), strict=True)
    conditions = tuple(None if any(c is None for c in column) else torch.cat(column) for column in columns)
    return Field(evaluate, conditions, first.cfg, combined=first.combined, scale=first.scale)


def recomputed(field: Field) -> Field:
    """A field that is evaluated again in the backward pass, so that sampling with gradients takes the memory of one
    model call, however many there are."""

    def evaluate(x: Tensor, t: Tensor, branches: int) -> Tensor:
        if not torch.is_grad_enabled():
            return field.evaluate(x, t, branches)
        found: Tensor = checkpoint(field.evaluate, x, t, branches, use_reentrant=False, preserve_rng_state=False)
        return found

    return Field(evaluate, field.conditions, field.cfg, combined=field.combined, scale=field.scale)


class RecomputedSideNet:
    """A SideNet that is evaluated again in the backward pass; see `recomputed`."""

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
    """Recorded trajectories beside the model that they were recorded from.

    Attributes:
        backbone: the frozen model.
        trajectories: for noises and truth.
        metadata: of the recording.
        nfe: model calls by stage, each for one sample.
    """

    backbone: Backbone
    trajectories: Trajectories
    metadata: dict[str, Any]
    nfe: Counter[str] = field(default_factory=Counter)

    def median_cfg_rows(self, count: int) -> Tensor:
        """The rows of so many trajectories of one CFG scale, the median, or of as many as there are."""
        trajectories = self.trajectories
        rows = torch.arange(0, len(trajectories), trajectories.branches)
        if trajectories.scales is None:
            return rows[:count]
        scales = trajectories.scales[rows]
        return rows[scales == scales.median()][:count]

    def field_of(self, rows: Tensor) -> Field:
        """The field that rows were recorded from; the model is called in batches as large as then."""
        scales, metadata = self.trajectories.scales, self.metadata
        scale = metadata["guidance"][0] if scales is None else float(scales[rows[0]])
        interval = tuple(metadata["guidance_interval"])
        labels = [self.trajectories.labels[batch] for batch in rows.split(metadata["record_batch"])]
        fields = [recomputed(self.backbone.field(batch, scale, interval, metadata["cfg_mode"])) for batch in labels]
        return field_of_batches(fields, [len(batch) for batch in labels])

    def truth(self, rows: Tensor, t: Tensor) -> Tensor:
        """Recorded states at time t, on the backbone's device."""
        return self.trajectories.truth(rows, t).to(self.backbone.device)

    def noise(self, rows: Tensor) -> Tensor:
        """The recorded noises, on the backbone's device."""
        return self.trajectories.states[rows, torch.zeros_like(rows)].to(self.backbone.device)
