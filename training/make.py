"""`ba-solver make`: record, train and evaluate in a row, with defaults that suit most models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from .backbones import BackboneChoice, open_backbone
from .extra_cfg import add_extra_cfg, check_extra_cfg, nfe_for_cfg
from .measuring.evaluate import Evaluation, check_evaluation, evaluate
from .measuring.rivals import Measurement
from .network.options import Training
from .presets import FULL, QUICK
from .progress import say
from .recording.record import Recording, record
from .schedules.fitting import FIT_TRAJECTORIES
from .schedules.search import search_nfe
from .settings import parse_nfe, plain, prepare_folder
from .train import check_out, train_from


@dataclass(frozen=True, kw_only=True)
class MakeSettings(BackboneChoice, Recording, Training, Evaluation):
    """Record a model's trajectories, train a SideNet on them and evaluate it.

    Attributes:
        out: the SideNet's file. Trajectories, log and report lie beside it, in NAME.trajectories, NAME.run and
            NAME.report.
        preset: quick (no network, but schedules alone, with some 1,500 model calls) or full (a network too); other
            flags override it.
        extra_guidance: further CFG scales to fit schedules for, at the cost of the quick preset each; one scale's
            schedules serve from half to one and a half times of it.
        nfe: numbers of model calls to fit schedules for and to evaluate, such as 5,7,10.
        trajectories: how many to record.
        seed: of noises, weights and batches.
    """

    out: Path
    preset: str = FULL
    extra_guidance: tuple[float, ...] = ()
    nfe: str = "4,5,6,7,8,9,10,12"
    seed: int = 1


def planned_nfe(settings: MakeSettings) -> int:
    """How many model calls recording, training and validation take at most, each for one sample.

    More where the model needs more points than `POINTS[0]`. A tenth to a fifth less where few schedules have to be
    compared with known methods on the model.
    """
    numbers = parse_nfe(settings.nfe)
    guided = settings.scales != (1.0, 1.0)
    validation = settings.validation_count(settings.trajectories)
    fitted = settings.trajectories - validation
    total = settings.model_calls + search_nfe(fitted, validation, numbers, guided)
    if settings.steps or settings.start_from:
        total += (min(FIT_TRAJECTORIES, fitted) + validation) * sum(n + guided for n in numbers)
    return total + len(settings.extra_guidance) * nfe_for_cfg(settings)


def run_make(settings: MakeSettings) -> list[Measurement]:
    """Do the work of `ba-solver make`; the same command with --resume continues where it was interrupted.

    Returns:
        The evaluation's lines; none with the quick preset, whose file has the validation's.
    """
    training = settings
    if settings.objective == "published" or settings.cfg_mode == "per_branch":
        training = dataclasses.replace(settings, nfe="")  # no schedules are fitted
    training.check()
    check_evaluation(settings)
    check_extra_cfg(settings)
    trained = settings.out.exists() and settings.resume
    if not trained:
        check_out(settings.out)
    trajectories, report = settings.out.with_suffix(".trajectories"), settings.out.with_suffix(".report")
    prepare_folder(report)
    backbone = open_backbone(settings)
    say("1 of 3: record")
    record(settings, settings, trajectories, backbone)
    say("2 of 3: train")
    if trained:
        say(f"{settings.out} is trained already.")
    else:
        train_from(training, training, (trajectories,), settings.out, settings, backbone)
    add_extra_cfg(settings, trajectories, lambda scale: backbone)
    if settings.preset == QUICK:
        say("3 of 3: evaluated on validation trajectories. `ba-solver evaluate` measures more.")
        return []
    say("3 of 3: evaluate")
    more = {"recordings": (trajectories,), "seed": settings.seed, "settings": plain(settings)}
    return evaluate(settings, settings, backbone, settings.out, report, more)
