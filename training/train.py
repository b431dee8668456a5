"""`ba-solver train`: a SideNet from recorded trajectories, in stages each of which can be interrupted.

1. the times of schedules for the numbers of calls that it will be used with (needs the backbone);
2. the network, from pairs of the trajectories' points (or by the published objective, which needs the backbone and
data);
3. the schedules' coefficients, and if asked for, schedules tuned by gradients (needs the backbone).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bas_core.checkpoint import SideNetCard, load_sidenet, save_sidenet
from ..bas_core.files import CheckpointError, read_pickled_tensors, write_atomically, write_text
from ..bas_core.schedule import Schedule
from ..bas_core.sidenet import SideNet
from .backbones import Backbone, BackboneChoice, open_backbone
from .measuring.report import table as error_table
from .measuring.validation import SCORED, score_validation
from .network.new_sidenet import data_mean, mean_in, new_sidenet
from .network.options import Training
from .network.stages import Job, all_pairs_stage, published_stage, residual_table
from .processes import MAIN_PROCESS
from .progress import say
from .recording.record import PREFIXES
from .recording.trajectories import Trajectories, check_alike, open_trajectories
from .schedules.fitting import fit_coefficients
from .schedules.surrogate_search import search_on_surrogate
from .schedules.tuning import tune, tuned_or_kept, tuning_loop
from .settings import UsageError, check_device, parse_nfe, plain, prepare_folder, shareable

# The objective of a SideNet whose network is not trained.
NO_NETWORK = "no network, times and weights alone"
# Settings that may change when a run is resumed: they do not change what it computes.
MAY_CHANGE = ("resume", "device")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(BackboneChoice, Training):
    """Train a SideNet from recorded trajectories; the backbone is not needed, but for the stages that say so.

    Attributes:
        trajectories: folders that `ba-solver record` wrote.
        out: the SideNet's file; beside it a folder NAME.run keeps the unfinished run, its log and its plots.
        backbone: for the stages that need it: kind:where, as for `record`.
        guidance: CFG scale; leave it out to take the trajectories'.
    """

    trajectories: tuple[Path, ...]
    out: Path
    backbone: str = ""
    guidance: tuple[float, ...] = ()


def check_choice(choice: BackboneChoice, about: dict[str, Any], backbone: Backbone | None) -> None:
    """Refuse trajectories of another guidance, backbone or resolution than asked for.

    Raises:
        CheckpointError: saying which.
    """
    if choice.guidance and list(choice.scales) != about["guidance"]:
        raise CheckpointError(
            f"The trajectories were recorded with guidance {about['guidance']}; {list(choice.scales)} is asked for. "
            "Record trajectories with that, or leave --guidance out."
        )
    if backbone is None:
        return
    if backbone.fingerprint != about["backbone"]["fingerprint"]:
        raise CheckpointError(
            f"The trajectories were recorded from {about['backbone']['name']!r} (fingerprint "
            f"{about['backbone']['fingerprint']}); {backbone.name!r} ({backbone.fingerprint}) is asked for. "
            "Record trajectories of it."
        )
    if list(backbone.shape) != about["shape"]:
        raise CheckpointError(
            f"The trajectories hold states of {about['shape']}; {backbone.name} is asked for at "
            f"{list(backbone.shape)}. Give the resolution they were recorded at."
        )


def open_prefixes(folders: tuple[Path, ...], about: dict[str, Any]) -> Trajectories | None:
    """The starts that were recorded beside trajectories; None if there are none.

    Raises:
        CheckpointError: they do not belong to the trajectories, or a shard is damaged.
    """
    there = [folder / PREFIXES for folder in folders if (folder / PREFIXES).is_dir()]
    if not any(path for folder in there for path in folder.glob("*.safetensors")):
        return None
    starts, said = open_trajectories(there)
    alike = {key: said.get(key) for key in ("points", "until")}
    check_alike(about | alike, said, str(there[0]), f"in {folders[0]} it is")
    return starts


def split_validation(trajectories: Trajectories, training: Training) -> tuple[Trajectories, Trajectories]:
    """Training runs, and runs to validate on.

    Raises:
        UsageError: there are too few.
    """
    runs = len(trajectories) // trajectories.branches
    validation = training.validation_count(runs)
    if runs - validation < 1:
        raise UsageError(f"--validation {validation} leaves none of the {runs} recorded runs to train on. Record more.")
    return trajectories.split(validation)


def learn_schedules(job: Job, mean: Tensor | None) -> dict[int, Schedule]:
    """The times of schedules for numbers of calls, or those kept from before an interruption."""
    path = job.folder / "time_grids.pt"
    if path.exists():
        return {int(n): Schedule(**parts) for n, parts in read_pickled_tensors(path).items()}
    calls = parse_nfe(job.training.nfe, "--nfe")
    found = job.within(lambda: search_on_surrogate(job.replay(job.trajectories), calls, mean))
    if MAIN_PROCESS:
        kept = {n: vars(run) for n, run in found.items()}
        write_atomically(path, lambda temporary: torch.save(kept, temporary))
    return found


def begin(job: Job) -> SideNet:
    """The SideNet before its training, with the mean of the data where it is to save a first call.

    Where times are learned, that decides whether it is.
    """
    training = job.training
    tolerance = {"tolerance": math.inf} if training.nfe else {}
    mean = data_mean(job.trajectories, job.about["start"], training.data_mean_size, **tolerance)
    if training.nfe:
        job.runs = learn_schedules(job, mean)
        mean = mean if any(run.analytic_first_step for run in job.runs.values()) else None
    sidenet = new_sidenet(training, job.about, mean)
    job.mean = mean_in(sidenet, job.about["shape"])
    return sidenet.to(job.device)


def fit(job: Job) -> SideNet:
    """All stages that are asked for."""
    training = job.training
    sidenet = begin(job)
    if training.steps:
        sidenet = (published_stage if training.objective == "published" else all_pairs_stage)(job, sidenet)
    sidenet = sidenet.eval().requires_grad_(False)
    if job.runs:
        job.runs = job.within(lambda: finish_runs(job, sidenet), gradients=bool(training.tune))
    return sidenet


def finish_runs(job: Job, sidenet: SideNet) -> dict[int, Schedule]:
    """The runs with their weights, tuned if that is asked for."""
    runs = fit_coefficients(sidenet, job.replay(job.trajectories), job.runs)
    if not job.training.tune:
        return runs
    loop = tuning_loop(job.training.loop(job.training.tune, 1))
    parts = job.replay(job.trajectories), job.replay(job.validation)
    for n, run in list(runs.items()):
        runs[n] = tuned_or_kept(partial(tune, sidenet, parts, run, n, loop, job.folder), run, f"{n} calls")
    return runs


def evaluation(job: Job, sidenet: SideNet) -> dict[str, Any]:
    """What is known of the result without an evaluation of its own: of a trained network the residual variance left,
    and of times found on recorded paths the errors of the held-out runs."""
    found: dict[str, Any] = {}
    if job.training.trains or job.training.start_from:
        found["residual_variance"] = table = residual_table(sidenet, job)
        left = ", ".join(f"{kind} {value:.2f}" for kind, value in table["kind"].items())
        say(f"Held-out residual variance left (1 = a straight line): {left}")
    if job.runs:
        rows = job.within(lambda: score_validation(sidenet, job.runs, job.replay(job.validation)))
        say(error_table(rows))
        scale = job.about["guidance"][0]
        found |= {
            "guidance": scale,
            "noises": min(SCORED, len(job.validation)),
            "endpoint_error": [dataclasses.asdict(row) for row in rows],
        }
    return found


def card_of(job: Job, sidenet: SideNet, settings: Any, seconds: float, found: dict[str, Any]) -> SideNetCard:
    """What the SideNet's file says of itself."""
    runs = (len(job.trajectories) + len(job.validation)) // job.trajectories.branches
    recorded = {"trajectories": runs * job.about["points"]}
    if job.starts is not None:
        recorded["prefixes"] = len(job.starts) // job.trajectories.branches * job.starts.times.shape[1]
    spent = dict(job.spent) if job.training.objective == "published" else {**recorded, **job.spent}
    low, high = job.about["guidance"]
    begun = job.training.start_from
    earlier = SideNetCard() if begun is None else load_sidenet(begun)[1]
    return SideNetCard(
        cfg_mode=job.about["cfg_mode"],
        cfg_range=(low, high),
        backbone=job.about["backbone"],
        schedules={(low + high) / 2: job.runs} if job.runs else {},
        training={
            "objective": job.training.objective if job.training.trains or begun else NO_NETWORK,
            "recorded_runs": runs,
            "held_out_runs": len(job.validation) // job.trajectories.branches,
            "recorded": job.about,
            "backbone_calls": spent,
            "settings": shareable(settings),
            "seconds": round(seconds),
            "torch": torch.__version__,
            **({} if begun is None else {"started_from": earlier.training}),
        },
        license=earlier.license,
        evaluation=found,
    )


def check_run_folder(folder: Path, settings: Any, resume: bool) -> None:
    """Keep the settings beside the unfinished run, and refuse to mix runs.

    Raises:
        UsageError: there is an unfinished run and no --resume, or its settings differ.
    """
    prepare_folder(folder)
    path = folder / "settings.json"
    asked = {k: v for k, v in plain(settings).items() if k not in MAY_CHANGE}
    if any(folder.glob("*.pt")):
        if not resume:
            raise UsageError(f"{folder} holds an unfinished run. Go on with --resume, or delete the folder.")
        known = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in asked if known.get(key) != asked[key]]
        if differing:
            said = "; ".join(f"{key} was {known.get(key)!r}, now {asked[key]!r}" for key in differing)
            raise UsageError(f"--resume goes on with the same settings only: {said}.")
    write_text(path, json.dumps(asked, indent=1))


@contextmanager
def account(path: Path, spent: Counter[str]) -> Iterator[Callable[[], float]]:
    """Counts seconds, and keeps them and the calls spent in the file when the work is done or interrupted; where the
    unfinished run beside it is gone on with, from those in the file on."""
    earlier = 0.0
    if path.exists() and any(path.parent.glob("*.pt")):
        known = json.loads(path.read_text(encoding="utf-8"))
        earlier = known["seconds"]
        spent.update(known["backbone_calls"])
    start = time.perf_counter()

    def seconds() -> float:
        return earlier + time.perf_counter() - start

    try:
        yield seconds
    finally:
        if MAIN_PROCESS:
            write_text(path, json.dumps({"seconds": round(seconds(), 1), "backbone_calls": dict(spent)}))


def train_from(
    training: Training,
    choice: BackboneChoice,
    trajectories: tuple[Path, ...],
    out: Path,
    settings: Any,
    backbone: Backbone | None = None,
) -> SideNetCard:
    """Train a SideNet on recorded trajectories and write it; returns what its file says.

    Args:
        training: how.
        choice: the backbone, for the stages that need it.
        trajectories: folders.
        out: the SideNet's file.
        settings: to be stored with it.
        backbone: what `choice` names, if it is open already.
    """
    training.check()
    if out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors; got {out}.")
    if out.exists():
        raise UsageError(f"--out {out} exists already; nothing is overwritten. Choose another name, or delete it.")
    if training.objective == "published" and training.anchors != 1:
        say("Note: the published SideNet has one anchor; with --anchors 2 its second is never shown in training.")
    if training.needs_backbone and not choice.backbone:
        raise UsageError("The published objective and --nfe need --backbone.")
    folder = out.with_suffix(".run")
    check_run_folder(folder, settings, training.resume)
    recorded, about = open_trajectories(trajectories)
    starts = open_prefixes(trajectories, about)
    if training.needs_backbone:
        backbone = backbone or open_backbone(choice)
    check_choice(choice, about, backbone)
    if training.objective == "published" and about["cfg_mode"] == "combined" and about["guidance"] != [1.0, 1.0]:
        raise CheckpointError(
            "The published objective trains on each branch of guidance, and is validated on trajectories of them: "
            "record with --cfg-mode per_branch."
        )
    if training.nfe and about["cfg_mode"] != "combined":
        raise UsageError("Schedules need trajectories of the guided velocity: record with --cfg-mode combined.")
    parts = split_validation(recorded, training)
    job = Job(training, *parts, about, check_device(choice.device), folder, backbone, starts)
    with account(folder / "spent.json", job.spent) as seconds:
        sidenet = fit(job)
        found = evaluation(job, sidenet)
    card = card_of(job, sidenet, settings, seconds(), found)
    if MAIN_PROCESS:
        save_sidenet(out, sidenet, card)
        for state in folder.glob("*.pt"):
            state.unlink()
    say(f"Written: {out}; log and plots in {folder}.")
    return card


def run_train(settings: TrainSettings) -> SideNetCard:
    """Do the work of `ba-solver train`."""
    return train_from(settings, settings, settings.trajectories, settings.out, settings)
