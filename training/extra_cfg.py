"""Schedules for more CFG scales than a SideNet was trained for; the network stays as it is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..bas_core.checkpoint import SideNetCard, load_sidenet, save_sidenet
from ..bas_core.sidenet import SideNet
from .backbones import Backbone
from .presets import QUICK, preset_values
from .progress import say
from .recording.record import record
from .recording.replay import Replay
from .recording.trajectories import open_trajectories
from .schedules.fitting import Schedules
from .schedules.search import search_nfe, search_schedules
from .settings import UsageError, parse_nfe

if TYPE_CHECKING:
    from .make import MakeSettings


def recording_for(settings: MakeSettings) -> MakeSettings:
    """The settings with the quick preset's recording."""
    names = ("trajectories", "validation", "points", "prefixes", "jitter", "pilot", "checked", "rounds")
    quick = preset_values(QUICK, settings.nfe)
    return dataclasses.replace(settings, **{name: quick[name] for name in names if name in quick})


def nfe_for_cfg(settings: MakeSettings) -> int:
    """How many model calls one scale more takes; see `make.planned_nfe`."""
    few = recording_for(settings)
    fitted = few.trajectories - few.validation
    return few.model_calls + search_nfe(fitted, few.validation, parse_nfe(settings.nfe), True, few.rounds)


def check_extra_cfg(settings: MakeSettings) -> None:
    """Refuse scales for which no schedules can be fitted, before any work.

    Raises:
        UsageError: saying what and why.
    """
    scales = settings.extra_guidance
    if settings.scales[0] != settings.scales[1] and not (settings.steps or settings.start_from):
        raise UsageError(
            f"A range of CFG is an input of the network, and without one it means nothing; got {settings.guidance}. "
            "Give one scale, and others with --extra-guidance."
        )
    if scales and (settings.cfg_mode != "combined" or settings.objective == "published"):
        raise UsageError("--extra-guidance needs trajectories of combined CFG: leave --cfg-mode at combined.")
    if not all(0 < scale <= 100 for scale in scales) or len(set(scales)) < len(scales):
        raise UsageError(f"--extra-guidance must be CFG scales from 0 to 100, each once; got {scales}.")


def schedules_at(
    settings: MakeSettings, scale: float, backbone: Backbone, sidenet: SideNet, folder: Path, nfe: Counter[str]
) -> Schedules:
    """Record a few trajectories at a CFG scale, and fit schedules on them; the model calls are added to `nfe`."""
    few = dataclasses.replace(recording_for(settings), guidance=(scale,))
    record(few, few, folder, backbone)
    trajectories, metadata = open_trajectories((folder,))
    fit, validation = (Replay(backbone, part, metadata, nfe) for part in trajectories.split(few.validation))
    nfe["trajectories"] += len(trajectories) * metadata["points"] + metadata.get("pilot_calls", 0)
    mean = sidenet.data_mean if sidenet.has_data_mean else None
    numbers = parse_nfe(settings.nfe)
    found = backbone.within(lambda: search_schedules(fit, validation, numbers, mean, few.rounds))
    return {n: each.schedule for n, each in found.items()}


def add_extra_cfg(settings: MakeSettings, folder: Path, open_at: Callable[[float], Backbone]) -> SideNetCard:
    """Add schedules for each scale of `extra_guidance` to the SideNet's file, unless it has them.

    Args:
        settings: of `ba-solver make`; `out` is the file.
        folder: of the trajectories; each scale has one of its own beside it.
        open_at: opens the model at a CFG scale.

    Returns:
        The file's metadata.
    """
    stored, card = load_sidenet(settings.out)
    for scale in settings.extra_guidance:
        if scale in card.schedules:
            continue
        say(f"Schedules for CFG {scale:g}")
        backbone = open_at(scale)
        sidenet = load_sidenet(settings.out, backbone.device)[0]
        nfe: Counter[str] = Counter()
        own = folder.with_name(f"{settings.out.stem}.cfg{scale:g}.trajectories")
        schedules = schedules_at(settings, scale, backbone, sidenet, own, nfe)
        calls = card.training.get("backbone_calls", {}) | {f"CFG {scale:g}": nfe.total()}
        card = dataclasses.replace(
            card, schedules=card.schedules | {scale: schedules}, training=card.training | {"backbone_calls": calls}
        )
        save_sidenet(settings.out, stored, card)
    return card
