"""Recorded trajectories beside the model that they were recorded from, to sample from their noises again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...bas_core.guidance import Field
from ...bas_core.prediction import SideNetProtocol
from ..backbones import Backbone
from .trajectories import Trajectories


class SideNetInParts:
    """A SideNet on its device, for states in main memory, of which so many go through it at once.

    Args:
        sidenet: the network.
        device: where it is.
        batch: samples.
    """

    def __init__(self, sidenet: SideNetProtocol, device: torch.device, batch: int) -> None:
        self.sidenet, self.device, self.batch = sidenet, device, batch
        self.anchors, self.cfg_input = sidenet.anchors, sidenet.cfg_input
        self.has_data_mean = sidenet.has_data_mean

    def __call__(self, *, v: Tensor, **others: Any) -> Tensor:
        """See `SideNetProtocol`."""
        found = torch.empty_like(v)
        for i in range(0, len(v), self.batch):
            rows = slice(i, i + self.batch)
            part: dict[str, Any] = {
                name: None if each is None else each[rows].to(self.device) for name, each in others.items()
            }
            found[rows] = self.sidenet(v=v[rows].to(self.device), **part).to(found)
        return found

    def analytic_velocity(self, x: Tensor, t: float) -> Tensor:
        """See `SideNetProtocol`."""
        return self.sidenet.analytic_velocity(x.to(self.device), t).to(x.device)


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

    @property
    def cfg(self) -> float:
        """The CFG scale that schedules are fitted for: the middle of the range, or the nearest that was recorded."""
        middle, scales = sum(self.metadata["guidance"]) / 2, self.trajectories.scales
        return middle if scales is None else float(scales[(scales - middle).abs().argmin()])

    def cfg_rows(self, count: int) -> Tensor:
        """The rows of so many trajectories of the scale `cfg`, or of as many as there are."""
        trajectories = self.trajectories
        rows = torch.arange(0, len(trajectories), trajectories.branches)
        return rows[:count] if trajectories.scales is None else rows[trajectories.scales[rows] == self.cfg][:count]

    def field_of(self, rows: Tensor) -> Field:
        """The field that rows were recorded from, for states in main memory; the model is called in batches as large
        as then."""
        scales, metadata = self.trajectories.scales, self.metadata
        scale = metadata["guidance"][0] if scales is None else float(scales[rows[0]])
        labels, interval = self.trajectories.labels[rows], tuple(metadata["guidance_interval"])
        return self.backbone.field_in_main_memory(
            labels, scale, metadata["record_batch"], interval, metadata["cfg_mode"]
        )

    def truth(self, rows: Tensor, t: Tensor) -> Tensor:
        """Recorded states at time t."""
        return self.trajectories.truth(rows, t)

    def noise(self, rows: Tensor) -> Tensor:
        """The recorded noises."""
        return self.trajectories.states[rows, torch.zeros_like(rows)]
