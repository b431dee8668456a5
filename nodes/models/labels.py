"""Class labels in ComfyUI's conditioning: written by Class Label, read by the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.utils
import torch
from torch import Tensor

KEY = "class_label"


def conditioning_of(labels: Tensor) -> list[list[Any]]:
    """A CONDITIONING of class indices [B], with a placeholder for nodes that expect a text embedding."""
    return [[torch.zeros(1, 1, 1), {KEY: labels}]]


def labels_of(conditions: Sequence[dict[str, Any]] | None, batch: int) -> Tensor | None:
    """The class index of each sample, [batch]; None where a conditioning names no class.

    Args:
        conditions: one side (positive or negative) of a guider's conditions, a list of dictionaries.
        batch: number of samples; fewer labels are repeated, as ComfyUI does with all conditions.

    Raises:
        ValueError: several entries, such as areas or time ranges, name different classes.
    """
    found = [condition.get(KEY) for condition in conditions or ()]
    given = [comfy.utils.repeat_to_batch_size(labels, batch) for labels in found if labels is not None]
    if not given:
        return None
    if len(given) < len(found) or any(not torch.equal(labels, given[0]) for labels in given[1:]):
        raise ValueError(
            "The conditioning combines several classes (by area, time range or Conditioning Combine); a SideNet takes "
            "one class for each image. Use one Class Label, or set the method of BA-Solver Sampler to 'multistep'."
        )
    return given[0]
