"""Checks of a `diffusers` pipeline before anything is recorded."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ...bas_core.files import CheckpointError
from ...bas_core.flow import (
    per_sample,
)
from ..settings import UsageError
from .base import BackboneChoice, Combine
from .pipeline_network import Network, Packing, keep_norm, spatial_factor
from .pipeline_watch import WATCHED_SCALE, Watch, network_of

# How far our velocity may be from the pipeline's own, relative to its size, in float32 and in half precision.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def check_supported(pipeline: Any) -> None:
    """Refuse pipelines without one network and a scheduler that is understood.

    Raises:
        CheckpointError: saying why.
    """
    name = type(pipeline).__name__
    if network_of(pipeline) is None:
        raise CheckpointError(f"{name} has neither a transformer nor a unet. Write a python backbone for it.")
    if getattr(pipeline, "transformer_2", None) is not None or getattr(pipeline.config, "expand_timesteps", False):
        raise CheckpointError(
            f"{name} samples with two networks, or with a time for each token, which one SideNet cannot serve."
        )


def check_lengths(pipeline: Any, prompts: list[str]) -> None:
    """Refuse prompts that every text encoder would cut.

    Raises:
        UsageError: naming the first of them.
    """
    signature = inspect.signature(pipeline.__call__).parameters
    longest = signature["max_sequence_length"].default if "max_sequence_length" in signature else None
    # Lumina 2 writes words of its own before every prompt, which count.
    own = getattr(pipeline, "system_prompt", "") if "system_prompt" in signature else ""
    before = f"{own} <Prompt Start> " if own else ""
    limits: list[tuple[Any, int]] = []
    for name in TOKENIZERS:
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is not None:
            clip = "CLIP" in type(tokenizer).__name__
            limit = tokenizer.model_max_length if clip or longest is None else longest
            limits.append((tokenizer, limit - token_count(tokenizer, before) + token_count(tokenizer, "")))
    if not limits:
        return
    tokenizer, limit = max(limits, key=lambda item: item[1])
    for number, prompt in enumerate(prompts, 1):
        count = token_count(tokenizer, prompt)
        if count > limit:
            raise UsageError(
                f"Prompt {number} has {count} tokens; the text encoder takes {limit}, the rest would be cut. Shorten "
                f"it: {prompt[:60]!r} …"
            )


def token_count(tokenizer: Any, text: str) -> int:
    """Tokens of a text, with those that mark its beginning and end."""
    return len(tokenizer(text, truncation=False)["input_ids"])


def check_resolution(pipeline: Any, packing: Packing, choice: BackboneChoice) -> None:
    """Refuse sizes that the pipeline would round.

    Raises:
        UsageError: naming the nearest one that divides.
    """
    factor = spatial_factor(pipeline)
    for name, asked, latents in (("height", choice.height, packing.height), ("width", choice.width, packing.width)):
        if asked and asked != latents * factor:
            raise UsageError(
                f"--{name} {asked} does not divide: this pipeline makes it {latents * factor}. Give that, or another "
                f"multiple of {factor * (2 if packing.packed else 1)}."
            )


def check_against_pipeline(network: Network, watch: Watch, has_null: bool, null: int) -> Combine | None:
    """Compare our velocity with what the pipeline handed to its scheduler, and find out how it guides.

    Returns:
        None for plain CFG (or none at all), or the rule it guides by.

    Raises:
        CheckpointError: it is neither.
    """
    output, timestep, state = watch.steps[0]
    clock, packing = network.clock, network.packing
    t = torch.full((state.shape[0],), clock.flow_time(timestep), device=state.device)
    shown = packing.unpack(watch.calls[0][network.name][-1:].to(torch.float32))
    # What the network was shown is the state itself, or for diffusion models the variance-preserving one.
    x = shown if clock.prediction == "flow" else shown * torch.hypot(1 - per_sample(t, shown), per_sample(t, shown))
    theirs = clock.velocity(x, packing.unpack(output).to(x.dtype), t)
    ours = [network(x, t, torch.tensor([index]), WATCHED_SCALE) for index in ((0, null) if has_null else (0,))]
    rules: list[tuple[Combine | None, Tensor]] = [(None, ours[0])]
    if has_null:
        special = keep_norm(packing)
        rules = [
            (None, torch.lerp(ours[1], ours[0], WATCHED_SCALE)),
            (special, special(ours[0], ours[1], WATCHED_SCALE)),
        ]
    signs = (1.0, -1.0) if clock.prediction == "flow" else (1.0,)
    # The nearest of them: branches that are much alike leave several within the tolerance of half precision.
    found = [((sign * velocity - theirs).norm(), sign, rule) for sign in signs for rule, velocity in rules]
    error, network.sign, combine = min(found, key=lambda item: item[0].item())
    if error <= TOLERANCE[network.dtype] * theirs.norm():
        return combine
    percent = 100 * (error / theirs.norm()).item()
    raise CheckpointError(
        f"{type(network.module).__name__}: the velocity read off this pipeline is {percent:.2g} % away from what "
        "the pipeline itself made of it: it guides or conditions in a way that is not known. Write a python backbone."
    )
