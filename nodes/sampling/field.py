"""The velocity field of a run: backbone calls guided by ComfyUI or, for SideNets trained so, branch by branch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...bas_core.guidance import Evaluate, Field, Guidance
from ..models.attach import LoadedSideNet
from ..models.labels import labels_of
from ..say import warn
from .backbone import Backbone

WHOLE_RANGE = (0.0, 1.0)


def field_of(backbone: Backbone, sidenet: LoadedSideNet | None, interval: tuple[float, float], x: Tensor) -> Field:
    """The velocity field of a run.

    Args:
        backbone: makes the calls.
        sidenet: what it predicts decides whether the branches are kept apart; None = guided by ComfyUI.
        interval: (lo, hi), the flow times between which CFG applies.
        x: [B, C, *spatial]; its batch and device are those of class labels.

    Raises:
        ValueError: a CFG interval with a guider that has no single CFG scale.
    """
    guidance = Guidance(backbone.scale, interval)
    limited = interval != WHOLE_RANGE
    if limited and not backbone.plain:
        raise ValueError(
            "A CFG interval works with KSampler, SamplerCustom, CFGGuider and BasicGuider; "
            f"{type(backbone.guider).__name__} combines its branches in its own way. Set the interval to 0 and 1."
        )
    if sidenet is not None and sidenet.card.cfg_mode == "per_branch" and _can_split(backbone):
        return _branch_field(backbone, sidenet, guidance, x)

    positive = _labels(backbone, sidenet, "positive", x)
    if backbone.separable and not limited and guidance.scale != 1:
        return Field(
            _branches_of(backbone, guidance), (positive, None), guidance, combined=True, scale=backbone.told_scale
        )

    def guided(state: Tensor, t: Tensor, count: int) -> Tensor:
        call = backbone if guidance.active(t[0]) or not limited else backbone.positive
        return call(state, t)[None]

    return Field(guided, (positive,), scale=backbone.told_scale)


def _can_split(backbone: Backbone) -> bool:
    if backbone.plain and not backbone.rescaled:
        return True
    if backbone.scale != 1 or not backbone.plain:
        warn(
            "this SideNet was trained on the branches of CFG one by one, but the guider, or a node on the MODEL, "
            "combines them in its own way. It is given the guided velocity instead, for which it is less accurate."
        )
    return False


def _branches_of(backbone: Backbone, guidance: Guidance) -> Evaluate:
    def branches(state: Tensor, t: Tensor, count: int) -> Tensor:
        if count == 1:
            return backbone.positive(state, t)[None]
        return torch.stack(backbone.branches(state, t, acted=guidance.active(t[0]))[:count])

    return branches


def _branch_field(backbone: Backbone, sidenet: LoadedSideNet, guidance: Guidance, x: Tensor) -> Field:
    sides = ("positive", "negative") if guidance.scale != 1 else ("positive",)
    conditions = tuple(_labels(backbone, sidenet, side, x) for side in sides)
    return Field(_branches_of(backbone, guidance), conditions, guidance)


def _labels(backbone: Backbone, sidenet: LoadedSideNet | None, side: str, x: Tensor) -> Tensor | None:
    """What a class-conditional SideNet is told of one side of the conditioning: class indices [B] for states x [B, …].

    Raises:
        ValueError: it names no class, several, or one that the SideNet does not know.
    """
    if sidenet is None or not sidenet.network.config.num_classes:
        return None
    classes = sidenet.network.config.num_classes
    labels = labels_of(backbone.guider.conds.get(side), x.shape[0])
    if labels is None:
        raise ValueError(
            f"The SideNet {sidenet.name!r} takes class labels, and the {side} conditioning has none. Connect Class "
            "Label, or set the method of BA-Solver Sampler to 'multistep'."
        )
    if labels.max() > classes or labels.min() < 0:
        raise ValueError(
            f"The SideNet {sidenet.name!r} knows the classes 0 to {classes - 1} and the null class {classes}; the "
            f"{side} conditioning asks for {labels.tolist()}. Use a SideNet made for this model."
        )
    return labels.to(x.device)
