"""`ba-solver train`: a SideNet from recorded trajectories, in stages each of which can be interrupted.

1. schedules, fitted on a surrogate of the model and on rollouts (needs the backbone);
2. the network, from pairs of the trajectories' points (or by the published objective, which needs backbone and data);
3. how much schedules take of what the network predicts, fitted on rollouts (needs the backbone).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..bas_core.checkpoint import SideNetCard, load_sidenet, save_sidenet
from ..bas_core.files import CheckpointError, read_pickled_tensors, write_atomically, write_text
from ..bas_core.schedule import Schedule
from ..bas_core.sidenet import SideNet
from .backbones import Backbone, BackboneChoice, open_backbone
from .interrupted import Account, read_object, rebuilt
from .measuring.report import table as error_table
from .measuring.validation import validation_rows
from .network.new_sidenet import data_mean, kept_mean, mean_in, new_sidenet
from .network.options import Training
from .network.stages import Job, all_pairs_stage, published_stage, variance_unexplained
from .processes import MAIN_PROCESS, processes
from .progress import say
from .recording.record import PREFIXES
from .recording.replay import SideNetInParts
from .recording.trajectories import Trajectories, check_same_recording, open_trajectories
from .schedules.judging import Found
from .schedules.search import (
    VALIDATION_TRAJECTORIES,
    Search,
    search_for,
    search_with_network,
    validated_schedules,
)
from .settings import UsageError, check_device, differences, parse_nfe, plain, prepare_folder, shareable

# The objective of a SideNet whose network is not trained.
NO_NETWORK = "no network, schedules alone"
# Settings that may change when a training is resumed: they do not change its result.
MAY_CHANGE = ("resume", "device")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(BackboneChoice, Training):
    """Train a SideNet from recorded trajectories; the backbone is needed only by the stages that say so.

    Attributes:
        recordings: folders that `ba-solver record` wrote.
        out: the SideNet's file; beside it the folder NAME.run keeps the unfinished training, its log and its plots.
        backbone: for the stages that need it: kind:where, as for `record`.
        guidance: CFG scale; leave it out to take the recordings'.
    """

    recordings: tuple[Path, ...]
    out: Path
    backbone: str = ""
    guidance: tuple[float, ...] = ()


def check_recordings(
    training: Training, choice: BackboneChoice, metadata: dict[str, Any], backbone: Backbone | None
) -> None:
    """Refuse trajectories of another guidance, backbone or resolution than asked for, or of the wrong CFG mode.

    Raises:
        UsageError, CheckpointError: saying which.
    """
    if choice.guidance and list(choice.scales) != metadata["guidance"]:
        raise CheckpointError(
            f"The trajectories were recorded with guidance {metadata['guidance']}; {list(choice.scales)} is asked for. "
            "Record some with that, or leave --guidance out."
        )
    if backbone is not None and backbone.fingerprint != metadata["backbone"]["fingerprint"]:
        raise CheckpointError(
            f"The trajectories were recorded from {metadata['backbone']['name']!r} (fingerprint "
            f"{metadata['backbone']['fingerprint']}); {backbone.name!r} ({backbone.fingerprint}) is asked for. Record "
            "some of it."
        )
    if backbone is not None and list(backbone.shape) != metadata["shape"]:
        raise CheckpointError(
            f"The trajectories hold states of {metadata['shape']}; {backbone.name} is asked for at "
            f"{list(backbone.shape)}. Give the resolution they were recorded at."
        )
    combined = metadata["cfg_mode"] == "combined"
    if training.objective == "published" and combined and metadata["guidance"] != [1.0, 1.0]:
        raise UsageError(
            "The published objective trains on each branch of CFG, and is validated on trajectories of each: record "
            "with --cfg-mode per_branch."
        )
    if training.nfe and not combined:
        raise UsageError(
            "Schedules are fitted on trajectories of combined CFG: record with --cfg-mode combined, or leave --nfe out."
        )


def open_prefixes(folders: tuple[Path, ...], metadata: dict[str, Any]) -> Trajectories | None:
    """The prefixes that were recorded beside trajectories; None if there are none.

    Raises:
        CheckpointError: they do not belong to the trajectories, or a shard is damaged.
    """
    prefix_folders = [folder / PREFIXES for folder in folders if any((folder / PREFIXES).glob("*.safetensors"))]
    if not prefix_folders:
        return None
    prefixes, own = open_trajectories(prefix_folders)
    check_same_recording(metadata | {name: own[name] for name in ("points", "until")}, own, prefix_folders[0])
    return prefixes


def split_validation(trajectories: Trajectories, training: Training) -> tuple[Trajectories, Trajectories]:
    """Trajectories to train on, and to validate on.

    Raises:
        UsageError: there are too few.
    """
    count = len(trajectories) // trajectories.branches
    validation = training.validation_count(count)
    if count - validation < 1:
        raise UsageError(f"--validation {validation} leaves none of the {count} trajectories to train on. Record more.")
    return trajectories.split(validation)


def kept(job: Job, name: str, find: Callable[[], dict[int, Found]]) -> dict[int, Found]:
    """Schedules, found or read from before an interruption; one process finds, so that all train for the same."""
    path = job.folder / f"{name}.pt"
    rank, _, wait_for_all = processes(job.device.type == "cpu")
    if rank == 0 and not path.exists():
        parts = {n: vars(each) | {"schedule": vars(each.schedule)} for n, each in job.within(find).items()}
        write_atomically(path, lambda temporary: torch.save(parts, temporary))
    wait_for_all()
    stored: dict[int, Found] = {}
    for n, parts in read_pickled_tensors(path).items():
        fields = rebuilt(dict, parts, path)
        fields["schedule"] = rebuilt(Schedule, fields.get("schedule"), path)
        stored[int(n)] = rebuilt(Found, fields, path)
    return stored


def fit(job: Job) -> tuple[SideNet, dict[int, Found]]:
    """All stages that are asked for: the SideNet, and schedules by NFE."""
    training = job.training
    # The search decides whether a first step is analytic; without it, the first velocities do.
    tolerance = {"tolerance": math.inf} if training.nfe else {}
    general = job.backbone is None or job.within(job.backbone.has_general_mean)
    size = training.data_mean_size if general else 0
    mean = kept_mean(training, data_mean(job.trajectories, job.metadata["start"], size, **tolerance))
    found: dict[int, Found] = {}

    @cache
    def search() -> Search:
        """Run, or run again after an interruption: its rollouts are kept."""
        numbers = parse_nfe(training.nfe)
        return search_for(job.replay(job.trajectories), numbers, mean, training.rounds, job.folder)

    if training.nfe:
        found = kept(job, "schedules", lambda: validated_schedules(search(), job.replay(job.validation), mean))
    needless = bool(found) and not any(each.schedule.analytic_first_step for each in found.values())
    sidenet = new_sidenet(training, job.metadata, None if needless else mean)
    job.mean = mean_in(sidenet, job.metadata["shape"])
    sidenet = sidenet.to(job.device)
    if training.steps:
        sidenet = (published_stage if training.objective == "published" else all_pairs_stage)(job, sidenet)
    sidenet = sidenet.eval().requires_grad_(False)
    if found and training.rounds_with_network:
        asked = SideNetInParts(sidenet, job.device, job.metadata["record_batch"])
        rounds, judged = training.rounds_with_network, job.replay(job.validation)
        found = kept(
            job, "schedules with the network", lambda: search_with_network(search(), found, judged, asked, rounds)
        )
    return sidenet, found


def validate(job: Job, sidenet: SideNet, found: dict[int, Found]) -> dict[str, Any]:
    """Measurements on validation trajectories: of a trained network the fraction of variance unexplained, of schedules
    the end-point errors."""
    measured: dict[str, Any] = {}
    if job.training.steps or job.training.start_from:
        measured["variance_unexplained"] = unexplained = variance_unexplained(sidenet, job)
        kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in unexplained["kind"].items())
        say(f"Fraction of variance unexplained on validation trajectories (1 = a straight line): {kinds}")
    if found:
        rows = validation_rows(found)
        say(error_table(rows))
        judged = job.replay(job.validation)
        measured |= {
            "guidance": judged.cfg,
            "noises": len(judged.cfg_rows(VALIDATION_TRAJECTORIES)),
            "endpoint_error": [dataclasses.asdict(row) for row in rows],
        }
    return measured


def card_of(
    job: Job, settings: Any, seconds: float, schedules: dict[int, Schedule], evaluation: dict[str, Any]
) -> SideNetCard:
    """The metadata of the SideNet's file."""
    count = (len(job.trajectories) + len(job.validation)) // job.trajectories.branches
    recorded = {"pilot": job.metadata.get("pilot_calls", 0), "trajectories": count * job.metadata["points"]}
    if job.prefixes is not None:
        recorded["prefixes"] = len(job.prefixes) // job.trajectories.branches * job.prefixes.times.shape[1]
    nfe = dict(job.nfe) if job.training.objective == "published" else {**recorded, **job.nfe}
    low, high = job.metadata["guidance"]
    begun = job.training.start_from
    earlier = SideNetCard() if begun is None else load_sidenet(begun)[1]
    return SideNetCard(
        cfg_mode=job.metadata["cfg_mode"],
        cfg_range=(low, high),
        backbone=job.metadata["backbone"],
        schedules={job.replay(job.trajectories).cfg: schedules} if schedules else {},
        part=tuple(job.metadata["part"]),
        training={
            "objective": job.training.objective if job.training.steps or begun else NO_NETWORK,
            "trajectories": count,
            "validation_trajectories": len(job.validation) // job.trajectories.branches,
            "recorded": job.metadata,
            "backbone_calls": nfe,
            "settings": shareable(settings),
            "seconds": round(seconds),
            "torch": torch.__version__,
            **({} if begun is None else {"started_from": earlier.training}),
        },
        license=earlier.license,
        evaluation=evaluation,
    )


def check_run_folder(folder: Path, settings: Any, resume: bool) -> None:
    """Write the settings beside the unfinished training, and refuse to mix trainings.

    Raises:
        UsageError: there is an unfinished training and no --resume, or its settings differ.
    """
    prepare_folder(folder)
    path = folder / "settings.json"
    asked = plain(settings)
    if any(folder.glob("*.pt")):
        if not resume:
            raise UsageError(f"{folder} holds an unfinished training. Continue with --resume, or delete the folder.")
        differing = differences(read_object(path), asked, MAY_CHANGE)
        if differing:
            raise UsageError(f"--resume continues with the same settings only: {differing}.")
    write_text(path, json.dumps(asked, indent=1))


def train_from(
    training: Training,
    choice: BackboneChoice,
    recordings: tuple[Path, ...],
    out: Path,
    settings: Any,
    backbone: Backbone | None = None,
) -> SideNetCard:
    """Train a SideNet on recorded trajectories and write it.

    Args:
        training: how.
        choice: the backbone, for the stages that need it.
        recordings: folders.
        out: the SideNet's file.
        settings: to be stored with it.
        backbone: what `choice` names, if it is open already.

    Returns:
        The file's metadata.
    """
    training.check()
    check_out(out)
    if training.objective == "published" and training.anchors != 1:
        say("Note: the published SideNet has one anchor; with --anchors 2 its second is never used in training.")
    if training.needs_backbone and not choice.backbone:
        raise UsageError("The published objective and --nfe need --backbone.")
    folder = out.with_suffix(".run")
    check_run_folder(folder, settings, training.resume)
    trajectories, metadata = open_trajectories(recordings)
    prefixes = open_prefixes(recordings, metadata)
    if training.needs_backbone:
        backbone = backbone or open_backbone(choice)
    check_recordings(training, choice, metadata, backbone)
    parts = split_validation(trajectories, training)
    nfe = Account(folder / "nfe.json")
    job = Job(training, *parts, metadata, check_device(choice.device), folder, backbone, prefixes, nfe=nfe)
    try:
        sidenet, found = fit(job)
        evaluation = validate(job, sidenet, found)
    finally:
        nfe.write()
    schedules = {n: each.schedule for n, each in found.items()}
    card = card_of(job, settings, nfe.seconds, schedules, evaluation)
    if MAIN_PROCESS:
        save_sidenet(out, sidenet, card)
        for state in folder.glob("*.pt"):
            state.unlink()
    say(f"Written: {out}; log and plots in {folder}.")
    return card


def check_out(out: Path) -> None:
    """Refuse a file name that cannot be written to.

    Raises:
        UsageError: it has another suffix, or the file exists.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors; got {out}.")
    if out.exists():
        raise UsageError(f"--out {out} exists already; nothing is overwritten. Choose another name, or delete it.")


def run_train(settings: TrainSettings) -> SideNetCard:
    """Do the work of `ba-solver train`."""
    return train_from(settings, settings, settings.recordings, settings.out, settings)
