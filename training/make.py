"""`ba-solver make`: record, train and evaluate in a row, with defaults that suit most models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from .backbones import BackboneChoice, open_backbone
from .measuring.rivals import Measurement
from .measuring.score import Scoring, evaluate
from .network.options import Training
from .progress import say
from .recording.record import Recording, record
from .settings import UsageError, parse_calls, plain, prepare_folder
from .train import train_from


@dataclass(frozen=True, kw_only=True)
class MakeSettings(BackboneChoice, Recording, Training, Scoring):
    """Record a model's sampling runs, train a SideNet on them and evaluate it.

    Attributes:
        out: the SideNet's file. Chains, log and report lie beside it, in NAME.chains, NAME.run and NAME.report.
        seed: of noises, weights and batches.
        chains: how many sampling runs to record.
    """

    out: Path
    seed: int = 1


def run_make(settings: MakeSettings) -> list[Measurement]:
    """Do the work of `ba-solver make`; the same command with --resume goes on where it was interrupted."""
    training = settings if settings.grid_nfe else dataclasses.replace(settings, grid_nfe=settings.nfe)
    training.check()
    parse_calls(settings.nfe)
    if settings.out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors; got {settings.out}.")
    chains, report = settings.out.with_suffix(".chains"), settings.out.with_suffix(".report")
    prepare_folder(report)
    backbone = open_backbone(settings)
    say("1 of 3: record")
    record(settings, settings, chains, backbone)
    say("2 of 3: train")
    if settings.out.exists() and settings.resume:
        say(f"{settings.out} is trained already.")
    else:
        train_from(training, training, (chains,), settings.out, settings, backbone)
    say("3 of 3: evaluate")
    more = {"chains": (chains,), "seed": settings.seed, "settings": plain(settings)}
    return evaluate(settings, settings, backbone, settings.out, report, more)
