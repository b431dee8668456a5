"""A SideNet made in the graph: recorded, fitted, measured and written. Interrupted work is resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ...bas_core.checkpoint import SideNetCard, load_sidenet
from ...training.backbones.base import samples_at_once
from ...training.extra_cfg import add_extra_cfg, check_extra_cfg, nfe_for_cfg, recording_for
from ...training.make import MakeSettings, planned_nfe
from ...training.progress import Listener, listening, say
from ...training.recording.record import POINTS, START_POINTS, record
from ...training.recording.shards import shard_bytes
from ...training.settings import UsageError, differences, prepare_folder, shareable
from ...training.train import train_from
from ..models.parameterization import flow_interval, flow_time
from ..notify import warn
from ..sampling.rewind import refuse_cache
from ..sampling.start import Latent
from .comfy_backbone import ComfyBackbone, open_model

# Settings that may differ when a file of the same name is there: they do not change what was computed.
MAY_CHANGE = ("device", "extra_guidance", "patch_size")


@dataclass
class ProgressReporter:
    """Reports how much of the planned model calls is done, and how long the rest will take.

    Attributes:
        show_text: takes a line of text.
        show_share: takes the share of the work that is done, 0 to 1.
        show_history: takes the numbers of all reports of a training so far.
        planned: model calls, one for one sample.
    """

    show_text: Callable[[str], None]
    show_share: Callable[[float], None]
    show_history: Callable[[list[dict[str, float]]], None]
    planned: int = 1

    def __post_init__(self) -> None:
        self.made, self.seconds = 0, 0.0
        self.last = time.perf_counter()

    def listener(self) -> Listener:
        """For the trainer."""
        return Listener(self.show_text, self.on_step, lambda name, history: self.show_history(history))

    def on_samples(self, samples: int) -> None:
        """So many more samples went through the model."""
        now = time.perf_counter()
        # The first call loads the model, and is no measure of the others.
        self.seconds += now - self.last if self.made else 0.0
        self.last = now
        self.made += samples
        self.show_share(min(1.0, self.made / self.planned))

    def on_step(self, name: str, done: int, total: int) -> None:
        """The trainer begins a part of a stage."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        part = f" {done + 1} of {total}" if total > 1 else ""
        self.show_text(f"{name}{part}{self._remaining()}")

    def _remaining(self) -> str:
        remaining = max(0, self.planned - self.made)
        if not self.seconds or not remaining:
            return ""
        seconds = self.seconds / self.made * remaining
        amount = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
        return f"; {remaining:,} of {self.planned:,} model calls, about {amount} left"


def check_name(name: str) -> str:
    """A file name without extension, which stays in its folder.

    Raises:
        ValueError: it would not.
    """
    stem = name.strip().removesuffix(".safetensors")
    if not stem or stem != Path(stem).name or stem.startswith(".") or set(stem) & set('\\:*?"<>|'):
        raise ValueError(
            f'output_name must be the name of a file, without folders or the signs \\ / : * ? " < > |; got {name!r}.'
        )
    return stem


def existing_card(path: Path, settings: MakeSettings) -> SideNetCard | None:
    """The metadata of a SideNet that is made already; None where there is none.

    Raises:
        ValueError: there is one of this name, made with other settings.
    """
    if not path.exists():
        return None
    card = load_sidenet(path)[1]
    changes = differences(card.training.get("settings", {}), shareable(settings), MAY_CHANGE)
    if changes:
        raise ValueError(
            f"There is a SideNet of the name {path.stem!r} already, made with other settings ({changes}). Choose "
            f"another output_name, set these back, or delete {path} and the folders beside it."
        )
    return card


def check_made_for(card: SideNetCard, backbone: ComfyBackbone, path: Path) -> None:
    """Refuse a finished SideNet that was made for another model, other prompts, another size or part of the path.

    Raises:
        ValueError: saying which.
    """
    recorded, relation = card.training.get("recorded", {}), backbone.weights.relation(card.backbone)
    patches = card.backbone.get("patches", ""), backbone.weights.patches
    compared = {
        "another model": (relation == "other", False),
        "other LoRAs": patches,
        "another size": (recorded.get("shape"), list(backbone.shape)),
        "other prompts": (recorded.get("prompts"), backbone.conditions_digest),
        "another part of the path": (recorded.get("part"), list(backbone.part)),
        "another earlier_model": (recorded.get("before"), backbone.before and backbone.before.identity),
    }
    differing = [what for what, (was, now) in compared.items() if was != now]
    if differing:
        raise ValueError(
            f"There is a SideNet of the name {path.stem!r} already, made for {' and '.join(differing)}. Choose another "
            f"output_name, or delete {path} and the folders beside it."
        )
    if relation != "same":
        warn(
            f"whether the SideNet of the name {path.stem!r} was made for this very model cannot be told for certain: "
            f"the weights are stored in another way ({card.backbone.get('precision')}, now "
            f"{backbone.weights.precision})."
        )


def make(
    model: Any,
    prompts: tuple[Sequence[Any], Any],
    latent: Latent,
    settings: MakeSettings,
    reporter: ProgressReporter,
    cache: Path | None = None,
    percents: tuple[float, float] = (0.0, 1.0),
    earlier: Any = None,
) -> SideNetCard:
    """Make a SideNet for a MODEL, or go on with an unfinished one.

    Args:
        model: a MODEL.
        prompts: the positives, CONDITIONINGs, and the negative or None.
        latent: what a sampling starts from beside noise, in the model's channels; the first of its batch.
        settings: of the trainer; `guidance` is the CFG scale, `out` the file.
        reporter: of the progress.
        cache: folder of the recordings; None = beside the file.
        percents: the part of the path that the SideNet is for, in shares of the sampling.
        earlier: the MODEL that samples the path up to that part; None = the same.

    Returns:
        The file's metadata.

    Raises:
        ValueError: something cannot be done; the message says what, and what to do.
    """
    refuse_cache(model, "Make SideNet")
    settings = replace(settings, accumulate=0)
    batch = samples_at_once(settings.record_batch, latent.samples.shape[1:])
    card = existing_card(settings.out, settings)
    missing = len(set(settings.extra_guidance) - set(card.schedules if card else ()))
    part = part_between(model, *percents)

    def at_scale(scale: float) -> ComfyBackbone:
        def opened(which: Any, **more: Any) -> ComfyBackbone:
            return open_model(which, *prompts, scale, latent, reporter.on_samples, batch, **more)

        return over_part(part, opened, model, earlier)

    backbone = at_scale(settings.guidance[0])
    if card is not None:
        check_made_for(card, backbone, settings.out)
    if card is not None and not missing:
        reporter.show_text("This SideNet is there already; nothing was to be done.")
        return card
    settings.check()
    check_extra_cfg(settings)
    prepare_folder(settings.out.parent, "The folder")
    reporter.planned = planned_nfe(settings) if card is None else missing * nfe_for_cfg(settings)
    reporter.planned += 0 if backbone.before is None else start_calls(settings, card is None, missing)
    # Nodes run in inference mode, whose tensors cannot be trained on.
    with torch.inference_mode(False), torch.enable_grad(), listening(reporter.listener()):
        settings.check_recording(backbone)
        say(plan_text(settings, reporter.planned, backbone))
        folder = cache or settings.out.with_suffix(".trajectories")
        if card is None:
            record_and_train(settings, backbone, folder)
        return add_extra_cfg(replace(settings, device=str(backbone.device)), folder, at_scale)


def part_between(model: Any, start_percent: float, end_percent: float) -> tuple[float, float]:
    """The part of the path between two shares of a MODEL's sampling; see `Backbone.part`.

    Raises:
        ValueError: it is empty, or the MODEL is neither a flow nor a diffusion model.
    """
    if not 0 <= start_percent < end_percent <= 1:
        raise ValueError(
            f"start_percent must be below end_percent; got {start_percent:g} and {end_percent:g}. 0 and 1 are the "
            "whole path."
        )
    model_sampling = model.get_model_object("model_sampling")
    last, first = flow_interval(model_sampling, start_percent, end_percent)
    highest = flow_time(model_sampling, model_sampling.sigma_max)
    return min(1.0, first / highest), last / highest


def over_part(
    part: tuple[float, float], opened: Callable[..., ComfyBackbone], model: Any, earlier: Any
) -> ComfyBackbone:
    """A MODEL over a part of the path, and the one that samples up to there.

    Raises:
        ValueError: nothing is sampled up to there.
    """
    if part[0] < 1:
        before = opened(earlier or model, part=(1.0, part[0]))
        return opened(model, part=part, before=before)
    if earlier is not None:
        raise ValueError("earlier_model is for a start_percent above 0. Raise that, or disconnect earlier_model.")
    return opened(model, part=part)


def start_calls(settings: MakeSettings, new: bool, scales: int) -> int:
    """How many model calls the states take that a later part of the path starts at, for the SideNet and some scales."""
    return START_POINTS * ((settings.starts if new else 0) + scales * recording_for(settings).starts)


def plan_text(settings: MakeSettings, calls: int, backbone: ComfyBackbone) -> str:
    """The cost, before the work starts; the recording says what it needs on disk."""
    batch = samples_at_once(settings.record_batch, backbone.shape)
    memory = shard_bytes(backbone.shape, settings.points or POINTS[-1], 1) * batch
    return (
        f"Making {settings.out.stem!r} for {backbone.name}: {calls:,} model calls in batches of {batch}, and up to "
        f"{memory / 1e6:.3g} MB of main memory beside sampling."
    )


def record_and_train(settings: MakeSettings, backbone: ComfyBackbone, folder: Path) -> SideNetCard:
    """Record into a folder, and train on it."""
    guidance = float(backbone.within(backbone.sidenet_guidance))
    choice = replace(settings, guidance=(guidance,), device=str(backbone.device))
    record(choice, choice, folder, backbone)
    return train_from(replace(choice, resume=True), choice, (folder,), settings.out, settings, backbone)


def error_message(error: Exception) -> str | None:
    """What a user reads of an error, and what to do; None for an unforeseen one."""
    resume = "Recordings are kept: run again to go on."
    if isinstance(error, comfy.model_management.OOM_EXCEPTION):
        return f"There is not enough memory for so many samples at once. Lower batch_size. {resume}"
    if isinstance(error, OSError) and error.strerror:
        place = error.filename or "the folder for the recording"
        return f"{error.strerror}: {place}. Make room or choose another name. {resume}"
    if isinstance(error, UsageError | ValueError | ArithmeticError):
        return f"{str(error).replace('--', '')} {resume if isinstance(error, ArithmeticError) else ''}".strip()
    return None
