"""`ba-solver make`: record, train and evaluate in a row, with defaults that suit most models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from .backbones import BackboneChoice, open_backbone
from .presets import CHECKED, QUICK, with_effort
from .measuring.validation import RIVALS, SCORED
from .measuring.rivals import Measurement
from .measuring.evaluate import Evaluation, evaluate
from .extra_cfg import add_extra_cfg, nfe_for_cfg, check_extra_cfg
from .network.options import Training
from .progress import say
from .recording.record import CHECKED_TRAJECTORIES, COMPARED_CALLS, Recording, record
from .schedules.surrogate_search import surrogate_search_nfe
from .schedules.tuning import BATCH
from .settings import UsageError, parse_nfe, plain, prepare_folder
from .train import train_from


@dataclass(frozen=True, kw_only=True)
class MakeSettings(BackboneChoice, Recording, Training, Evaluation):
    """Record a model's sampling runs, train a SideNet on them and evaluate it.

    Attributes:
        out: the SideNet's file. Trajectories, log and report lie beside it, in NAME.trajectories, NAME.run and NAME.report.
        effort: quick (no network: times and weights alone, in some 1,500 calls), standard (some 20,000 calls), thorough
            (tuned by gradients too); other flags change what it says. Left out: as standard, with times searched on the
            model, which takes some 5,000 to 40,000 calls more.
        extra_guidance: further CFG scales to find times and weights for, a quick SideNet's work each; what is found for
            one scale serves from half to one and a half times of it.
        seed: of noises, weights and batches.
        trajectories: how many sampling runs to record.
        tune: steps that tune each number of calls' times and weights by gradients through whole runs; 0 = none, where
            the memory of a call with gradients is not there. Where it does not help runs that were held out, it is
            undone.
    """

    out: Path
    effort: str = ""
    extra_guidance: tuple[float, ...] = ()
    seed: int = 1
    tune: int = 480


def planned_nfe(settings: MakeSettings) -> int:
    """About how many backbone calls an effort costs, with times found on recorded paths; one call for one sample.

    A call with gradients counts as three.
    """
    made = sum(n + 1 for n in parse_nfe(settings.nfe))  # with half calls, one more than it costs
    validation = settings.validation_count(settings.trajectories)
    fitted = settings.trajectories - validation
    calls = settings.trajectories * settings.points + settings.starts * settings.prefix_points
    calls += CHECKED * (3 * settings.points + COMPARED_CALLS)
    calls += surrogate_search_nfe(fitted, parse_nfe(settings.nfe))
    calls += 3 * settings.tune * BATCH * made
    calls += len(settings.extra_guidance) * nfe_for_cfg(settings)
    return calls + min(SCORED, validation) * (1 + len(RIVALS)) * made


def run_make(settings: MakeSettings) -> list[Measurement]:
    """Do the work of `ba-solver make`; the same command with --resume goes on where it was interrupted.

    Returns:
        The evaluation's lines; none for a quick SideNet, whose file holds a short one.
    """
    settings = with_effort(settings, settings.effort) if settings.effort else settings
    training = settings if settings.nfe else dataclasses.replace(settings, nfe=settings.nfe)
    training.check()
    parse_nfe(settings.nfe)
    check_extra_cfg(settings.extra_guidance, settings, training)
    if settings.out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors; got {settings.out}.")
    trajectories, report = settings.out.with_suffix(".trajectories"), settings.out.with_suffix(".report")
    prepare_folder(report)
    backbone = open_backbone(settings)
    say("1 of 3: record")
    quick = settings.effort == QUICK
    record(settings, settings, trajectories, backbone, CHECKED if settings.effort else CHECKED_TRAJECTORIES)
    say("2 of 3: train")
    if settings.out.exists() and settings.resume:
        say(f"{settings.out} is trained already.")
    else:
        train_from(training, training, (trajectories,), settings.out, settings, backbone)
    add_extra_cfg(settings, trajectories, lambda scale: backbone)
    if quick:
        say("3 of 3: evaluated on held-out runs. `ba-solver evaluate` measures more.")
        return []
    say("3 of 3: evaluate")
    more = {"trajectories": (trajectories,), "seed": settings.seed, "settings": plain(settings)}
    return evaluate(settings, settings, backbone, settings.out, report, more)
