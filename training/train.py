"""`ba-solver train`: a SideNet from recorded chains, in up to four stages, each of which can be interrupted.

1. all pairs of the chains (or the published objective, which needs the backbone and data instead);
2. the time grids for the numbers of calls that it will be used with (needs the backbone); when all is done, the steps'
   weights on them;
3. closed loop: the real sampler, interval by interval (needs the backbone);
4. end point: the real sampler, with gradients through the backbone (needs it, and its memory).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..bas_core.checkpoint import SideNetCard, load_sidenet, save_sidenet
from ..bas_core.files import CheckpointError, read_pickled_tensors, write_atomically, write_text
from ..bas_core.runs import FittedRun
from ..bas_core.sidenet import SideNet
from .backbones import Backbone, BackboneChoice, open_backbone
from .network.closed_loop import end_point_loss, interval_loss
from .network.fresh import data_mean, make_sidenet, mean_in
from .network.options import Training
from .network.stages import Job, all_pairs_stage, published_stage, residual_table, rolled_stage
from .progress import MAIN_PROCESS, say
from .recording.chains import Chains, check_alike, open_chains
from .recording.record import STARTS
from .runs.fitting import fit_weights
from .runs.search import ROUNDS, learn_times
from .runs.tuning import tune, tuning_loop
from .settings import UsageError, check_device, parse_calls, plain, prepare_folder, shareable

# Settings that may change when a run is resumed: they do not change what it computes.
MAY_CHANGE = ("resume", "device", "compile")


@dataclass(frozen=True, kw_only=True)
class FitSettings(BackboneChoice, Training):
    """Train a SideNet from recorded chains; the backbone is not needed, but for the stages that say so.

    Attributes:
        chains: folders that `ba-solver record` wrote.
        out: the SideNet's file; beside it a folder NAME.run keeps the unfinished run, its log and its plots.
        backbone: for the stages that need it: kind:where, as for `record`.
        guidance: CFG scale; leave it out to take the chains'.
    """

    chains: tuple[Path, ...]
    out: Path
    backbone: str = ""
    guidance: tuple[float, ...] = ()


def check_choice(choice: BackboneChoice, about: dict[str, Any], backbone: Backbone | None) -> None:
    """Refuse chains of another guidance, backbone or resolution than asked for.

    Raises:
        CheckpointError: saying which.
    """
    if choice.guidance and list(choice.scales) != about["guidance"]:
        raise CheckpointError(
            f"The chains were recorded with guidance {about['guidance']}; {list(choice.scales)} is asked for. Record "
            "chains with that, or leave --guidance out."
        )
    if backbone is None:
        return
    if backbone.fingerprint != about["backbone"]["fingerprint"]:
        raise CheckpointError(
            f"The chains were recorded from {about['backbone']['name']!r} (fingerprint "
            f"{about['backbone']['fingerprint']}); {backbone.name!r} ({backbone.fingerprint}) is asked for. Record "
            "chains of it."
        )
    if list(backbone.shape) != about["shape"]:
        raise CheckpointError(
            f"The chains hold states of {about['shape']}; {backbone.name} is asked for at {list(backbone.shape)}. Give "
            "the resolution they were recorded at."
        )


def open_starts(folders: tuple[Path, ...], about: dict[str, Any]) -> Chains | None:
    """The starts that were recorded beside chains; None if there are none.

    Raises:
        CheckpointError: they do not belong to the chains, or a shard is damaged.
    """
    there = [folder / STARTS for folder in folders if (folder / STARTS).is_dir()]
    if not any(path for folder in there for path in folder.glob("*.safetensors")):
        return None
    starts, said = open_chains(there)
    alike = {key: said.get(key) for key in ("points", "until")}
    check_alike(about | alike, said, str(there[0]), f"in {folders[0]} it is")
    return starts


def hold_out(chains: Chains, wanted: int) -> tuple[Chains, Chains]:
    """Training runs, and runs to validate on.

    Raises:
        UsageError: there are too few.
    """
    runs = len(chains) // chains.branches
    held_out = wanted or min(64, max(1, runs // 8))
    if runs - held_out < 1:
        raise UsageError(f"--held-out {held_out} leaves none of the {runs} recorded runs to train on. Record more.")
    return chains.split(held_out)


def times_stage(job: Job, sidenet: SideNet, calls: Sequence[int]) -> dict[int, FittedRun]:
    """Stage 2: the times of runs for numbers of calls; in the family alone if they are tuned later."""
    path = job.folder / "time_grids.pt"
    if path.exists():
        return {int(n): FittedRun(**parts) for n, parts in read_pickled_tensors(path).items()}
    rounds = 0 if job.training.tune else ROUNDS
    found = learn_times(sidenet, job.replay(job.chains), job.rule, calls, job.training.grid_runs, rounds)
    if MAIN_PROCESS:
        kept = {n: vars(run) for n, run in found.items()}
        write_atomically(path, lambda temporary: torch.save(kept, temporary))
    return found


def fit(job: Job) -> SideNet:
    """All stages that are asked for."""
    training = job.training
    mean = data_mean(job.chains, job.about["start"], training.mean_size)
    sidenet = make_sidenet(training, job.about, mean)
    job.mean = mean_in(sidenet, job.about["shape"])
    sidenet = sidenet.to(job.device)
    if training.steps:
        sidenet = (published_stage if training.objective == "published" else all_pairs_stage)(job, sidenet)
    if training.grid_nfe:
        job.runs = times_stage(job, sidenet, parse_calls(training.grid_nfe, "--grid-nfe"))
    if training.closed_loop:
        sidenet = rolled_stage(job, sidenet, "closed_loop", training.closed_loop, interval_loss)
    if training.end_point:
        sidenet = rolled_stage(job, sidenet, "end_point", training.end_point, end_point_loss)
    sidenet = sidenet.eval().requires_grad_(False)
    if job.runs:
        job.runs = fit_weights(sidenet, job.replay(job.chains), job.rule, job.runs)
    if training.tune:
        loop = tuning_loop(training.loop(training.tune, training.loop_batch))
        parts = job.replay(job.chains), job.replay(job.held_out)
        job.runs = {n: tune(sidenet, parts, job.rule, run, n, loop, job.folder) for n, run in job.runs.items()}
    return sidenet


def card_of(job: Job, sidenet: SideNet, settings: Any, seconds: float) -> SideNetCard:
    """What the SideNet's file says of itself."""
    runs = (len(job.chains) + len(job.held_out)) // job.chains.branches
    recorded = {"chains": runs * job.about["points"]}
    if job.starts is not None:
        recorded["starts"] = len(job.starts) // job.chains.branches * job.starts.times.shape[1]
    spent = dict(job.spent) if job.training.objective == "published" else {**recorded, **job.spent}
    low, high = job.about["guidance"]
    begun = job.training.start_from
    earlier = SideNetCard() if begun is None else load_sidenet(begun)[1]
    return SideNetCard(
        velocity=job.about["velocity"],
        guidance_range=(low, high),
        backbone=job.about["backbone"],
        runs=job.runs,
        training={
            "objective": job.training.objective,
            "recorded_runs": runs,
            "held_out_runs": len(job.held_out) // job.chains.branches,
            "recorded": job.about,
            "backbone_calls": spent,
            "settings": shareable(settings),
            "seconds": round(seconds),
            "torch": torch.__version__,
            **({} if begun is None else {"started_from": earlier.training}),
        },
        licence=earlier.licence,
        evaluation={"residual_variance": residual_table(sidenet, job)},
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
    chains: tuple[Path, ...],
    out: Path,
    settings: Any,
    backbone: Backbone | None = None,
) -> SideNetCard:
    """Train a SideNet on recorded chains and write it; returns what its file says.

    Args:
        training: how.
        choice: the backbone, for the stages that need it.
        chains: folders.
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
        raise UsageError("The published objective, --grid-nfe, --closed-loop and --end-point need --backbone.")
    folder = out.with_suffix(".run")
    check_run_folder(folder, settings, training.resume)
    recorded, about = open_chains(chains)
    starts = open_starts(chains, about)
    if training.needs_backbone:
        backbone = backbone or open_backbone(choice)
    check_choice(choice, about, backbone)
    if training.objective == "published" and about["velocity"] == "guided" and about["guidance"] != [1.0, 1.0]:
        raise CheckpointError(
            "The published objective trains on each branch of guidance, and is validated on chains of them: record "
            "with --mode branch."
        )
    parts = hold_out(recorded, training.held_out)
    job = Job(training, *parts, about, check_device(choice.device), folder, backbone, starts)
    with account(folder / "spent.json", job.spent) as seconds:
        sidenet = fit(job)
    card = card_of(job, sidenet, settings, seconds())
    if MAIN_PROCESS:
        save_sidenet(out, sidenet, card)
        for state in folder.glob("*.pt"):
            state.unlink()
    left = card.evaluation["residual_variance"]["kind"]
    say(f"Held-out residual variance left (1 = a straight line): {', '.join(f'{k} {v:.2f}' for k, v in left.items())}")
    say(f"Written: {out}; log and plots in {folder}.")
    return card


def run_fit(settings: FitSettings) -> SideNetCard:
    """Do the work of `ba-solver train`."""
    return train_from(settings, settings, settings.chains, settings.out, settings)
