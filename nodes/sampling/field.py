"""The velocity field that the solver integrates: combined by ComfyUI's CFG or, for SideNets made so, per branch."""

from __future__ import annotations

from torch import Tensor

from ...bas_core.guidance import Field, Guidance
from ..models.attach import LoadedSideNet
from ..models.labels import labels_of
from .guider import is_comfyui_cfg, sidenet_guidance
from .model_caller import ModelCaller

WHOLE_RANGE = (0.0, 1.0)


def field_of(
    caller: ModelCaller,
    sidenet: LoadedSideNet | None,
    interval: tuple[float, float],
    x: Tensor,
    conditional_only: bool = False,
) -> Field:
    """The velocity field over model calls.

    Args:
        caller: makes the calls.
        sidenet: one made per branch is given the branches, where they can be taken apart; None = multistep.
        interval: (lo, hi), the flow times between which CFG applies.
        x: [B, C, *spatial]; gives class labels their batch size and device.
        conditional_only: whether some calls may leave out the negative, so that the branches are needed apart.

    Raises:
        ValueError: a CFG interval with a guider that has no single CFG scale, or class labels that do not fit.
    """
    guidance, limited = Guidance(caller.cfg, interval), interval != WHOLE_RANGE
    if limited and not is_comfyui_cfg(caller.guider):
        raise ValueError(
            "start_percent and end_percent work with KSampler, SamplerCustom, CFGGuider and BasicGuider; "
            f"{type(caller.guider).__name__} combines its branches in its own way. Set them to 0 and 1."
        )
    sides = ("positive",) if guidance.scale == 1 else ("positive", "negative")
    per_branch = sidenet is not None and sidenet.card.cfg_mode == "per_branch" and caller.can_split
    labels = [class_labels(caller, sidenet, side, x) for side in (sides if per_branch else sides[:1])]
    scale = sidenet_guidance(caller.guider)

    def combined(state: Tensor, t: Tensor, count: int) -> Tensor:
        return caller.combined(state, t)[None]

    def either(state: Tensor, t: Tensor, count: int) -> Tensor:
        """The conditional branch; or, for both branches, twice what ComfyUI makes of them, which combines to itself."""
        if count == 1:
            return caller.conditional(state, t)[None]
        return caller.combined(state, t).expand(2, *state.shape)

    if per_branch:
        return Field(caller.branches, tuple(labels), guidance, scale=scale)
    if conditional_only and caller.can_split and guidance.scale != 1 and not limited:
        return Field(caller.branches, (labels[0], None), guidance, combined=True, scale=scale)
    if limited and guidance.scale != 1:
        return Field(either, (labels[0], None), guidance, combined=True, scale=scale)
    return Field(combined, tuple(labels), scale=scale)


def class_labels(caller: ModelCaller, sidenet: LoadedSideNet | None, side: str, x: Tensor) -> Tensor | None:
    """The class indices [B] of one side of the conditioning, for SideNets that take them; None for others.

    Raises:
        ValueError: it names no class, several, or one that the SideNet does not know.
    """
    if sidenet is None or not sidenet.network.config.num_classes:
        return None
    classes = sidenet.network.config.num_classes
    labels = labels_of(caller.guider.conds.get(side), x.shape[0])
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
