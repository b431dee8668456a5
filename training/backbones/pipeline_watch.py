"""The inputs that a `diffusers` pipeline gives its network, read off its first calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..settings import UsageError
from .base import BackboneChoice

INPUTS = ("hidden_states", "sample")
# Guidance while the pipeline is watched; any scale at which branches and their combination differ.
WATCHED_SCALE = 3.0


class Watched(Exception):
    """Raised inside the pipeline when it has been watched for long enough."""


@dataclass
class Watch:
    """What a pipeline did in its first steps.

    Attributes:
        calls: arguments of the network's calls, by name.
        steps: (model output, scheduler's timestep, state) of the scheduler's steps.
        shift_exponent: the scheduler's `mu`, where its time shift depends on the resolution.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    steps: list[tuple[Tensor, float, Tensor]] = field(default_factory=list)
    shift_exponent: float | None = None


@contextmanager
def watching(pipeline: Any, network: Any, calls: int, steps: int) -> Iterator[Watch]:
    """Watch the network's calls and the scheduler's steps, and leave the pipeline after so many of them."""
    watch = Watch()
    scheduler = pipeline.scheduler
    step, set_timesteps = scheduler.step, scheduler.set_timesteps
    signature = inspect.signature(network.forward)

    def on_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.calls.append(dict(signature.bind(*args, **kwargs).arguments))
        if len(watch.calls) == calls:
            raise Watched

    @functools.wraps(step)
    def on_step(output: Tensor, timestep: Any, state: Tensor, *args: Any, **kwargs: Any) -> Any:
        watch.steps.append((output.clone(), float(timestep), state.clone()))
        if len(watch.steps) == steps:
            raise Watched
        return step(output, timestep, state, *args, **kwargs)

    @functools.wraps(set_timesteps)
    def on_timesteps(*args: Any, **kwargs: Any) -> Any:
        watch.shift_exponent = kwargs.get("mu", watch.shift_exponent)
        return set_timesteps(*args, **kwargs)

    handle = network.register_forward_pre_hook(on_call, with_kwargs=True)
    scheduler.step, scheduler.set_timesteps = on_step, on_timesteps
    try:
        yield watch
    except Watched:
        pass
    finally:
        handle.remove()
        del scheduler.step, scheduler.set_timesteps


def input_name(call: dict[str, Any]) -> str:
    """What the network calls its state."""
    return next(name for name in INPUTS if name in call)


def rows_of(value: Any, rows: slice, total: int) -> Any:
    """Some rows of an argument, if it has one row a sample; else the argument."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == total else value
    if isinstance(value, dict):
        return {name: rows_of(part, rows, total) for name, part in value.items()}
    return value[rows] if isinstance(value, list) and len(value) == total else value


def join(values: Sequence[Any]) -> Any:
    """One-row arguments of several samples as one batch."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values)) if first.ndim and first.shape[0] == 1 else first
    if isinstance(first, dict):
        return {name: join([value[name] for value in values]) for name in first}
    return [item for value in values for item in value] if isinstance(first, list) and len(first) == 1 else first


def moved(value: Any, device: torch.device | str) -> Any:
    """An argument on a device."""
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, list):
        return [moved(part, device) for part in value]
    return value.to(device) if isinstance(value, Tensor) else value


def layout(value: Any) -> Any:
    """What must be alike for arguments to be joined."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return tuple((name, layout(part)) for name, part in sorted(value.items()))
    return None


def split_call(call: dict[str, Any]) -> list[dict[str, Any]]:
    """A call's samples as calls of their own, without state and time."""
    name = input_name(call)
    total = call[name].shape[0]
    others = {key: value for key, value in call.items() if key not in (name, "timestep")}
    return [{k: rows_of(v, slice(i, i + 1), total) for k, v in others.items()} for i in range(total)]


def network_of(pipeline: Any) -> Any:
    """The transformer or UNet."""
    return getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)


def takes_guidance(module: Any) -> bool:
    """Whether the CFG scale is an argument of the network."""
    return bool(getattr(module.config, "guidance_embeds", False))


def run_watched(pipeline: Any, module: Any, prompt: str, choice: BackboneChoice, calls: int, steps: int) -> Watch:
    """Run the pipeline on one prompt until the network was called, or the scheduler stepped, so many times."""
    signature = inspect.signature(pipeline.__call__).parameters
    sizes = {"height": choice.height, "width": choice.width, "num_frames": choice.frames}
    arguments: dict[str, Any] = {name: value for name, value in sizes.items() if value}
    unknown = [name for name in arguments if name not in signature]
    if unknown:
        raise UsageError(f"{type(pipeline).__name__} takes no {unknown[0]}; leave it out.")
    if choice.height and choice.width and "use_resolution_binning" in signature:
        arguments["use_resolution_binning"] = False  # the size that is asked for, not the next in a table
    if not takes_guidance(module):
        scale = "true_cfg_scale" if "true_cfg_scale" in signature else "guidance_scale"
        # Some pipelines guide only where there is a negative prompt, and an empty one counts as none.
        arguments |= {scale: WATCHED_SCALE, "negative_prompt": choice.negative_prompt or " "}
    else:
        arguments["guidance_scale"] = WATCHED_SCALE
    generator = torch.Generator().manual_seed(0)
    with watching(pipeline, module, calls, steps) as watch:
        pipeline(prompt=prompt, num_inference_steps=2, output_type="latent", generator=generator, **arguments)
    return watch


def calls_of_first_step(watch: Watch) -> list[dict[str, Any]]:
    """The network's calls before the scheduler's first step."""
    return watch.calls[: max(1, len(watch.calls) // len(watch.steps))]
