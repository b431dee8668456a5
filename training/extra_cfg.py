"""Fitted runs for more CFG scales than a SideNet was made for: its network stays, times and weights are found anew."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bas_core.checkpoint import SideNetCard, load_sidenet, save_sidenet
from ..bas_core.sidenet import SideNet
from .backbones import Backbone
from .network.options import Training
from .presets import CHECKED, PRESETS, QUICK
from .progress import say
from .recording.record import Recording, record
from .recording.replay import Replay
from .recording.trajectories import open_trajectories
from .schedules.fitting import Schedules, fit_coefficients
from .schedules.surrogate_search import search_on_surrogate, surrogate_search_nfe
from .settings import UsageError, parse_nfe

# What a scale's recording takes of the settings' own: no more runs and points than a quick SideNet is made of.
RECORDED = ("trajectories", "points")


def recording_for(settings: Any) -> Any:
    """The settings with what is recorded for one scale more."""
    few: dict[str, Any] = {name: min(getattr(settings, name), PRESETS[QUICK][name]) for name in RECORDED}
    return dataclasses.replace(settings, prefixes=0, **few)


def nfe_for_cfg(settings: Any) -> int:
    """About how many backbone calls one scale more costs."""
    few = recording_for(settings)
    return int(few.trajectories * few.points + surrogate_search_nfe(few.trajectories, parse_nfe(settings.nfe)))


def check_extra_cfg(more: tuple[float, ...], recording: Recording, training: Training) -> None:
    """Refuse what cannot be done, before any work.

    Raises:
        UsageError: saying what and why.
    """
    if not more:
        return
    if recording.cfg_mode != "combined" or training.objective == "published":
        raise UsageError("--extra-guidance needs recordings of the guided velocity: leave --cfg-mode at combined.")
    if not all(0 < scale <= 100 for scale in more) or len(set(more)) < len(more):
        raise UsageError(f"--extra-guidance must be CFG scales from 0 to 100, each once; got {more}.")


def runs_at_scale(
    settings: Any, scale: float, backbone: Backbone, sidenet: SideNet, trajectories: Path, spent: Counter[str]
) -> Schedules:
    """Record a few runs at a CFG scale, and find times and weights for it; what it cost is added to `spent`."""
    few = dataclasses.replace(recording_for(settings), guidance=(scale,))
    record(few, few, trajectories, backbone, CHECKED)
    found, about = open_trajectories((trajectories,))
    replay = Replay(backbone, found, about, spent)
    spent["recorded"] += len(found) * about["points"]
    mean = sidenet.data_mean if sidenet.config.data_mean_size else None
    calls = parse_nfe(settings.nfe)
    return backbone.within(lambda: fit_coefficients(sidenet, replay, search_on_surrogate(replay, calls, mean)))


def add_extra_cfg(settings: Any, trajectories: Path, opened: Callable[[float], Backbone]) -> SideNetCard:
    """Add runs for each scale of `extra_guidance` to the SideNet's file, unless it has them; returns what the file
    says.

    Args:
        settings: of `ba-solver make`; `out` is the file.
        trajectories: folder of the recordings; each scale has one of its own beside it.
        opened: the model at a CFG scale.
    """
    stored, card = load_sidenet(settings.out)
    for scale in settings.extra_guidance:
        if scale in card.schedules:
            continue
        say(f"Schedules for CFG {scale:g}")
        backbone = opened(scale)
        sidenet = load_sidenet(settings.out, backbone.device)[0]
        spent: Counter[str] = Counter()
        runs = runs_at_scale(
            settings,
            scale,
            backbone,
            sidenet,
            trajectories.with_name(f"{settings.out.stem}.cfg{scale:g}.trajectories"),
            spent,
        )
        calls = card.training.get("backbone_calls", {}) | {f"CFG {scale:g}": spent.total()}
        card = dataclasses.replace(
            card, schedules=card.schedules | {scale: runs}, training=card.training | {"backbone_calls": calls}
        )
        save_sidenet(settings.out, stored, card)
    return card
