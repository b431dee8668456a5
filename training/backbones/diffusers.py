"""Local `diffusers` pipelines: FLUX, SD3, Qwen-Image, Lumina2, Sana, Wan, and Stable Diffusion's UNets.

Families differ in their text encoders, in how latents are packed, in the network's times and in how branches are
guided. None of that is written down here. Instead the pipeline itself is run for one or two steps on each prompt, and
its network's inputs are used again at other states and times. The resulting velocity is compared with the pipeline's
own, so that a pipeline that does something else is refused instead of recorded wrongly.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...bas_core.files import CheckpointError, fingerprint
from ..progress import progress
from ..settings import UsageError
from ..text_files import read_user_text
from .autoencoder import autoencoder
from .base import Backbone, BackboneChoice
from .pipeline_checks import TEXT_ENCODERS, check_against_pipeline, check_lengths, check_resolution, check_supported
from .pipeline_network import Network, clock_of, packing_of, shift_of, spatial_factor
from .pipeline_watch import (
    calls_of_first_step,
    input_name,
    moved,
    network_of,
    run_watched,
    split_call,
    takes_guidance,
)


def open_backbone(where: str, choice: BackboneChoice, device: torch.device) -> Backbone:
    """A pipeline from a local folder, with a prompt for every trajectory in turn.

    Raises:
        UsageError: no folder, no prompts, prompts that are too long, or a resolution that does not divide.
        CheckpointError: the pipeline does something that cannot be recorded.
    """
    folder = Path(where)
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"--backbone diffusers:{where}: there is no pipeline folder (no model_index.json in it).")
    prompts = read_prompts(choice.prompts)
    dtype = choice.torch_dtype()
    # Weights as safetensors only: nothing in a pickle is run.
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    check_supported(pipeline)
    network_of(pipeline).requires_grad_(False)  # tuning takes gradients through it, not of it
    check_lengths(pipeline, prompts)
    if choice.offload:
        pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipeline.to(device)
    return _open(pipeline, folder, prompts, choice, device, dtype)


@torch.no_grad()
def _open(
    pipeline: Any, folder: Path, prompts: list[str], choice: BackboneChoice, device: torch.device, dtype: torch.dtype
) -> Backbone:
    module = network_of(pipeline)
    first = run_watched(pipeline, module, prompts[0], choice, calls=0, steps=2)
    # Encodings wait in main memory: those of a few hundred prompts take gigabytes.
    branches = [moved(sample, "cpu") for call in calls_of_first_step(first) for sample in split_call(call)]
    # A doubled batch is (unconditional, conditional); two calls are the conditional one first.
    doubled = len(branches) == 2 and first.calls[0][input_name(first.calls[0])].shape[0] == 2
    conditional, null = (branches[-1], branches[0]) if doubled else (branches[0], branches[-1])
    has_null = len(branches) == 2
    conditions = [conditional]
    for prompt in progress(prompts[1:], "encode prompts", leave=False):
        call = run_watched(pipeline, module, prompt, choice, calls=1, steps=0).calls[0]
        conditions.append(moved(split_call(call)[-1], "cpu"))
    state = first.steps[0][2]
    embedded = takes_guidance(module)
    network = Network(
        module=module,
        conditions=[*conditions, *([null] if has_null else [])],
        packing=packing_of(pipeline, state, choice),
        clock=clock_of(pipeline, first),
        embedded_guidance=embedded,
        name=input_name(first.calls[0]),
        dtype=dtype,
        device=device,
    )
    check_resolution(pipeline, network.packing, choice)
    combine = check_against_pipeline(network, first, has_null, len(prompts))
    for name in TEXT_ENCODERS:  # their work is done, and they may be larger than what is recorded
        if hasattr(pipeline, name):
            setattr(pipeline, name, None)
    x = network.packing.unpack(state)
    start = 1.0 if network.clock.table is None else float(network.clock.table[-1])
    decode, encode = autoencoder(pipeline, x.ndim)
    return Backbone(
        name=folder.resolve().name,
        kind="diffusers",
        fingerprint=network_fingerprint(module),
        shape=tuple(x.shape[1:]),
        velocity=network,
        conditions=len(prompts),
        null=len(prompts) if has_null else None,
        embedded_guidance=embedded,
        parameters=sum(p.numel() for p in module.parameters()),
        shift=shift_of(pipeline, first),
        start=start,
        combine=combine,
        device=device,
        dtype=dtype,
        decode=decode,
        encode=encode,
        pixels_per_latent=spatial_factor(pipeline),
        general_mean=len(prompts) > 1,
    )


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a prompts file.

    Raises:
        UsageError: no file is named, it is missing, no text, or empty.
    """
    if path is None:
        raise UsageError("A diffusers backbone needs --prompts, a text file with a prompt a line.")
    try:
        lines = read_user_text(path).split("\n")  # other line ends of Unicode may stand within a prompt
    except (OSError, CheckpointError) as error:
        raise UsageError(f"--prompts {path} cannot be read as text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts {path} holds no prompt. Write one a line.")
    return prompts


def network_fingerprint(module: Any) -> str:
    """A digest of the network's configuration and of some numbers of each of its tensors: reading all takes minutes."""
    some = {name: value.detach().flatten()[:64] for name, value in module.state_dict().items()}
    sizes = json.dumps({key: str(value) for key, value in sorted(module.config.items()) if not key.startswith("_")})
    return hashlib.sha256((fingerprint(some) + sizes).encode()).hexdigest()[:16]


__all__ = ["open_backbone"]
