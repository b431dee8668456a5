"""`ba-solver record`: trajectories of a backbone as safetensors shards, and how exact they are."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...bas_core.files import CheckpointError
from ...bas_core.grids import grid_between, time_grid, time_shift
from ...bas_core.guidance import CFG_MODES, CFGMode, Field
from ..backbones import Backbone, BackboneChoice, open_backbone
from ..backbones.base import samples_at_once
from ..baselines import run_baseline
from ..processes import processes
from ..progress import progress, say
from ..settings import UsageError, check_positive, differences, prepare_folder
from ..text_files import read_user_text
from .reference_solver import (
    LAST_TIME,
    REFERENCE_SOLVER,
    adapted_times,
    batch_generator,
    default_times,
    jittered,
    record_branches,
    record_trajectory,
)
from .repeatable import ASKED, Call, check_repeatable, remembering
from .shards import open_shard, save_shard, shard_bytes
from .trajectories import Trajectories, open_trajectories

# A few trajectories, on usual times, show where the model's velocity bends; the points of the recording lie there.
PILOT, PILOT_POINTS = "pilot", 40
PILOT_SEEDS, CHECK_SEEDS = 400_000, 450_000
# Points of a trajectory, where it is left open: the first of these with which the reference solver's own error is no
# more than the share COARSE of the error of so many calls of a multistep method. What is fitted comes to about .4 of
# that error, and cannot become more exact than the trajectories that it is fitted on.
POINTS = (34, 48, 70)
COARSE, COMPARED_NFE = 0.1, 10
# The solver's error, over the distance between its ends on all times and on every second one. It is of order 4, but not
# yet with so few points: measured on three models with 24 to 40, it is a sixth to a third.
REFINEMENT = 0.25
# Shards of the prefixes lie in this subfolder. They end where the first two intervals of few-step grids do.
PREFIXES = "prefixes"
PREFIXES_UNTIL = 0.69
# Added to the seed, so that prefixes have other noises than the whole trajectories.
PREFIX_SEEDS = 500_000
# Where the path is recorded from a later time than it starts at, the states there are in this subfolder: the ends of
# samplings from noise, of so many points. They need not be exact, for samplings in few steps come there less exactly
# still; the trajectories that start at them are.
STARTS, START_POINTS, START_SEEDS = "starts", 17, 600_000


@dataclass(frozen=True, kw_only=True)
class Recording:
    """How trajectories are recorded.

    Attributes:
        trajectories: how many.
        points: points of a trajectory, which are as many model calls; 0 = as many as the reference solver needs.
        prefixes: how many more trajectories to record from the noise for a first stretch only: what becomes of a
            noise is decided there, and takes many noises to learn.
        prefix_points: points of these.
        jitter: whether batches have times moved at random, so that a network sees all times; schedules need none.
        pilot: trajectories that are recorded first, to see where the model's velocity bends.
        checked: on so many noises the reference solver's own error is measured; 0 = it is not.
        record_batch: trajectories recorded together, and in one shard; so many samples go through the model at once
            wherever schedules are fitted. 0 = 4, or 1 of videos.
        cfg_mode: combined (the SideNet predicts the velocity of combined CFG) or per_branch (each branch of CFG, as in
            the paper).
        storage: float32, or float16 for half the disk space.
        seed: of noise and times.
    """

    trajectories: int = 39
    points: int = 0
    prefixes: int = 0
    prefix_points: int = 8
    jitter: bool = True
    pilot: int = 2
    checked: int = 2
    record_batch: int = 0
    cfg_mode: str = "combined"
    storage: str = "float32"
    seed: int = 1

    def check_recording(self, backbone: Backbone) -> None:
        """Refuse what cannot be recorded.

        Raises:
            UsageError: saying which setting and why.
        """
        check_positive(self, "trajectories", "pilot")
        for name in ("record_batch", "checked"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} must not be negative; got {getattr(self, name)}.")
        if self.prefixes < 0 or self.prefix_points < 4:
            raise UsageError(
                f"--prefixes must not be negative and --prefix-points at least 4; got {self.prefixes} and "
                f"{self.prefix_points}."
            )
        if self.points and self.points < 8:
            raise UsageError(f"--points must be at least 8, to be finer than what is trained, or 0; got {self.points}.")
        for name, valid in (("cfg_mode", CFG_MODES), ("storage", ("float32", "float16"))):
            if getattr(self, name) not in valid:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} must be one of {', '.join(valid)}; got {getattr(self, name)!r}.")
        if self.cfg_mode == "per_branch" and (backbone.embedded_guidance or backbone.combine):
            raise UsageError(
                f"--cfg-mode per_branch needs plain CFG of two branches, which {backbone.name} does not use. Use "
                "combined."
            )

    @property
    def starts(self) -> int:
        """From how many states trajectories start, the pilot's and the check's included."""
        return self.pilot + self.checked + self.trajectories

    @property
    def model_calls(self) -> int:
        """Model calls of the whole recording with its pilot, each for one sample; more where the points are left open
        and `POINTS[0]` are too few."""
        points = self.points or POINTS[0]
        checked = self.checked * (points + points // 2 + 1 + COMPARED_NFE)
        pilot = self.pilot * (PILOT_POINTS + ASKED)
        return pilot + checked + self.trajectories * points + self.prefixes * self.prefix_points


@dataclass(frozen=True, kw_only=True)
class RecordSettings(BackboneChoice, Recording):
    """Record sampling trajectories of a model: all that training needs of it.

    Attributes:
        out: folder for the shards; the same command goes on with an unfinished recording.
    """

    out: Path


@dataclass(frozen=True)
class Stretch:
    """A part of the path, and the trajectories to record on it.

    Attributes:
        folder: for the shards.
        count: how many trajectories.
        times: [points] of each, before jitter.
        seed_offset: makes other noises of the same seed.
        measured: what is known of the reference solver's own error.
        starts: what they start at, for a later part of the path; None = noise.
        last_only: whether only the last point of each is kept.
    """

    folder: Path
    count: int
    times: Tensor
    seed_offset: int = 0
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)
    starts: Trajectories | None = None
    last_only: bool = False

    @property
    def points(self) -> int:
        """Of each trajectory."""
        return len(self.times)


def recorded_until(backbone: Backbone) -> float:
    """The time of whole trajectories' last point."""
    return max(LAST_TIME, backbone.last_time)


def usual_times(points: int, backbone: Backbone, until: float | None = None) -> Tensor:
    """Times for a model of which nothing is known but its shift; None = to the last point."""
    until = recorded_until(backbone) if until is None else until
    # The root of the model's own shift: fine where it is sampled finely, and still not coarse near the data.
    return default_times(points, backbone.shift**0.5, backbone.first_time, until)


def record_starts(recording: Recording, out: Path, choice: BackboneChoice, backbone: Backbone) -> Trajectories | None:
    """The states that the trajectories of a later part of the path start at, recorded or read; None = noise."""
    before = backbone.before
    if before is None:
        return None
    times = usual_times(START_POINTS, before, backbone.first_time)
    stretch = Stretch(out / STARTS, recording.starts, times, START_SEEDS, last_only=True)
    record_stretches([stretch], choice, recording, before)
    return open_trajectories((stretch.folder,))[0]


def prefix_stretch(recording: Recording, out: Path, backbone: Backbone) -> Stretch:
    """The prefixes."""
    until = time_shift(torch.tensor(PREFIXES_UNTIL), backbone.shift).item() * backbone.start
    times = usual_times(recording.prefix_points, backbone, max(until, recorded_until(backbone)))
    return Stretch(out / PREFIXES, recording.prefixes, times, PREFIX_SEEDS)


def pilot_stretch(recording: Recording, out: Path, backbone: Backbone, starts: Trajectories | None) -> Stretch:
    """The pilot."""
    times = usual_times(PILOT_POINTS, backbone)
    return Stretch(out / PILOT, recording.pilot, times, PILOT_SEEDS, starts=starts)


def describe(settings: BackboneChoice, recording: Recording, stretch: Stretch, backbone: Backbone) -> dict[str, Any]:
    """The shards' metadata: everything that must be alike for them to be trained on together, and what made them."""
    prompts = read_user_text(settings.prompts).encode() if settings.prompts else b""
    return {
        "backbone": backbone.identity,
        "shape": list(backbone.shape),
        "cfg_mode": recording.cfg_mode,
        "guidance": list(settings.scales),
        "guidance_interval": list(settings.guidance_interval),
        "points": stretch.points,
        "until": float(stretch.times[-1]),
        "jitter": recording.jitter,
        "reference_solver": REFERENCE_SOLVER,
        "patch_size": backbone.patch_size,
        "parameters": backbone.parameters,
        "shift": backbone.shift,
        "start": backbone.first_time,
        "end": backbone.last_time,
        "part": list(backbone.part),
        "before": None if backbone.before is None else backbone.before.identity,
        "null": backbone.null,
        "num_classes": backbone.num_classes,
        "conditions": backbone.conditions,
        "prompts": hashlib.sha256(prompts + settings.negative_prompt.encode()).hexdigest()[:16]
        if prompts
        else backbone.conditions_digest,
        "storage": recording.storage,
        "record_batch": recording.record_batch,
        "trajectories": stretch.count,
        "seed": recording.seed,
    }


def batch_size(recording: Recording, stretch: Stretch, index: int) -> int:
    """How many trajectories a shard has."""
    return min(recording.record_batch, stretch.count - index * recording.record_batch)


def draw_batch(
    recording: Recording, stretch: Stretch, choice: BackboneChoice, backbone: Backbone, index: int
) -> dict[str, Any]:
    """Times [N], noise or other starts [m, C, *spatial], labels [m] and the CFG scale of one shard."""
    generator = batch_generator(recording.seed + stretch.seed_offset, index)
    first, count = index * recording.record_batch, batch_size(recording, stretch, index)
    times = jittered(stretch.times, generator) if recording.jitter else stretch.times
    low, high = choice.scales
    # Of a range, every other shard has the middle: schedules are fitted on trajectories of one scale.
    share = torch.rand((), generator=generator).item()
    place = 0.5 if index % 2 == 0 else share
    drawn = {
        "times": times,
        "scale": low + (high - low) * place,
        "noise": backbone.noise(torch.randn((count, *backbone.shape), generator=generator)),
        "labels": (first + torch.arange(count)) % backbone.conditions,
    }
    if stretch.starts is None:
        return drawn
    rows = first + torch.arange(count)
    return drawn | {"noise": stretch.starts.states[rows, 0 * rows], "labels": stretch.starts.labels[rows]}


def field_of(drawn: dict[str, Any], recording: Recording, choice: BackboneChoice, backbone: Backbone) -> Field:
    """The field of one batch's samples, for states in main memory."""
    mode = cast(CFGMode, recording.cfg_mode)
    return backbone.field_in_main_memory(
        drawn["labels"], drawn["scale"], recording.record_batch, choice.guidance_interval, mode
    )


def recorded(drawn: dict[str, Any], field: Field, recording: Recording) -> dict[str, Tensor]:
    """The tensors of one batch's shard: see `save_shard`."""
    noise, times, labels = drawn["noise"], drawn["times"], drawn["labels"]
    tensors: dict[str, Tensor] = {}
    with torch.inference_mode():
        if recording.cfg_mode == "per_branch" and len(field.conditions) == 2:
            tensors["states"], tensors["velocities"], tensors["velocities_null"] = record_branches(field, noise, times)
        else:
            tensors["states"], tensors["velocities"] = record_trajectory(field, noise, times)
    dtype = torch.float16 if recording.storage == "float16" else torch.float32
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ArithmeticError("The trajectories do not fit into float16. Record with --storage float32.")
    count = len(labels)
    rows = {"times": times.expand(count, -1), "labels": labels, "scales": torch.full((count,), drawn["scale"])}
    return tensors | rows


def reference_error(
    recording: Recording,
    times: Tensor,
    choice: BackboneChoice,
    backbone: Backbone,
    starts: Trajectories | None = None,
) -> dict[str, float]:
    """How exact the reference solver is on some times: from its ends on every second of them.

    Returns:
        `reference_error`: root-mean-square distance from the exact ends, about. `reference_relative_error`: the same
        over the error of ten calls of a multistep method from the same noises. `reference_calls`: model calls spent.
    """
    few = dataclasses.replace(recording, jitter=False, record_batch=recording.checked)
    drawn = draw_batch(few, Stretch(Path(), recording.checked, times, CHECK_SEEDS, starts=starts), choice, backbone, 0)
    noise = drawn["noise"]
    field = field_of(drawn, dataclasses.replace(recording, cfg_mode="combined"), choice, backbone)
    coarse_grid = grid_between(time_grid(COMPARED_NFE, backbone.shift), float(times[0]), float(times[-1]))

    def distance(x: Tensor, reference: Tensor) -> float:
        return (x - reference).square().mean().sqrt().item()

    with torch.inference_mode():
        own, half = (record_trajectory(field, noise, grid)[0][:, -1].clone() for grid in (times, every_second(times)))
        multistep = distance(run_baseline("adams_bashforth2", field, noise, coarse_grid), own)
    error = REFINEMENT * distance(half, own)
    relative = error / max(multistep, 1e-12)
    say(
        f"With {len(times)} points the reference solver's own error is about {error:.2g}, {100 * relative:.2g} % of "
        f"that of {COMPARED_NFE} calls of a multistep method."
    )
    calls = field.calls * len(noise)
    return {"reference_error": error, "reference_relative_error": relative, "reference_calls": calls}


def every_second(times: Tensor) -> Tensor:
    """Half of the times, with both ends."""
    return torch.cat([times[:-1:2], times[-1:]])


def planned_stretch(
    recording: Recording, out: Path, choice: BackboneChoice, backbone: Backbone, starts: Trajectories | None
) -> Stretch:
    """Where the points of whole trajectories lie, and how many there are: from the pilot, recorded or read."""
    counts = (recording.pilot, recording.checked, recording.trajectories)
    of_pilot, of_check, of_whole = (None, None, None) if starts is None else starts.split_into(counts)
    pilot = pilot_stretch(recording, out, backbone, of_pilot)
    path = pilot.folder / "pilot.safetensors"
    asked = describe(choice, recording, pilot, backbone) | {"asked_points": recording.points}
    rank, _, wait_for_all = processes(backbone.device.type == "cpu")
    if rank == 0 and not path.exists():
        backbone.within(lambda: measure_pilot(path, pilot, recording, choice, backbone, asked, of_check))
    wait_for_all()  # the others read what the first one measured
    tensors, found = open_shard(path)
    differing = differences(found, asked, ("trajectories", "record_batch"))
    if differing:
        raise CheckpointError(
            f"--out {out} holds another recording ({differing}). Choose another folder; nothing is overwritten."
        )
    times = adapted_times(found["chosen_points"], tensors["times"][0], tensors["velocities"])
    return Stretch(out, recording.trajectories, times, measured=found["measured"], starts=of_whole)


def measure_pilot(
    path: Path,
    pilot: Stretch,
    recording: Recording,
    choice: BackboneChoice,
    backbone: Backbone,
    metadata: dict[str, Any],
    starts: Trajectories | None,
) -> None:
    """Record the pilot, choose the number of points by the reference solver's error, and write both.

    Raises:
        UsageError: the model does not answer the same question alike.
    """
    own = dataclasses.replace(recording, jitter=False, cfg_mode="combined")
    drawn = draw_batch(dataclasses.replace(own, record_batch=recording.pilot), pilot, choice, backbone, 0)
    made: list[Call] = []
    field = remembering(field_of(drawn, own, choice, backbone), made)
    tensors = recorded(drawn, field, own)
    with torch.inference_mode():
        check_repeatable(field, made, torch.device("cpu"))
    calls = recording.pilot * (PILOT_POINTS + ASKED)

    def error_with(points: int) -> dict[str, float]:
        times = adapted_times(points, tensors["times"][0], tensors["velocities"])
        return reference_error(own, times, choice, backbone, starts)

    points, measured = choose_points(recording, error_with)
    measured["pilot_calls"] = calls + measured.pop("calls")
    prepare_folder(path.parent)
    save_shard(path, tensors, metadata | {"chosen_points": points, "measured": measured})


def choose_points(recording: Recording, error_with: Callable[[int], dict[str, float]]) -> tuple[int, dict[str, float]]:
    """How many points a trajectory gets: as asked for, or the first of `POINTS` that are exact enough.

    Args:
        recording: settings; without a check the first ones are taken.
        error_with: see `reference_error`.

    Returns:
        The number, and what was measured of it, with the `calls` of all that were measured.
    """
    tried = (recording.points,) if recording.points else POINTS
    if not recording.checked:
        return tried[0], {"calls": 0}
    calls = 0
    for points in tried:
        measured = error_with(points)
        calls += int(measured["reference_calls"])
        if measured["reference_relative_error"] <= COARSE:
            return points, measured | {"calls": calls}
    say(
        "Warning: that is coarse, and a SideNet learns the reference solver's error too. Record with more --points "
        f"than {points}."
    )
    return points, measured | {"calls": calls}


def plan_text(recording: Recording, stretch: Stretch, backbone: Backbone) -> str:
    """What a recording will cost."""
    velocities = 2 if recording.cfg_mode == "per_branch" and backbone.null is not None else 1
    calls = recording.trajectories * stretch.points + recording.prefixes * recording.prefix_points
    size = shard_bytes(backbone.shape, calls, velocities, 2 if recording.storage == "float16" else 4)
    prefixes = f", and the prefixes of {recording.prefixes} more" if recording.prefixes else ""
    return (
        f"Recording {recording.trajectories} trajectories of {stretch.points} points of {backbone.name}{prefixes}: "
        f"{calls:,} model calls (in batches of {recording.record_batch}), {size / 1e9:.3g} GB on disk."
    )


def check_out(out: Path) -> None:
    """Refuse a folder that holds other things than shards.

    Raises:
        UsageError: it does, or cannot be written.
    """
    prepare_folder(out)
    others = (path for path in out.iterdir() if path.suffix != ".safetensors" and not path.name.startswith("."))
    strange = sorted({path.name for path in others} - {PREFIXES, PILOT, STARTS})
    if strange:
        raise UsageError(
            f"--out {out} holds other things ({strange[0]}). Choose an empty folder, or that of an unfinished "
            "recording."
        )


def finished_shards(out: Path, metadata: dict[str, Any]) -> dict[Path, int]:
    """The shards that an earlier call finished, and how many trajectories each has.

    Raises:
        CheckpointError: one is damaged, or of another recording.
    """
    found = {}
    for path in sorted(out.glob("*.safetensors")):
        tensors, own = open_shard(path)
        found[path] = len(tensors["labels"])
        differing = differences(own, metadata, ("trajectories",))
        if differing:
            raise CheckpointError(
                f"--out {out} holds another recording ({path.name}: {differing}). Choose another folder; nothing is "
                "overwritten."
            )
    return found


def shard_path(recording: Recording, stretch: Stretch, index: int) -> Path:
    """Where a shard lies. Its name has the seed: shards of the same name hold the same noises."""
    return stretch.folder / f"trajectories-{recording.seed:04d}-{index:05d}.safetensors"


def record(choice: BackboneChoice, recording: Recording, out: Path, backbone: Backbone) -> None:
    """Record the missing shards of a recording. Several processes (`accelerate launch`) share them.

    Args:
        choice, recording: settings.
        out: folder.
        backbone: what `choice` names.
    """
    choice.check_guidance(backbone)
    recording.check_recording(backbone)
    recording = dataclasses.replace(recording, record_batch=samples_at_once(recording.record_batch, backbone.shape))
    check_out(out)
    whole = planned_stretch(recording, out, choice, backbone, record_starts(recording, out, choice, backbone))
    stretches = [whole, prefix_stretch(recording, out, backbone)][: 2 if recording.prefixes else 1]
    say(plan_text(recording, whole, backbone))
    record_stretches(stretches, choice, recording, backbone)


def record_stretches(
    stretches: Sequence[Stretch], choice: BackboneChoice, recording: Recording, backbone: Backbone
) -> None:
    """Record what is missing of some stretches."""
    metadata = [describe(choice, recording, part, backbone) | {**stretches[0].measured} for part in stretches]
    for stretch in stretches:
        check_out(stretch.folder)
    jobs = [(i, n) for i, part in enumerate(stretches) for n in range(-(-part.count // recording.record_batch))]
    known = {k: n for i, part in enumerate(stretches) for k, n in finished_shards(part.folder, metadata[i]).items()}
    rank, count, wait_for_all = processes(backbone.device.type == "cpu")
    wait_for_all()  # none may write before all have seen the same shards
    # A recording's last shard may be short; where more trajectories are asked for, it is recorded anew.
    missing = [
        (i, n)
        for i, n in jobs
        if known.get(shard_path(recording, stretches[i], n), 0) < batch_size(recording, stretches[i], n)
    ]
    if known:
        say(f"{len(jobs) - len(missing)} of {len(jobs)} shards are already recorded; the others follow.")

    def record_missing() -> None:
        mine = missing[rank::count]
        seconds = time.perf_counter()
        for number, (i, n) in enumerate(progress(mine, "record")):
            stretch = stretches[i]
            drawn = draw_batch(recording, stretch, choice, backbone, n)
            tensors = recorded(drawn, field_of(drawn, recording, choice, backbone), recording)
            if stretch.last_only:
                tensors |= {name: tensors[name][:, -1:] for name in ("times", "states", "velocities")}
            save_shard(shard_path(recording, stretch, n), tensors, metadata[i] | {"shard": n})
            if number == 0:
                seconds = time.perf_counter() - seconds
                left = seconds * (sum(stretches[j].points for j, _ in mine) / stretch.points - 1) / 60
                say(f"The first {len(drawn['labels'])} trajectories took {seconds:.3g} s; about {left:.2g} min to go.")

    if missing:
        backbone.within(record_missing)
        wait_for_all()


def run_record(settings: RecordSettings) -> None:
    """Do the work of `ba-solver record`."""
    prepare_folder(settings.out)
    record(settings, settings, settings.out, open_backbone(settings))
