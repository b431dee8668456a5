"""`ba-solver make`: record, train and evaluate in a row, with defaults that suit most models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from .backbones import BackboneChoice, open_backbone
from .extra_cfg import add_extra_cfg, check_extra_cfg, nfe_for_cfg
from .measuring.evaluate import Evaluation, evaluate
from .measuring.rivals import Measurement
from .measuring.validation import RIVALS, SCORED
from .network.options import Training
from .presets import CHECKED, FULL, QUICK, with_preset
from .progress import say
from .recording.record import COMPARED_CALLS, Recording, record
from .schedules.surrogate_search import surrogate_search_nfe
from .schedules.tuning import BATCH
from .settings import UsageError, parse_nfe, plain, prepare_folder
from .train import train_from


@dataclass(frozen=True, kw_only=True)
class MakeSettings(BackboneChoice, Recording, Training, Evaluation):
    """Record a model's sampling runs, train a SideNet on them and evaluate it.

    Attributes:
        out: the SideNet's file. Trajectories, log and report lie beside it, in NAME.trajectories, NAME.run and
            NAME.report.
        preset: quick (no network: schedules alone, in some 1,500 model calls) or full (a network too, and schedules
            tuned by gradients); other flags change its values.
        nfe: fit schedules for these numbers of model calls, such as 5,7,10.
        extra_guidance: further CFG scales to fit schedules for, with a quick SideNet's work each; the schedules of one
            scale serve from half to one and a half times of it.
        seed: of noises, weights and batches.
        trajectories: how many sampling runs to record.
        tune: steps that tune each schedule by gradients through whole samplings, which takes the memory of a model call
            with gradients; 0 = none. A tuning that does not help the validation trajectories is undone.
    """

    out: Path
    preset: str = FULL
    nfe: str = "5,7,10"
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
    calls = settings.trajectories * settings.points + settings.prefixes * settings.prefix_points
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
    settings = with_preset(settings, settings.preset)
    # The paper's objective trains the network alone, per branch; schedules are fitted for combined CFG.
    training = dataclasses.replace(settings, nfe="", tune=0) if settings.objective == "published" else settings
    training.check()
    parse_nfe(settings.nfe)
    check_extra_cfg(settings.extra_guidance, settings, settings)
    if settings.out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors; got {settings.out}.")
    trajectories, report = settings.out.with_suffix(".trajectories"), settings.out.with_suffix(".report")
    prepare_folder(report)
    backbone = open_backbone(settings)
    say("1 of 3: record")
    record(settings, settings, trajectories, backbone, CHECKED)
    say("2 of 3: train")
    if settings.out.exists() and settings.resume:
        say(f"{settings.out} is trained already.")
    else:
        train_from(training, training, (trajectories,), settings.out, settings, backbone)
    add_extra_cfg(settings, trajectories, lambda scale: backbone)
    if settings.preset == QUICK:
        say("3 of 3: evaluated on validation trajectories. `ba-solver evaluate` measures more.")
        return []
    say("3 of 3: evaluate")
    more = {"trajectories": (trajectories,), "seed": settings.seed, "settings": plain(settings)}
    return evaluate(settings, settings, backbone, settings.out, report, more)
