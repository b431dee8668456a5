"""A SideNet made in the graph: recorded, fitted, measured and written, and gone on with where it was cut off."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...bas_core.checkpoint import SideNetCard, load_sidenet
from ...bas_core.files import write_text
from ...training.extra_cfg import add_extra_cfg, check_extra_cfg, nfe_for_cfg
from ...training.make import MakeSettings, planned_nfe
from ...training.presets import CHECKED
from ...training.progress import Listener, listening, say
from ...training.recording.record import record
from ...training.recording.shards import shard_bytes
from ...training.settings import UsageError, plain, prepare_folder, shareable
from ...training.train import train_from
from .backbone import ComfyBackbone, open_model

# What may be another when a making is gone on with: it does not change what was computed.
MAY_CHANGE = ("device", "extra_guidance", "patch_size")


@dataclass(frozen=True)
class Told:
    """Where the work reports to.

    Attributes:
        line: sees a line of text, the latest.
        done: sees how much of the whole is done, from 0 to 1.
        history: sees the numbers of all reports of a training so far.
    """

    line: Callable[[str], None]
    done: Callable[[float], None]
    history: Callable[[list[dict[str, float]]], None]


class Clock:
    """How much of the planned model calls are made, and how long the others will take.

    Args:
        planned: how many, one for one sample.
        told: where to say so.
    """

    def __init__(self, planned: int, told: Told) -> None:
        self.planned, self.told = planned, told
        self.made, self.seconds = 0, 0.0
        self.last = time.perf_counter()

    def listener(self) -> Listener:
        """As the trainer takes it."""
        return Listener(self.told.line, self.step, lambda what, history: self.told.history(history))

    def called(self, samples: int) -> None:
        """So many samples more went through the model."""
        now = time.perf_counter()
        # The first call loads the model, which takes long, and says nothing of the others.
        self.seconds += now - self.last if self.made else 0.0
        self.last = now
        self.made += samples
        self.told.done(min(1.0, self.made / self.planned))

    def step(self, what: str, done: int, total: int) -> None:
        """A stage of the trainer goes on."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        of = f" {done + 1} of {total}" if total > 1 else ""
        self.told.line(f"{what}{of}{self._left()}")

    def _left(self) -> str:
        left = max(0, self.planned - self.made)
        if not self.seconds or not left:
            return ""
        seconds = self.seconds / self.made * left
        amount = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
        return f"; {left:,} of {self.planned:,} model calls, about {amount} left"


def check_name(name: str) -> str:
    """A file's name that stays in its folder.

    Raises:
        ValueError: it does not.
    """
    plainly = name.strip().removesuffix(".safetensors")
    if not plainly or plainly != Path(plainly).name or plainly.startswith(".") or set(plainly) & set('\\:*?"<>|'):
        raise ValueError(f'name must be that of a file, without folders or the signs \\ / : * ? " < > |; got {name!r}.')
    return plainly


def finished(path: Path, settings: MakeSettings) -> SideNetCard | None:
    """What the file says of a SideNet that is made already; None where it is not.

    Raises:
        ValueError: there is one of this name, made with other settings.
    """
    if not path.exists():
        return None
    card = load_sidenet(path)[1]
    _refuse_other(path, card.training.get("settings", {}), shareable(settings))
    return card


def _refuse_other(path: Path, known: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [key for key in asked if key not in MAY_CHANGE and known.get(key) != asked[key]]
    if differing:
        said = "; ".join(f"{key.replace('_', ' ')} was {known.get(key)!r}, now {asked[key]!r}" for key in differing)
        raise ValueError(
            f"There is a SideNet of the name {path.stem!r} already, made with other settings ({said}). Give another "
            f"name, set these back, or delete {path} and the folders beside it."
        )


def remember(path: Path, settings: MakeSettings) -> None:
    """Keep the settings beside the unfinished SideNet.

    Raises:
        ValueError: it was begun with other settings.
    """
    notes = path.with_suffix(".making") / "settings.json"
    asked = plain(settings)
    if notes.exists():
        try:
            known = json.loads(notes.read_text(encoding="utf-8"))
        except ValueError:
            known = asked  # damaged: what was recorded says for itself what it is
        _refuse_other(path, known, asked)
    write_text(notes, json.dumps(asked, indent=1))


def make(
    model: Any,
    prompts: tuple[Sequence[Any], Any],
    latent: Tensor,
    settings: MakeSettings,
    told: Told,
    chains: Path | None = None,
) -> SideNetCard:
    """Make a SideNet for a MODEL, or go on with one.

    Args:
        model: it, with all that rides on it.
        prompts: the positives, CONDITIONINGs, and the negative or None.
        latent: [B, C, *spatial] in the model's channels; its size is taken.
        settings: `guidance` is the CFG scale; `out` the file.
        told: of the progress.
        chains: folder of the recordings; None = beside the file.

    Returns:
        What the file says.

    Raises:
        ValueError: something cannot be done; the message says what, and what to do.
    """
    settings = replace(settings, tune=0, accumulate=0)
    card = finished(settings.out, settings)
    missing = len(set(settings.extra_guidance) - set(card.schedules if card else ()))
    if card is not None and not missing:
        told.line("This SideNet is there already; nothing was to be done.")
        return card
    settings.check()
    check_extra_cfg(settings)
    prepare_folder(settings.out.parent, "The folder")
    clock = Clock(planned_nfe(settings) if card is None else missing * nfe_for_cfg(settings), told)
    # Nodes run in inference mode, and what is made there cannot be trained on.
    with torch.inference_mode(False), torch.enable_grad(), listening(clock.listener()):

        def opened(scale: float) -> ComfyBackbone:
            return open_model(model, *prompts, scale, latent, clock.called)

        backbone = opened(settings.guidance[0])
        settings.check_recording(backbone)
        remember(settings.out, settings)
        say(plan_text(settings, clock.planned, backbone))
        folder = chains or settings.out.with_suffix(".trajectories")
        if card is None:
            work(settings, backbone, folder)
        return add_extra_cfg(replace(settings, device=str(backbone.device)), folder, opened)


def plan_text(settings: MakeSettings, calls: int, backbone: ComfyBackbone) -> str:
    """What it will cost, before it starts."""
    size = shard_bytes(backbone.shape, settings.model_calls, 1, 2 if settings.storage == "float16" else 4)
    batch = shard_bytes(backbone.shape, settings.points, 1) * settings.record_batch
    return (
        f"Making {settings.out.stem!r} for {backbone.name}, preset {settings.preset}: {calls:,} model calls in batches "
        f"of {settings.record_batch}, {size / 1e6:.3g} MB on disk, and {batch / 1e6:.3g} MB of memory beside sampling."
    )


def work(settings: MakeSettings, backbone: ComfyBackbone, chains: Path) -> SideNetCard:
    """Record and train."""
    scale = float(backbone.within(backbone.told_scale))
    choice = replace(settings, guidance=(scale,), device=str(backbone.device))
    record(choice, choice, chains, backbone, CHECKED)
    return train_from(replace(choice, resume=True), choice, (chains,), settings.out, settings, backbone)


def in_words(error: Exception) -> str | None:
    """What to tell a user of an error, and what to do; None for one that nobody foresaw."""
    kept = "What was recorded stays: run again to go on."
    if isinstance(error, comfy.model_management.OOM_EXCEPTION):
        return f"There is not enough memory for so many samples at once. Lower 'batch'. {kept}"
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or "the folder for the recording"
        return f"{error.strerror}: {where}. Make room or choose another name. {kept}"
    if isinstance(error, UsageError | ValueError | ArithmeticError):
        return f"{str(error).replace('--', '')} {kept if isinstance(error, ArithmeticError) else ''}".strip()
    return None
