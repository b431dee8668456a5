"""Fitted inversions for a SideNet's file: an image to its noise and back; the network stays."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from ..bas_core.checkpoint import SideNetCard, load_sidenet, save_sidenet
from .backbones import Backbone
from .progress import say
from .recording.chains import open_chains
from .recording.replay import Replay
from .runs.inversions import BATCH, FITTED, JUDGED, POINTS, learn_inversions
from .settings import UsageError, parse_calls, prepare_folder


def check_inversion(settings: Any) -> None:
    """Refuse what cannot be done, before any work.

    Raises:
        UsageError: saying what and why.
    """
    if settings.inversion and settings.mode != "guided":
        raise UsageError("--inversion needs recordings of the guided velocity: leave --mode at guided.")


def calls_for_inversions(settings: Any) -> int:
    """About how many backbone calls they cost, each of one branch; a call with gradients counts as three."""
    images = min(FITTED + JUDGED, settings.chains)
    each_way = sum(parse_calls(settings.nfe))
    return images * (POINTS + 2 * each_way) + 3 * settings.tune * BATCH * 2 * each_way


def add_inversions(settings: Any, chains: Path, backbone: Backbone) -> SideNetCard:
    """Add inversions to the SideNet's file, unless it has them; returns what the file says.

    Args:
        settings: of `ba-solver make`; `out` is the file, `nfe` the calls each way, `tune` the steps of tuning.
        chains: folder of the recordings, whose ends are the images; the paths from there to the noise lie beside it.
        backbone: the model.
    """
    stored, card = load_sidenet(settings.out)
    calls = [n for n in parse_calls(settings.nfe) if n not in card.inversions]
    if not calls:
        return card
    say("To the noise and back")
    folder = settings.out.with_suffix(".run")
    prepare_folder(folder)
    found, about = open_chains((chains,))
    replay = Replay(backbone, found, about, Counter())
    sidenet = load_sidenet(settings.out, backbone.device)[0]
    usual = settings.loop(settings.tune, settings.loop_batch)
    paths = chains.with_name(f"{settings.out.stem}.up.chains")
    learn = partial(learn_inversions, sidenet, replay, calls, usual, paths, folder)
    inversions = card.inversions | backbone.within(learn, gradients=bool(settings.tune))
    spent = card.training.get("backbone_calls", {}) | dict(replay.spent)
    card = dataclasses.replace(card, inversions=inversions, training=card.training | {"backbone_calls": spent})
    save_sidenet(settings.out, stored, card)
    for n in calls:
        (folder / f"invert_{n}.pt").unlink(missing_ok=True)
    return card
