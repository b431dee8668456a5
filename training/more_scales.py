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
from .efforts import CHECKED, EFFORTS, QUICK
from .network.options import Training
from .progress import say
from .recording.chains import open_chains
from .recording.record import Recording, record
from .recording.replay import Replay
from .runs.fitting import Runs, fit_weights
from .runs.on_paths import calls_on_paths, learn_on_paths
from .settings import UsageError, parse_calls

# What a scale's recording takes of the settings' own: no more runs and points than a quick SideNet is made of.
RECORDED = ("chains", "points")


def recording_for(settings: Any) -> Any:
    """The settings with what is recorded for one scale more."""
    few: dict[str, Any] = {name: min(getattr(settings, name), EFFORTS[QUICK][name]) for name in RECORDED}
    return dataclasses.replace(settings, starts=0, **few)


def calls_for_scale(settings: Any) -> int:
    """About how many backbone calls one scale more costs."""
    few = recording_for(settings)
    return int(few.chains * few.points + calls_on_paths(few.chains, parse_calls(settings.nfe)))


def check_scales(more: tuple[float, ...], recording: Recording, training: Training) -> None:
    """Refuse what cannot be done, before any work.

    Raises:
        UsageError: saying what and why.
    """
    if not more:
        return
    if recording.mode != "guided" or training.objective == "published":
        raise UsageError("--more-guidance needs recordings of the guided velocity: leave --mode at guided.")
    if not all(0 < scale <= 100 for scale in more) or len(set(more)) < len(more):
        raise UsageError(f"--more-guidance must be CFG scales from 0 to 100, each once; got {more}.")


def runs_at_scale(
    settings: Any, scale: float, backbone: Backbone, sidenet: SideNet, chains: Path, spent: Counter[str]
) -> Runs:
    """Record a few runs at a CFG scale, and find times and weights for it; what it cost is added to `spent`."""
    few = dataclasses.replace(recording_for(settings), guidance=(scale,))
    record(few, few, chains, backbone, CHECKED)
    found, about = open_chains((chains,))
    replay = Replay(backbone, found, about, spent)
    spent["recorded"] += len(found) * about["points"]
    mean = sidenet.data_mean if sidenet.config.mean_size else None
    calls = parse_calls(settings.nfe)
    return backbone.within(lambda: fit_weights(sidenet, replay, learn_on_paths(replay, calls, mean)))


def add_scales(settings: Any, chains: Path, opened: Callable[[float], Backbone]) -> SideNetCard:
    """Add runs for each scale of `more_guidance` to the SideNet's file, unless it has them; returns what the file says.

    Args:
        settings: of `ba-solver make`; `out` is the file.
        chains: folder of the recordings; each scale has one of its own beside it.
        opened: the model at a CFG scale.
    """
    stored, card = load_sidenet(settings.out)
    for scale in settings.more_guidance:
        if scale in card.more_runs:
            continue
        say(f"Runs for CFG {scale:g}")
        backbone = opened(scale)
        sidenet = load_sidenet(settings.out, backbone.device)[0]
        spent: Counter[str] = Counter()
        runs = runs_at_scale(
            settings, scale, backbone, sidenet, chains.with_name(f"{settings.out.stem}.cfg{scale:g}.chains"), spent
        )
        calls = card.training.get("backbone_calls", {}) | {f"CFG {scale:g}": spent.total()}
        card = dataclasses.replace(
            card, more_runs=card.more_runs | {scale: runs}, training=card.training | {"backbone_calls": calls}
        )
        save_sidenet(settings.out, stored, card)
    return card
