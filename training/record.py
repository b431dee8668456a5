"""`ba-solver record`: sampling chains of a backbone as safetensors shards, and how exact they are."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from ..bas_core.baselines import run_baseline
from ..bas_core.checkpoint import CheckpointError
from ..bas_core.grids import time_grid
from .backbones import Backbone, BackboneChoice, open_backbone
from .chains import (
    LAST_TIME,
    TEACHER,
    batch_generator,
    open_shard,
    random_times,
    record_branches,
    record_chain,
    refined_times,
    save_shard,
    shard_bytes,
)
from .progress import progress, say
from .settings import UsageError, check_positive, prepare_folder

# The teacher's own error, over that of ten calls of the multistep method, from which on it is warned about: a
# SideNet cannot become more exact than what it is taught.
COARSE = 0.1
CHECKED_CHAINS = 8
COMPARED_CALLS = 10
MODES = ("guided", "branch")
# What an unfinished recording may be gone on with although it differs.
MAY_GROW = ("chains",)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """How chains are recorded.

    Attributes:
        chains: how many sampling runs.
        points: points a chain, and as many backbone calls a chain.
        record_batch: chains recorded together, and in one shard.
        mode: guided (the SideNet predicts the guided velocity) or branch (each branch of CFG; the paper).
        storage: float32, or float16 for half the disk space.
        seed: of noise and times.
    """

    chains: int = 512
    points: int = 48
    record_batch: int = 32
    mode: str = "guided"
    storage: str = "float32"
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class RecordSettings(BackboneChoice, Recording):
    """Record sampling runs of a model: all that training needs of it.

    Attributes:
        out: folder for the shards; the same command goes on with an unfinished recording.
    """

    out: Path


def describe(settings: BackboneChoice, recording: Recording, backbone: Backbone) -> dict[str, Any]:
    """What the shards say of themselves: everything that must be alike for them to be trained on together."""
    prompts = settings.prompts.read_bytes() if settings.prompts else b""
    return {
        "backbone": backbone.identity,
        "shape": list(backbone.shape),
        "velocity": recording.mode,
        "guidance": list(settings.scales),
        "guidance_interval": list(settings.guidance_interval),
        "points": recording.points,
        "teacher": TEACHER,
        "shift": backbone.shift,
        "start": backbone.start,
        "null": backbone.null,
        "num_classes": backbone.num_classes,
        "conditions": backbone.conditions,
        "prompts": hashlib.sha256(prompts + settings.negative_prompt.encode()).hexdigest()[:16] if prompts else "",
        "storage": recording.storage,
        "record_batch": recording.record_batch,
        "chains": recording.chains,
        "seed": recording.seed,
    }


def check_recording(recording: Recording, backbone: Backbone) -> None:
    """Refuse what cannot be recorded.

    Raises:
        UsageError: saying which setting and why.
    """
    check_positive(recording, "chains", "record_batch")
    if recording.points < 8:
        raise UsageError(
            f"--points must be at least 8, so that chains are finer than what is trained; got {recording.points}."
        )
    for name, valid in (("mode", MODES), ("storage", ("float32", "float16"))):
        if getattr(recording, name) not in valid:
            raise UsageError(f"--{name} must be one of {', '.join(valid)}; got {getattr(recording, name)!r}.")
    if recording.mode == "branch" and (backbone.embedded_guidance or backbone.combine):
        raise UsageError(
            f"--mode branch needs plain CFG of two branches, which {backbone.name} does not use. Use guided."
        )


def draw_batch(recording: Recording, choice: BackboneChoice, backbone: Backbone, index: int) -> dict[str, Any]:
    """Times [N + 1], noise [m, C, *spatial], labels [m] and the CFG scale of one shard."""
    generator = batch_generator(recording.seed, index)
    first = index * recording.record_batch
    count = min(recording.record_batch, recording.chains - first)
    # The root of the model's own shift: fine where it is sampled finely, and still not coarse near the data.
    times = random_times(recording.points, generator, backbone.shift**0.5, backbone.start)
    low, high = choice.scales
    return {
        "times": times,
        "scale": low + (high - low) * torch.rand((), generator=generator).item(),
        "noise": backbone.noise(torch.randn((count, *backbone.shape), generator=generator)),
        "labels": (first + torch.arange(count)) % backbone.conditions,
    }


def record_shard(path: Path, drawn: dict[str, Any], recording: Recording, choice: BackboneChoice, backbone: Backbone,
                 about: dict[str, Any]) -> None:  # fmt: skip
    """Record one batch of chains and write it."""
    noise, times, labels = drawn["noise"].to(backbone.device), drawn["times"], drawn["labels"]
    field = backbone.field(labels, drawn["scale"], choice.guidance_interval, "branch")
    tensors: dict[str, Tensor] = {}
    with torch.inference_mode():
        if recording.mode == "branch" and len(field.conditions) == 2:
            tensors["states"], tensors["velocities"], tensors["velocities_null"] = record_branches(field, noise, times)
        else:
            field = backbone.field(labels, drawn["scale"], choice.guidance_interval, "guided")
            tensors["states"], tensors["velocities"] = record_chain(field, noise, times)
    kept = torch.float16 if recording.storage == "float16" else torch.float32
    tensors = {name: tensor.to("cpu", kept) for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ArithmeticError("The chains do not fit into float16. Record with --storage float32.")
    count = len(labels)
    rows = {"times": times.expand(count, -1), "labels": labels, "scales": torch.full((count,), drawn["scale"])}
    save_shard(path, tensors | rows, about)


def teacher_error(recording: Recording, choice: BackboneChoice, backbone: Backbone) -> dict[str, float]:
    """How far the teacher's ends are from those of one twice as fine, on the first noises.

    Returns:
        `error`: root-mean-square distance. `relative`: over the error of ten calls of the multistep method from the
        same noises, which is what a SideNet is to beat. `calls`: what the measurement cost, in calls a chain times
        chains.
    """
    drawn = draw_batch(recording, choice, backbone, 0)
    noise, labels = drawn["noise"][:CHECKED_CHAINS].to(backbone.device), drawn["labels"][:CHECKED_CHAINS]
    times = drawn["times"]
    field = backbone.field(labels, drawn["scale"], choice.guidance_interval, "guided")
    coarse_grid = LAST_TIME + (backbone.start - LAST_TIME) * time_grid(COMPARED_CALLS, backbone.shift)

    def distance(x: Tensor, reference: Tensor) -> float:
        return (x - reference).square().mean().sqrt().item()

    with torch.inference_mode():
        fine = run_baseline(TEACHER, field, noise, refined_times(times))
        error = distance(run_baseline(TEACHER, field, noise, times), fine)
        rival = distance(run_baseline("adams_bashforth2", field, noise, coarse_grid), fine)
    return {"error": error, "relative": error / max(rival, 1e-12), "calls": field.calls * len(noise)}


def plan_text(recording: Recording, backbone: Backbone) -> str:
    """What a recording will cost, before it starts."""
    velocities = 2 if recording.mode == "branch" and backbone.null is not None else 1
    size = shard_bytes(backbone.shape, recording.points, recording.chains, velocities,
                       2 if recording.storage == "float16" else 4)  # fmt: skip
    calls = recording.chains * recording.points
    return (
        f"Recording {recording.chains} chains of {recording.points} points of {backbone.name}: {calls:,} backbone "
        f"calls (in batches of {recording.record_batch}), {size / 1e9:.3g} GB on disk."
    )


def check_out(out: Path) -> None:
    """Refuse a folder that holds other things than shards.

    Raises:
        UsageError: it does, or cannot be written.
    """
    prepare_folder(out)
    strange = sorted(p.name for p in out.iterdir() if p.suffix != ".safetensors" and not p.name.startswith("."))
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
        differing = [key for key in about if key not in MAY_GROW and said.get(key) != about[key]]
        if differing:
            was = "; ".join(f"{key} was {said.get(key)!r}, now {about[key]!r}" for key in differing)
            raise CheckpointError(
                f"--out {out} holds another recording ({path.name}: {was}). Choose another folder; nothing is "
                "overwritten."
            )
    return {path.name for path in there}


def record(choice: BackboneChoice, recording: Recording, out: Path, backbone: Backbone) -> dict[str, Any]:
    """Record what is missing of a recording. Several processes (`accelerate launch`) share the shards.

    Returns:
        What its shards say of themselves.
    """
    choice.check_guidance(backbone)
    check_recording(recording, backbone)
    check_out(out)
    about = describe(choice, recording, backbone)
    say(plan_text(recording, backbone))
    there = shards_there(out, about)
    shards = range(-(-recording.chains // recording.record_batch))
    names = {index: out / f"chains-{recording.seed:04d}-{index:05d}.safetensors" for index in shards}
    missing = [index for index in shards if names[index].name not in there]
    if there:
        say(f"{len(shards) - len(missing)} of {len(shards)} shards are there already; going on.")
    if not missing:
        return about
    about |= report_teacher(teacher_error(recording, choice, backbone), recording)
    processes = PartialState(cpu=backbone.device.type == "cpu")
    mine = missing[processes.process_index :: processes.num_processes]
    for index in progress(mine, "record"):
        start = time.perf_counter()
        drawn = draw_batch(recording, choice, backbone, index)
        record_shard(names[index], drawn, recording, choice, backbone, about | {"shard": index})
        if index == mine[0]:
            seconds = time.perf_counter() - start
            left = seconds * (len(mine) - 1) / 60
            say(f"The first {len(drawn['labels'])} chains took {seconds:.3g} s; about {left:.2g} minutes to go.")
    processes.wait_for_everyone()
    return about


def report_teacher(measured: dict[str, float], recording: Recording) -> dict[str, float]:
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
    return {"teacher_error": measured["error"], "teacher_relative_error": measured["relative"]}


def run_record(settings: RecordSettings) -> dict[str, Any]:
    """Do the work of `ba-solver record`."""
    prepare_folder(settings.out)
    return record(settings, settings, settings.out, open_backbone(settings))
