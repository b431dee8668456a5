"""`ba-solver make`: record and train in a row, with defaults that suit most models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from .backbones import BackboneChoice, open_backbone
from .extra_cfg import add_extra_cfg, check_extra_cfg, nfe_for_cfg
from .network.options import Training
from .presets import FULL
from .progress import say
from .recording.record import Recording, record
from .schedules.search import network_nfe, search_nfe
from .settings import parse_nfe
from .train import check_out, train_from


@dataclass(frozen=True, kw_only=True)
class MakeSettings(BackboneChoice, Recording, Training):
    """Record a model's trajectories, and train a SideNet on them.

    Attributes:
        out: the SideNet's file. Trajectories and log lie beside it, in NAME.trajectories and NAME.run.
        preset: quick (schedules alone, with some 1,500 model calls, or 300 to 400 for one number of them) or full
            (nearer ones, and a network, with some 5,000); other flags override it.
        extra_guidance: further CFG scales to fit schedules for, at the cost of the quick preset each; one scale's
            schedules serve from half to one and a half times of it.
        nfe: numbers of model calls to fit schedules for, such as 5,7,10.
        trajectories: how many to record.
        seed: of noises, weights and batches.
    """

    out: Path
    preset: str = FULL
    extra_guidance: tuple[float, ...] = ()
    nfe: str = "4,5,6,7,8,9,10,12"
    seed: int = 1


def planned_nfe(settings: MakeSettings) -> int:
    """How many model calls recording, training and validation take, each for one sample.

    More where the model needs more points than `POINTS[0]`, which the recording says.
    """
    numbers = parse_nfe(settings.nfe)
    guided = settings.scales != (1.0, 1.0)
    validation = settings.validation_count(settings.trajectories)
    fitted = settings.trajectories - validation
    total = settings.model_calls + search_nfe(fitted, validation, numbers, guided, settings.rounds)
    total += network_nfe(fitted, validation, numbers, guided, settings.rounds_with_network)
    return total + len(settings.extra_guidance) * nfe_for_cfg(settings)


def run_make(settings: MakeSettings) -> None:
    """Do the work of `ba-solver make`; the same command with --resume continues where it was interrupted."""
    training = settings
    if settings.objective == "published" or settings.cfg_mode == "per_branch":
        training = dataclasses.replace(settings, nfe="")  # no schedules are fitted
    training.check()
    check_extra_cfg(settings)
    trained = settings.out.exists() and settings.resume
    if not trained:
        check_out(settings.out)
    trajectories = settings.out.with_suffix(".trajectories")
    backbone = open_backbone(settings)
    if training.nfe:
        say(f"Some {planned_nfe(settings):,} model calls in all.")
    say("1 of 2: record")
    record(settings, settings, trajectories, backbone)
    say("2 of 2: train")
    if trained:
        say(f"{settings.out} is trained already.")
    else:
        train_from(training, training, (trajectories,), settings.out, settings, backbone)
    add_extra_cfg(settings, trajectories, lambda scale: backbone)
    say("Measured on validation trajectories alone; `ba-solver evaluate` compares with other solvers at length.")
