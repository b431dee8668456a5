"""`ba-solver record`: trajectories of a backbone as safetensors shards, and how exact they are."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...bas_core.files import CheckpointError
from ...bas_core.grids import time_grid, time_shift
from ...bas_core.guidance import CFG_MODES, CFGMode
from ..backbones import Backbone, BackboneChoice, open_backbone
from ..baselines import run_baseline
from ..processes import processes
from ..progress import progress, say
from ..settings import UsageError, check_positive, differences, prepare_folder
from ..text_files import read_user_text
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

# The reference solver's own error is warned about above this share of the error of so many calls of a multistep method:
# a SideNet cannot become more exact than the trajectories that it learns from.
COARSE = 0.1
COMPARED_NFE = 10
CHECKED_TRAJECTORIES = 8
# Shards of the prefixes lie in this subfolder. They end where the first two intervals of few-step grids do.
PREFIXES = "prefixes"
PREFIXES_UNTIL = 0.69
# Added to the seed, so that prefixes have other noises than the whole trajectories.
PREFIX_SEEDS = 500_000


@dataclass(frozen=True, kw_only=True)
class Recording:
    """How trajectories are recorded.

    Attributes:
        trajectories: how many.
        points: points of a trajectory, which are as many model calls.
        prefixes: how many more trajectories to record from the noise for a first stretch only: what becomes of a
            noise is decided there, and takes many noises to learn.
        prefix_points: points of these.
        record_batch: trajectories recorded together, and in one shard.
        cfg_mode: combined (the SideNet predicts the velocity of combined CFG) or per_branch (each branch of CFG, as in
            the paper).
        storage: float32, or float16 for half the disk space.
        seed: of noise and times.
    """

    trajectories: int = 256
    points: int = 40
    prefixes: int = 320
    prefix_points: int = 8
    record_batch: int = 32
    cfg_mode: str = "combined"
    storage: str = "float32"
    seed: int = 1

    def check_recording(self, backbone: Backbone) -> None:
        """Refuse what cannot be recorded.

        Raises:
            UsageError: saying which setting and why.
        """
        check_positive(self, "trajectories", "record_batch")
        if self.prefixes < 0 or self.prefix_points < 4:
            raise UsageError(
                f"--prefixes must not be negative and --prefix-points at least 4; got {self.prefixes} and "
                f"{self.prefix_points}."
            )
        if self.points < 8:
            raise UsageError(f"--points must be at least 8, to be finer than what is trained; got {self.points}.")
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
    def model_calls(self) -> int:
        """Model calls of the whole recording, each for one sample."""
        return self.trajectories * self.points + self.prefixes * self.prefix_points


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
        points: of each.
        until: time of the last point.
        seed_offset: makes other noises of the same seed.
    """

    folder: Path
    count: int
    points: int
    until: float
    seed_offset: int = 0


def stretches(recording: Recording, out: Path, backbone: Backbone) -> list[Stretch]:
    """The parts of a recording: whole trajectories, and the prefixes."""
    until = time_shift(torch.tensor(PREFIXES_UNTIL), backbone.shift).item() * backbone.start
    whole = Stretch(out, recording.trajectories, recording.points, LAST_TIME)
    prefixes = Stretch(out / PREFIXES, recording.prefixes, recording.prefix_points, until, PREFIX_SEEDS)
    return [whole, prefixes] if recording.prefixes else [whole]


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
        "until": stretch.until,
        "reference_solver": REFERENCE_SOLVER,
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
        "trajectories": stretch.count,
        "seed": recording.seed,
    }


def draw_batch(
    recording: Recording, stretch: Stretch, choice: BackboneChoice, backbone: Backbone, index: int
) -> dict[str, Any]:
    """Times [N], noise [m, C, *spatial], labels [m] and the CFG scale of one shard."""
    generator = batch_generator(recording.seed + stretch.seed_offset, index)
    first = index * recording.record_batch
    count = min(recording.record_batch, stretch.count - first)
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
                 metadata: dict[str, Any]) -> None:  # fmt: skip
    """Record one batch of trajectories and write it."""
    noise, times, labels = drawn["noise"].to(backbone.device), drawn["times"], drawn["labels"]
    mode = cast(CFGMode, recording.cfg_mode)
    field = backbone.field(labels, drawn["scale"], choice.guidance_interval, mode)
    tensors: dict[str, Tensor] = {}
    with torch.inference_mode():
        if recording.cfg_mode == "per_branch" and len(field.conditions) == 2:
            tensors["states"], tensors["velocities"], tensors["velocities_null"] = record_branches(field, noise, times)
        else:
            tensors["states"], tensors["velocities"] = record_trajectory(field, noise, times)
    dtype = torch.float16 if recording.storage == "float16" else torch.float32
    tensors = {name: tensor.to("cpu", dtype) for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ArithmeticError("The trajectories do not fit into float16. Record with --storage float32.")
    count = len(labels)
    rows = {"times": times.expand(count, -1), "labels": labels, "scales": torch.full((count,), drawn["scale"])}
    save_shard(path, tensors | rows, metadata)


def reference_error(
    recording: Recording, whole: Stretch, choice: BackboneChoice, backbone: Backbone, count: int = CHECKED_TRAJECTORIES
) -> dict[str, float]:
    """How far the reference solver's ends are from those on twice as many intervals, on the first `count` noises.

    Returns:
        `reference_error`: root-mean-square distance. `reference_relative_error`: the same over the error of ten calls
        of the multistep method from the same noises.
    """
    drawn = draw_batch(recording, whole, choice, backbone, 0)
    noise, labels = drawn["noise"][:count].to(backbone.device), drawn["labels"][:count]
    times = drawn["times"]
    field = backbone.field(labels, drawn["scale"], choice.guidance_interval)
    coarse_grid = LAST_TIME + (backbone.start - LAST_TIME) * time_grid(COMPARED_NFE, backbone.shift)

    def distance(x: Tensor, reference: Tensor) -> float:
        return (x - reference).square().mean().sqrt().item()

    with torch.inference_mode():
        fine, own = (record_trajectory(field, noise, grid)[0][:, -1].clone() for grid in (refined_times(times), times))
        error = distance(own, fine)
        relative = error / max(distance(run_baseline("adams_bashforth2", field, noise, coarse_grid), fine), 1e-12)
    say(
        f"The reference solver's own error is {error:.2g}, {100 * relative:.2g} % of that of ten calls of a multistep "
        f"method ({field.calls * len(noise)} calls to find out)."
    )
    if relative > COARSE:
        say(
            "Warning: that is coarse, and a SideNet learns the reference solver's error too. Record with more --points "
            f"than {recording.points}."
        )
    return {"reference_error": error, "reference_relative_error": relative}


def plan_text(recording: Recording, backbone: Backbone) -> str:
    """What a recording will cost."""
    velocities = 2 if recording.cfg_mode == "per_branch" and backbone.null is not None else 1
    size = shard_bytes(backbone.shape, recording.model_calls, velocities, 2 if recording.storage == "float16" else 4)
    prefixes = f", and the prefixes of {recording.prefixes} more" if recording.prefixes else ""
    return (
        f"Recording {recording.trajectories} trajectories of {recording.points} points of {backbone.name}{prefixes}: "
        f"{recording.model_calls:,} model calls (in batches of {recording.record_batch}), {size / 1e9:.3g} GB on disk."
    )


def check_out(out: Path) -> None:
    """Refuse a folder that holds other things than shards.

    Raises:
        UsageError: it does, or cannot be written.
    """
    prepare_folder(out)
    others = (path for path in out.iterdir() if path.suffix != ".safetensors" and not path.name.startswith("."))
    strange = sorted({path.name for path in others} - {PREFIXES})
    if strange:
        raise UsageError(
            f"--out {out} holds other things ({strange[0]}). Choose an empty folder, or that of an unfinished "
            "recording."
        )


def finished_shards(out: Path, metadata: dict[str, Any]) -> set[Path]:
    """The shards that an earlier call finished.

    Raises:
        CheckpointError: one is damaged, or of another recording.
    """
    shards = set(out.glob("*.safetensors"))
    for path in sorted(shards):
        differing = differences(open_shard(path)[1], metadata, ("trajectories",))
        if differing:
            raise CheckpointError(
                f"--out {out} holds another recording ({path.name}: {differing}). Choose another folder; nothing is "
                "overwritten."
            )
    return shards


def shard_path(recording: Recording, stretch: Stretch, index: int) -> Path:
    """Where a shard lies. Its name has the seed: shards of the same name hold the same noises."""
    return stretch.folder / f"trajectories-{recording.seed:04d}-{index:05d}.safetensors"


def record(
    choice: BackboneChoice, recording: Recording, out: Path, backbone: Backbone, checked: int = CHECKED_TRAJECTORIES
) -> None:
    """Record the missing shards of a recording. Several processes (`accelerate launch`) share them.

    Args:
        choice, recording: settings.
        out: folder.
        backbone: what `choice` names.
        checked: on so many trajectories the reference solver's own error is measured.
    """
    choice.check_guidance(backbone)
    recording.check_recording(backbone)
    metadata = {part: describe(choice, recording, part, backbone) for part in stretches(recording, out, backbone)}
    for stretch in metadata:
        check_out(stretch.folder)
    say(plan_text(recording, backbone))
    jobs = [(part, index) for part in metadata for index in range(-(-part.count // recording.record_batch))]
    finished = {path for part in metadata for path in finished_shards(part.folder, metadata[part])}
    rank, processes_count, wait_for_all = processes(backbone.device.type == "cpu")
    wait_for_all()  # none may write before all have seen the same shards
    missing = [job for job in jobs if shard_path(recording, *job) not in finished]
    if finished:
        say(f"{len(jobs) - len(missing)} of {len(jobs)} shards are already recorded; the others follow.")
    if not missing:
        return

    def record_missing() -> None:
        measured = reference_error(recording, next(iter(metadata)), choice, backbone, checked)
        mine = missing[rank::processes_count]
        seconds = time.perf_counter()
        for number, (stretch, index) in enumerate(progress(mine, "record")):
            drawn = draw_batch(recording, stretch, choice, backbone, index)
            own = metadata[stretch] | measured | {"shard": index}
            record_shard(shard_path(recording, stretch, index), drawn, recording, choice, backbone, own)
            if number == 0:
                seconds = time.perf_counter() - seconds
                left = seconds * (sum(part.points for part, _ in mine) / stretch.points - 1) / 60
                say(f"The first {len(drawn['labels'])} trajectories took {seconds:.3g} s; about {left:.2g} min to go.")

    backbone.within(record_missing)
    wait_for_all()


def run_record(settings: RecordSettings) -> None:
    """Do the work of `ba-solver record`."""
    prepare_folder(settings.out)
    record(settings, settings, settings.out, open_backbone(settings))
