"""The interface between the trainer and a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bas_core.checkpoint import WHOLE_PATH
from ...bas_core.guidance import NO_GUIDANCE, CFGMode, Field, Guidance, check_labels, just_inside, model_field
from ..settings import UsageError

# Samples that go through a model at once, where it is left open: activations grow with them, and a video has many.
IMAGES_AT_ONCE, VIDEOS_AT_ONCE = 4, 1

Velocity = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Combine = Callable[[Tensor, Tensor, float], Tensor]


# Does work that calls a model, where the model can be called, and returns its result.
Within = Callable[[Callable[[], Any]], Any]


def samples_at_once(asked: int, shape: Sequence[int]) -> int:
    """How many states of a shape [C, *spatial] go through a model at once: as asked for, or what suits if that is 0."""
    frames = shape[1] if len(shape) == 4 else 1
    return asked or (VIDEOS_AT_ONCE if frames > 1 else IMAGES_AT_ONCE)


def work_here(work: Callable[[], Any]) -> Any:
    """Does the work at once, for models that can be called anywhere."""
    return work()


@dataclass(frozen=True)
class Backbone:
    """A model that gives velocities.

    Attributes:
        name: for people.
        kind: of backbone: sit, diffusers, python.
        fingerprint: of the weights.
        shape: [C, *spatial] of a state.
        velocity: `(x [N, C, *spatial], t [N], conditions [N], scale) -> [N, C, *spatial]`, in the convention of
            `bas_core/flow.py`. `conditions` are indices; `scale` is the CFG scale, for models that take it as an
            input (see `embedded_guidance`).
        conditions: how many conditions (classes, prompts) there are to sample; index 0 … conditions - 1.
        null: index of the unconditional branch; None where there is none.
        num_classes: how many classes a SideNet can take; 0 where conditions are texts.
        embedded_guidance: the model takes the CFG scale as an input instead of being combined from two branches.
        parameters: how many numbers its weights are; 0 = not known.
        patch_size: side of its network's patches.
        shift: the time shift that the model is usually sampled with.
        start: the time that sampling starts from; below 1 for diffusion models, whose last noise level is finite.
        part: the part of the path that is recorded and fitted: where it starts and ends, over `start`.
        before: the model that samples the path up to the part, where it starts later than the path.
        combine: other guidance than CFG, `(conditional, unconditional, scale) -> velocity`; combined mode only.
        device, dtype: where states go, and what the network computes in.
        decode: states [B, C, *spatial] to images [B, 3, H, W] in [0, 1], or None.
        encode: images [B, 3, H, W] in [0, 1] to states, or None.
        pixels_per_latent: along a side.
        conditions_digest: of the conditions, where the settings do not name them.
        general_mean: whether the mean of what is recorded holds for conditions that are not; else no first step is
            analytic.
        within: does work that calls the model; some can be called only within another program's sampling.
        make_room: takes the model off the device until its next call, and returns the bytes that are free there, or
            None.
    """

    name: str
    kind: str
    fingerprint: str
    shape: tuple[int, ...]
    velocity: Velocity
    conditions: int = 1
    null: int | None = None
    num_classes: int = 0
    embedded_guidance: bool = False
    parameters: int = 0
    patch_size: int = 2
    shift: float = 1.0
    start: float = 1.0
    part: tuple[float, float] = WHOLE_PATH
    before: Backbone | None = None
    combine: Combine | None = None
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    decode: Callable[[Tensor], Tensor] | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    pixels_per_latent: int = 1
    conditions_digest: str = ""
    general_mean: bool = True
    within: Within = work_here
    make_room: Callable[[], int | None] = lambda: None

    def has_general_mean(self) -> bool:
        """See `general_mean`; to be asked where the model can be called."""
        return self.general_mean

    @property
    def first_time(self) -> float:
        """The time that the part starts at."""
        return self.start * self.part[0]

    @property
    def last_time(self) -> float:
        """The time that the part ends at."""
        return self.start * self.part[1]

    @property
    def identity(self) -> dict[str, str]:
        """The model's entry in a SideNet's file."""
        return {"name": self.name, "kind": self.kind, "fingerprint": self.fingerprint}

    def field(
        self,
        conditions: Tensor,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
        cfg_mode: CFGMode = "combined",
    ) -> Field:
        """The velocity field for conditions [B] at one CFG scale; `cfg_mode` as in `model_field`.

        Raises:
            ValueError: there is no such condition.
        """
        conditions = check_labels(conditions, max(self.conditions - 1, self.null or 0)).to(self.device)
        branched = scale != 1 and self.null is not None and not self.embedded_guidance
        null = torch.full_like(conditions, self.null or 0) if branched else None

        def model(x: Tensor, t: Tensor, which: Tensor) -> Tensor:
            return self.velocity(x, t, which, scale)

        guidance = Guidance(scale, interval) if branched else NO_GUIDANCE
        if self.combine is None or not branched:
            field = model_field(model, conditions, null, guidance, cfg_mode)
        else:
            field = self._combined(model_field(model, conditions, null, guidance), self.combine)
        if not self.num_classes:
            field.conditions = (None,) * len(field.conditions)
        field.scale = scale
        return field

    def field_in_main_memory(
        self,
        conditions: Tensor,
        scale: float,
        batch: int,
        interval: tuple[float, float] = (0.0, 1.0),
        cfg_mode: CFGMode = "combined",
    ) -> Field:
        """The same field for states [B, C, *spatial] in main memory, of which so many go through the model at once.

        The device holds the states and velocities of one such batch, however many samples and steps a work has.
        """
        batch = samples_at_once(batch, self.shape)
        rows = [slice(i, i + batch) for i in range(0, len(conditions), batch)]
        fields = [self.field(conditions[each], scale, interval, cfg_mode) for each in rows]

        def evaluate(x: Tensor, t: Tensor, branches: int) -> Tensor:
            found = x.new_empty(branches, *x.shape)
            for field, each in zip(fields, rows, strict=True):
                found[:, each] = field.evaluate(x[each].to(self.device), t[each].to(self.device), branches)
            return found

        columns = zip(*(field.conditions for field in fields), strict=True)
        joined = tuple(None if any(c is None for c in column) else torch.cat(column).cpu() for column in columns)
        return Field(evaluate, joined, fields[0].cfg, combined=fields[0].combined, scale=fields[0].scale)

    def _combined(self, branches: Field, combine: Combine) -> Field:
        """A field of two branches, guided by a rule of the model's own."""
        guidance = branches.guidance

        def evaluate(x: Tensor, t: Tensor, count: int) -> Tensor:
            if not guidance.active(just_inside(t[0])):
                return branches.evaluate(x, t, 1)
            conditional, unconditional = branches.evaluate(x, t, 2)
            return combine(conditional, unconditional, guidance.scale)[None]

        return Field(evaluate, branches.conditions[:1])

    def noise(self, gaussian: Tensor) -> Tensor:
        """The state that sampling starts from, of unit normal noise."""
        return gaussian * (1.0 if self.start == 1 else (self.start**2 + (1 - self.start) ** 2) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class BackboneChoice:
    """Which model, and how it is sampled.

    Attributes:
        backbone: the model as kind:where: sit:FILE, diffusers:FOLDER (a pipeline), or python:MODULE:FUNCTION.
        guidance: CFG scale, or lowest and highest of a range, which is then an input of the SideNet.
        guidance_interval: guidance applies where lo < t <= hi.
        prompts: text file with a prompt a line (diffusers).
        negative_prompt: the unconditional branch's prompt (diffusers).
        height: of images, in pixels (diffusers); 0 = the pipeline's default.
        width: of images, in pixels (diffusers); 0 = the pipeline's default.
        frames: of videos (diffusers); 0 = the pipeline's default.
        offload: hold the network in main memory and stream it through the GPU (diffusers).
        dtype: what the network computes in: float32, bfloat16, float16.
        device: cpu, cuda, cuda:1, mps …
    """

    backbone: str
    guidance: tuple[float, ...] = (1.0,)
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    prompts: Path | None = None
    negative_prompt: str = ""
    height: int = 0
    width: int = 0
    frames: int = 0
    offload: bool = False
    dtype: str = "float32"
    device: str = "cpu"

    def check_guidance(self, backbone: Backbone) -> None:
        """Refuse guidance that the model cannot have.

        Raises:
            UsageError: saying why.
        """
        low, high = self.scales
        if not 0 <= low <= high <= 100 or len(self.guidance) > 2:
            raise UsageError(
                f"--guidance must be one scale, or the lowest and highest of a range; got {self.guidance}."
            )
        if (low, high) != (1, 1) and backbone.null is None and not backbone.embedded_guidance:
            raise UsageError(
                f"{backbone.name} has no unconditional branch; leave --guidance at 1, got {self.guidance}."
            )

    @property
    def scales(self) -> tuple[float, float]:
        """Lowest and highest CFG scale."""
        return float(self.guidance[0]), float(self.guidance[-1])

    def torch_dtype(self) -> torch.dtype:
        """The dtype by name.

        Raises:
            UsageError: there is no such dtype.
        """
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if self.dtype not in known:
            raise UsageError(f"--dtype must be one of {', '.join(known)}; got {self.dtype!r}.")
        return known[self.dtype]

    def refuse_unused(self, kind: str, *names: str) -> None:
        """Refuse settings that a kind of backbone has no use for.

        Raises:
            UsageError: naming the first of them.
        """
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(BackboneChoice)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise UsageError(f"--{name.replace('_', '-')} means nothing to a {kind} backbone; leave it out.")


DIFFUSERS_ONLY = ("prompts", "negative_prompt", "height", "width", "frames", "offload")
