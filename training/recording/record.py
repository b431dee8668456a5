"""`ba-solver record`: sampling trajectories of a backbone as safetensors shards, and how exact they are."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bas_core.files import CheckpointError, read_user_text
from ...bas_core.grids import time_grid, time_shift
from ...bas_core.guidance import CFG_MODES
from ..backbones import Backbone, BackboneChoice, open_backbone
from ..baselines import run_baseline
from ..processes import processes
from ..progress import progress, say
from ..settings import UsageError, check_positive, prepare_folder
from .reference_solver import (
    LAST_TIME,
    REFERENCE_SOLVER,
    batch_generator,
    random_times,
    record_branches,
    record_trajectory,
    refined_times,
)
from .shards import open_shard, save_shard, shard_bytes

# The teacher's own error, over that of ten calls of the multistep method, from which on it is warned about: a
# SideNet cannot become more exact than what it is taught.
COARSE = 0.1
CHECKED_TRAJECTORIES = 8
COMPARED_CALLS = 10

# What an unfinished recording may be gone on with although it differs: older ones do not tell the patch size.
MAY_HAVE_CHANGED = ("trajectories", "patch_size")
# Shards of the starts lie in this folder of the trajectories'. They end where the first two intervals of few-step
# grids do.
PREFIXES = "prefixes"
PREFIXES_UNTIL = 0.69
# Added to the seed, so that starts have other noises than the whole runs.
PREFIX_SEEDS = 500_000


@dataclass(frozen=True, kw_only=True)
class Recording:
    """How trajectories are recorded.

    Attributes:
        trajectories: how many sampling runs.
        points: points a trajectory, and as many backbone calls a trajectory.
        prefixes: how many more runs to record from noise for a stretch only: what will become of a noise is decided
            there, and takes many noises to learn.
        prefix_points: points of these.
        record_batch: trajectories recorded together, and in one shard.
        cfg_mode: combined (the SideNet predicts the guided velocity) or per_branch (each branch of CFG; the paper).
        storage: float32, or float16 for half the disk space.
        seed: of noise and times.
    """

    trajectories: int = 256
    points: int = 40
    prefixes: int = 1024
    prefix_points: int = 8
    record_batch: int = 32
    cfg_mode: str = "combined"
    storage: str = "float32"
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class RecordSettings(BackboneChoice, Recording):
    """Record sampling runs of a model: all that training needs of it.

    Attributes:
        out: folder for the shards; the same command goes on with an unfinished recording.
    """

    out: Path


@dataclass(frozen=True)
class Stretch:
    """A part of the path, and runs to record on it.

    Attributes:
        folder: for the shards.
        runs: how many.
        points: points a run.
        until: time of the last point.
        seed_offset: makes other noises of the same seed.
    """

    folder: Path
    runs: int
    points: int
    until: float
    seed_offset: int = 0


def stretches(recording: Recording, out: Path, backbone: Backbone) -> list[Stretch]:
    """What a recording is made of: whole runs, and the starts of more."""
    until = time_shift(torch.tensor(PREFIXES_UNTIL), backbone.shift).item() * backbone.start
    whole = Stretch(out, recording.trajectories, recording.points, LAST_TIME)
    starts = Stretch(out / PREFIXES, recording.prefixes, recording.prefix_points, until, PREFIX_SEEDS)
    return [whole, starts] if recording.prefixes else [whole]


def describe(settings: BackboneChoice, recording: Recording, stretch: Stretch, backbone: Backbone) -> dict[str, Any]:
    """What the shards say of themselves: everything that must be alike for them to be trained on together."""
    prompts = read_user_text(settings.prompts).encode() if settings.prompts else b""
    return {
        "backbone": backbone.identity,
        "shape": list(backbone.shape),
        "cfg_mode": recording.cfg_mode,
        "guidance": list(settings.scales),
        "guidance_interval": list(settings.guidance_interval),
        "points": stretch.points,
        "until": stretch.until,
        "teacher": REFERENCE_SOLVER,
        "patch_size": backbone.patch_size,
        "shift": backbone.shift,
        "start": backbone.start,
        "null": backbone.null,
        "num_classes": backbone.num_classes,
        "conditions": backbone.conditions,
        "prompts": hashlib.sha256(prompts + settings.negative_prompt.encode()).hexdigest()[:16]
        if prompts
        else backbone.conditions_digest,
        "storage": recording.storage,
        "record_batch": recording.record_batch,
        "trajectories": stretch.runs,
        "seed": recording.seed,
    }


def check_recording(recording: Recording, backbone: Backbone) -> None:
    """Refuse what cannot be recorded.

    Raises:
        UsageError: saying which setting and why.
    """
    check_positive(recording, "trajectories", "record_batch")
    if recording.prefixes < 0 or recording.prefix_points < 4:
        raise UsageError(
            f"--prefixes must not be negative and --prefix-points at least 4; got {recording.prefixes} and "
            f"{recording.prefix_points}."
        )
    if recording.points < 8:
        raise UsageError(
            f"--points must be at least 8, so that trajectories are finer than what is trained; got {recording.points}."
        )
    for name, valid in (("cfg_mode", CFG_MODES), ("storage", ("float32", "float16"))):
        if getattr(recording, name) not in valid:
            raise UsageError(
                f"--{name.replace('_', '-')} must be one of {', '.join(valid)}; got {getattr(recording, name)!r}."
            )
    if recording.cfg_mode == "per_branch" and (backbone.embedded_guidance or backbone.combine):
        raise UsageError(
            f"--cfg-mode branch needs plain CFG of two branches, which {backbone.name} does not use. Use guided."
        )


def draw_batch(
    recording: Recording, stretch: Stretch, choice: BackboneChoice, backbone: Backbone, index: int
) -> dict[str, Any]:
    """Times [N + 1], noise [m, C, *spatial], labels [m] and the CFG scale of one shard."""
    generator = batch_generator(recording.seed + stretch.seed_offset, index)
    first = index * recording.record_batch
    count = min(recording.record_batch, stretch.runs - first)
    # The root of the model's own shift: fine where it is sampled finely, and still not coarse near the data.
    times = random_times(stretch.points, generator, backbone.shift**0.5, backbone.start, stretch.until)
    low, high = choice.scales
    return {
        "times": times,
        "scale": low + (high - low) * torch.rand((), generator=generator).item(),
        "noise": backbone.noise(torch.randn((count, *backbone.shape), generator=generator)),
        "labels": (first + torch.arange(count)) % backbone.conditions,
    }


def record_shard(path: Path, drawn: dict[str, Any], recording: Recording, choice: BackboneChoice, backbone: Backbone,
                 about: dict[str, Any]) -> None:  # fmt: skip
    """Record one batch of trajectories and write it."""
    noise, times, labels = drawn["noise"].to(backbone.device), drawn["times"], drawn["labels"]
    field = backbone.field(labels, drawn["scale"], choice.guidance_interval, "per_branch")
    tensors: dict[str, Tensor] = {}
    with torch.inference_mode():
        if recording.cfg_mode == "per_branch" and len(field.conditions) == 2:
            tensors["states"], tensors["velocities"], tensors["velocities_null"] = record_branches(field, noise, times)
        else:
            field = backbone.field(labels, drawn["scale"], choice.guidance_interval, "combined")
            tensors["states"], tensors["velocities"] = record_trajectory(field, noise, times)
    kept = torch.float16 if recording.storage == "float16" else torch.float32
    tensors = {name: tensor.to("cpu", kept) for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ArithmeticError("The trajectories do not fit into float16. Record with --storage float32.")
    count = len(labels)
    rows = {"times": times.expand(count, -1), "labels": labels, "scales": torch.full((count,), drawn["scale"])}
    save_shard(path, tensors | rows, about)


def reference_error(
    recording: Recording,
    whole: Stretch,
    choice: BackboneChoice,
    backbone: Backbone,
    checked: int = CHECKED_TRAJECTORIES,
) -> dict[str, float]:
    """How far the teacher's ends are from those of one twice as fine, on the first `checked` noises.

    Returns:
        `error`: root-mean-square distance. `relative`: over the error of ten calls of the multistep method from the
        same noises, which is what a SideNet is to beat. `calls`: what the measurement cost, in calls a trajectory times
        trajectories.
    """
    drawn = draw_batch(recording, whole, choice, backbone, 0)
    noise, labels = drawn["noise"][:checked].to(backbone.device), drawn["labels"][:checked]
    times = drawn["times"]
    field = backbone.field(labels, drawn["scale"], choice.guidance_interval, "combined")
    coarse_grid = LAST_TIME + (backbone.start - LAST_TIME) * time_grid(COMPARED_CALLS, backbone.shift)

    def distance(x: Tensor, reference: Tensor) -> float:
        return (x - reference).square().mean().sqrt().item()

    with torch.inference_mode():
        fine, own = (record_trajectory(field, noise, grid)[0][:, -1] for grid in (refined_times(times), times))
        error = distance(own, fine)
        rival = distance(run_baseline("adams_bashforth2", field, noise, coarse_grid), fine)
    return {"error": error, "relative": error / max(rival, 1e-12), "calls": field.calls * len(noise)}


def plan_text(recording: Recording, backbone: Backbone) -> str:
    """What a recording will cost, before it starts."""
    velocities = 2 if recording.cfg_mode == "per_branch" and backbone.null is not None else 1
    points = recording.trajectories * recording.points + recording.prefixes * recording.prefix_points
    size = shard_bytes(backbone.shape, points, velocities, 2 if recording.storage == "float16" else 4)
    starts = f", and the starts of {recording.prefixes} more" if recording.prefixes else ""
    return (
        f"Recording {recording.trajectories} trajectories of {recording.points} points of {backbone.name}{starts}: "
        f"{points:,} "
        f"backbone calls (in batches of {recording.record_batch}), {size / 1e9:.3g} GB on disk."
    )


def check_out(out: Path) -> None:
    """Refuse a folder that holds other things than shards.

    Raises:
        UsageError: it does, or cannot be written.
    """
    prepare_folder(out)
    there = (path for path in out.iterdir() if path.suffix != ".safetensors" and not path.name.startswith("."))
    strange = sorted({path.name for path in there} - {PREFIXES})
    if strange:
        raise UsageError(
            f"--out {out} holds other things ({strange[0]}). Choose an empty folder, or that of a recording to go on "
            "with."
        )


def shards_there(out: Path, about: dict[str, Any]) -> set[str]:
    """Names of the shards that an earlier call finished.

    Raises:
        CheckpointError: one is damaged, or of another recording.
    """
    there = sorted(out.glob("*.safetensors"))
    for path in there:
        said = open_shard(path)[1]
        differing = [key for key in about if key not in MAY_HAVE_CHANGED and said.get(key) != about[key]]
        if differing:
            was = "; ".join(f"{key} was {said.get(key)!r}, now {about[key]!r}" for key in differing)
            raise CheckpointError(
                f"--out {out} holds another recording ({path.name}: {was}). Choose another folder; nothing is "
                "overwritten."
            )
    return {path.name for path in there}


def record(
    choice: BackboneChoice, recording: Recording, out: Path, backbone: Backbone, checked: int = CHECKED_TRAJECTORIES
) -> dict[str, Any]:
    """Record what is missing of a recording. Several processes (`accelerate launch`) share the shards.

    Args:
        choice, recording: settings.
        out: folder.
        backbone: what `choice` names.
        checked: on so many trajectories the teacher's own error is measured.

    Returns:
        What the shards of its whole runs say of themselves.
    """
    choice.check_guidance(backbone)
    check_recording(recording, backbone)
    parts = stretches(recording, out, backbone)
    for stretch in parts:
        check_out(stretch.folder)
    say(plan_text(recording, backbone))
    abouts = {stretch: describe(choice, recording, stretch, backbone) for stretch in parts}
    jobs = [(stretch, index) for stretch in parts for index in range(-(-stretch.runs // recording.record_batch))]
    there = {stretch.folder / name for stretch in parts for name in shards_there(stretch.folder, abouts[stretch])}
    missing = [job for job in jobs if shard_path(recording, *job) not in there]
    if there:
        say(f"{len(jobs) - len(missing)} of {len(jobs)} shards are there already; going on.")
    if not missing:
        return abouts[parts[0]]
    return backbone.within(lambda: record_missing(choice, recording, backbone, abouts, missing, checked))


def record_missing(
    choice: BackboneChoice,
    recording: Recording,
    backbone: Backbone,
    abouts: dict[Stretch, dict[str, Any]],
    missing: list[tuple[Stretch, int]],
    checked: int,
) -> dict[str, Any]:
    """Record these shards, after a look at how exact the teacher is; returns what those of whole runs say."""
    whole = next(iter(abouts))
    measured = report_reference(reference_error(recording, whole, choice, backbone, checked), recording)
    rank, count, meet = processes(backbone.device.type == "cpu")
    mine = missing[rank::count]
    calls = sum(stretch.points for stretch, _ in mine)
    for stretch, index in progress(mine, "record"):
        began = time.perf_counter()
        drawn = draw_batch(recording, stretch, choice, backbone, index)
        about = abouts[stretch] | measured | {"shard": index}
        record_shard(shard_path(recording, stretch, index), drawn, recording, choice, backbone, about)
        if (stretch, index) == mine[0]:
            seconds = time.perf_counter() - began
            left = seconds * (calls / stretch.points - 1) / 60
            say(f"The first {len(drawn['labels'])} trajectories took {seconds:.3g} s; about {left:.2g} minutes to go.")
    meet()
    return abouts[whole] | measured


def shard_path(recording: Recording, stretch: Stretch, index: int) -> Path:
    """Where a shard lies. Its name says the seed: shards of the same name hold the same noises."""
    return stretch.folder / f"trajectories-{recording.seed:04d}-{index:05d}.safetensors"


def report_reference(measured: dict[str, float], recording: Recording) -> dict[str, float]:
    """Say how exact the teacher is, and warn where it is coarse; returns what the shards keep of it."""
    say(
        f"The teacher's own error is {measured['error']:.2g}, {100 * measured['relative']:.2g} % of that of ten calls "
        f"of a multistep method ({measured['calls']:.0f} calls to find out)."
    )
    if measured["relative"] > COARSE:
        say(
            "Warning: that is coarse, and a SideNet learns the teacher's error too. Record with more --points than "
            f"{recording.points}."
        )
    return {"reference_error": measured["error"], "reference_relative_error": measured["relative"]}


def run_record(settings: RecordSettings) -> dict[str, Any]:
    """Do the work of `ba-solver record`."""
    prepare_folder(settings.out)
    return record(settings, settings, settings.out, open_backbone(settings))
