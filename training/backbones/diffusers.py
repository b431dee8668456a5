"""Local `diffusers` pipelines: FLUX, SD3, Qwen-Image, Lumina2, Sana, Wan, and Stable Diffusion's UNets.

How a pipeline calls its network differs from family to family: what text encoders give, how latents are packed, which
times the network is told, how branches are guided. None of that is written down here. Instead the pipeline itself is
run for a moment on each prompt, and what it hands to its network is kept and used again at other states and times.
What comes out is then compared with what the pipeline made of it, so that a family that does something else is
refused instead of recorded wrongly.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from einops import rearrange
from torch import Tensor

from ...bas_core.checkpoint import CheckpointError, fingerprint
from ...bas_core.flow import (
    alpha_to_time,
    epsilon_prediction_to_velocity,
    flow_to_preserving,
    per_sample,
    v_prediction_to_velocity,
)
from ..progress import progress
from ..settings import UsageError
from .base import Backbone, BackboneChoice, Combine

INPUTS = ("hidden_states", "sample")
# Guidance while the pipeline is watched; any scale at which branches and their combination differ.
WATCHED_SCALE = 3.0
# How far our velocity may be from the pipeline's own, relative to its size, in float32 and in half precision.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Seen(Exception):
    """Raised inside the pipeline when enough of it has been watched."""


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
            raise Seen

    @functools.wraps(step)
    def on_step(output: Tensor, timestep: Any, state: Tensor, *args: Any, **kwargs: Any) -> Any:
        watch.steps.append((output.clone(), float(timestep), state.clone()))
        if len(watch.steps) == steps:
            raise Seen
        return step(output, timestep, state, *args, **kwargs)

    @functools.wraps(set_timesteps)
    def on_timesteps(*args: Any, **kwargs: Any) -> Any:
        watch.shift_exponent = kwargs.get("mu", watch.shift_exponent)
        return set_timesteps(*args, **kwargs)

    handle = network.register_forward_pre_hook(on_call, with_kwargs=True)
    scheduler.step, scheduler.set_timesteps = on_step, on_timesteps
    try:
        yield watch
    except Seen:
        pass
    finally:
        handle.remove()
        del scheduler.step, scheduler.set_timesteps


# --- a pipeline's conditions ------------------------------------------------------------------------------------------


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
    kept = {key: value for key, value in call.items() if key not in (name, "timestep")}
    return [{k: rows_of(v, slice(i, i + 1), total) for k, v in kept.items()} for i in range(total)]


# --- the network at any state and time --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """How states [B, C, *spatial] become what the network takes: 2 x 2 patches as tokens, or nothing at all."""

    height: int
    width: int
    packed: bool

    def pack(self, x: Tensor) -> Tensor:
        """States to the network's layout."""
        return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2) if self.packed else x

    def unpack(self, tokens: Tensor) -> Tensor:
        """Back."""
        if not self.packed:
            return tokens
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=self.height // 2, p=2, q=2)


@dataclass(frozen=True)
class Clock:
    """How flow times map to what the network is told, and its output to a velocity.

    Attributes:
        offset, slope: network time = offset + slope times the scheduler's timestep.
        prediction: flow, epsilon or v_prediction.
        table: flow times of the timesteps 0, 1, … of a diffusion model.
    """

    offset: float
    slope: float
    prediction: str
    table: np.ndarray | None = None
    train_timesteps: int = 1000

    def timestep(self, t: Tensor) -> Tensor:
        """The scheduler's timestep of flow times."""
        if self.table is None:
            return t.float() * self.train_timesteps
        steps = np.interp(t.double().cpu().numpy(), self.table, np.arange(len(self.table)))
        return torch.from_numpy(steps).to(t.device, torch.float32)

    def flow_time(self, timestep: float) -> float:
        """The flow time of a scheduler's timestep."""
        if self.table is None:
            return timestep / self.train_timesteps
        return float(np.interp(timestep, np.arange(len(self.table)), self.table))

    def state(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network is shown of a flow state."""
        return x if self.prediction == "flow" else flow_to_preserving(x, t)

    def velocity(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The flow velocity that its output means."""
        if self.prediction == "epsilon":
            return epsilon_prediction_to_velocity(x, output, t)
        return v_prediction_to_velocity(x, output, t) if self.prediction == "v_prediction" else output


@dataclass
class Network:
    """A pipeline's network as a velocity.

    Attributes:
        module: the transformer or UNet.
        conditions: the arguments of each prompt, then those of the unconditional branch.
        packing, clock: see there.
        sign: -1 where the pipeline turns the output round.
        embedded_guidance: the CFG scale is an argument.
        dtype: of the module.
        device: of states.
    """

    module: Any
    conditions: list[dict[str, Any]]
    packing: Packing
    clock: Clock
    embedded_guidance: bool
    name: str
    dtype: torch.dtype
    device: torch.device
    sign: float = 1.0

    def __call__(self, x: Tensor, t: Tensor, which: Tensor, scale: float) -> Tensor:
        """Velocities [N, C, *spatial]; prompts whose encodings differ in length are called one length at a time."""
        groups: dict[Any, list[int]] = {}
        for row, index in enumerate(which.tolist()):
            groups.setdefault(layout(self.conditions[index]), []).append(row)
        result = torch.empty_like(x)
        for rows in groups.values():
            result[rows] = self._call(x[rows], t[rows], [self.conditions[int(which[row])] for row in rows], scale)
        return result

    def _call(self, x: Tensor, t: Tensor, conditions: list[dict[str, Any]], scale: float) -> Tensor:
        arguments = {name: join([condition[name] for condition in conditions]) for name in conditions[0]}
        if self.embedded_guidance:
            arguments["guidance"] = torch.full((len(x),), scale, device=x.device, dtype=torch.float32)
        shown = self.packing.pack(self.clock.state(x, t)).to(self.dtype)
        time = self.clock.offset + self.clock.slope * self.clock.timestep(t)
        output = self.module(**{**arguments, self.name: shown, "timestep": time, "return_dict": False})[0]
        if output.shape[1] == 2 * shown.shape[1] and not self.packing.packed:
            output = output.chunk(2, dim=1)[0]  # the second half is a learned variance
        return self.clock.velocity(x, self.sign * self.packing.unpack(output).to(x.dtype), t)


def keep_norm(packing: Packing) -> Combine:
    """CFG whose result has the conditional branch's norm (over a token, or a line): Qwen-Image's and Lumina 2's way."""

    def combine(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        c, u = packing.pack(conditional), packing.pack(unconditional)
        both = torch.lerp(u, c, scale)
        return packing.unpack(both * (c.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True)))

    return combine


# --- opening ----------------------------------------------------------------------------------------------------------


def open_backbone(where: str, choice: BackboneChoice, device: torch.device) -> Backbone:
    """A pipeline from a local folder, with a prompt for every chain in turn.

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
    branches = [sample for call in calls_of_first_step(first) for sample in split_call(call)]
    # A doubled batch is (unconditional, conditional); two calls are the conditional one first.
    doubled = len(branches) == 2 and first.calls[0][input_name(first.calls[0])].shape[0] == 2
    conditional, null = (branches[-1], branches[0]) if doubled else (branches[0], branches[-1])
    has_null = len(branches) == 2
    conditions = [conditional]
    for prompt in progress(prompts[1:], "encode prompts", leave=False):
        call = run_watched(pipeline, module, prompt, choice, calls=1, steps=0).calls[0]
        conditions.append(split_call(call)[-1])
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
        shift=shift_of(pipeline, first),
        start=start,
        combine=combine,
        device=device,
        dtype=dtype,
        decode=decode,
        encode=encode,
        pixels_per_latent=spatial_factor(pipeline),
    )


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a prompts file.

    Raises:
        UsageError: no file is named, it is missing, no text, or empty.
    """
    if path is None:
        raise UsageError("A diffusers backbone needs --prompts, a text file with a prompt a line.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path} cannot be read as text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts {path} holds no prompt. Write one a line.")
    return prompts


def network_of(pipeline: Any) -> Any:
    """The transformer or UNet."""
    return getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)


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


def takes_guidance(module: Any) -> bool:
    """Whether the CFG scale is an argument of the network."""
    return bool(getattr(module.config, "guidance_embeds", False))


def spatial_factor(pipeline: Any) -> int:
    """Pixels a latent, along a side."""
    for name in ("vae_scale_factor", "vae_scale_factor_spatial"):
        if isinstance(getattr(pipeline, name, None), int):
            return int(getattr(pipeline, name))
    return 8


def packing_of(pipeline: Any, state: Tensor, choice: BackboneChoice) -> Packing:
    """How the pipeline's states are laid out."""
    if state.ndim != 3:
        return Packing(int(state.shape[-2]), int(state.shape[-1]), packed=False)
    factor, tokens = 2 * spatial_factor(pipeline), state.shape[1]
    height = choice.height // factor or (tokens // (choice.width // factor) if choice.width else math.isqrt(tokens))
    if height * (tokens // height) != tokens:
        raise UsageError(f"--height {choice.height} and --width {choice.width} do not give {tokens} tokens.")
    return Packing(2 * height, 2 * (tokens // height), packed=True)


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


def clock_of(pipeline: Any, watch: Watch) -> Clock:
    """The network's time as a line through what it was told at the scheduler's first two timesteps.

    Raises:
        CheckpointError: it is told something else, or the scheduler is of an unknown kind.
    """
    per_step = len(watch.calls) // len(watch.steps)
    told = [watch.calls[i * per_step]["timestep"] for i in range(2)]
    if any(isinstance(time, Tensor) and time.numel() > 2 for time in told):
        raise CheckpointError("The network is told a time for each token, which one SideNet cannot serve.")
    a, b = (float(torch.as_tensor(time).flatten()[0]) for time in told)
    s, r = watch.steps[0][1], watch.steps[1][1]
    slope = (a - b) / (s - r)
    config = pipeline.scheduler.config
    flow = "FlowMatch" in type(pipeline.scheduler).__name__ or config.get("use_flow_sigmas")
    prediction = "flow" if flow else config.get("prediction_type")
    table = None
    if prediction in ("epsilon", "v_prediction"):
        table = alpha_to_time(pipeline.scheduler.alphas_cumprod.double().cpu()).numpy()
    elif prediction != "flow":
        raise CheckpointError(
            f"{type(pipeline.scheduler).__name__} predicts {prediction!r}; flow, epsilon and v_prediction are known."
        )
    # Rounding in half precision must not tilt the line; the slopes there are: 1, 1/1000, -1/1000, and a model's own.
    exact = float(f"{slope:.2g}")
    slope = exact if math.isclose(slope, exact, rel_tol=1e-2) else slope
    offset = a - slope * s
    offset = round(offset) if abs(offset - round(offset)) < 5e-2 else offset
    return Clock(offset, slope, prediction, table, int(config.get("num_train_timesteps", 1000)))


def shift_of(pipeline: Any, watch: Watch) -> float:
    """The time shift that the scheduler samples with."""
    config = pipeline.scheduler.config
    if config.get("use_dynamic_shifting") and watch.shift_exponent is not None:
        exponential = config.get("time_shift_type", "exponential") == "exponential"
        return math.exp(watch.shift_exponent) if exponential else float(watch.shift_exponent)
    return float(config.get("flow_shift") or config.get("shift") or 1.0)


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


def network_fingerprint(module: Any) -> str:
    """A digest of the network's configuration and of some numbers of each of its tensors: reading all takes minutes."""
    some = {name: value.detach().flatten()[:64] for name, value in module.state_dict().items()}
    sizes = json.dumps({key: str(value) for key, value in sorted(module.config.items()) if not key.startswith("_")})
    return hashlib.sha256((fingerprint(some) + sizes).encode()).hexdigest()[:16]


Conversion = Callable[[Tensor], Tensor]


def autoencoder(pipeline: Any, dimensions: int) -> tuple[Conversion | None, Conversion | None]:
    """Decoder and encoder between states and images [B, 3, H, W] in [0, 1], where the autoencoder's scale is known.

    States have so many dimensions: 4, or 5 for videos, of which decoding shows the middle frame.
    """
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return None, None
    # Qwen-Image's states are images, and its autoencoder is one of videos.
    of_videos = any(parameter.ndim == 5 for parameter in vae.parameters())
    config = vae.config
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        if not config.get("scaling_factor"):
            return None, None
        mean, std = [float(config.get("shift_factor") or 0.0)], [1 / config["scaling_factor"]]

    def scaled(values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, *[1] * (like.ndim - 2))

    def decode(x: Tensor) -> Tensor:
        latents = (x * scaled(std, x) + scaled(mean, x)).to(vae.dtype)
        shown = latents.unsqueeze(2) if of_videos and latents.ndim == 4 else latents
        pixels = vae.decode(shown, return_dict=False)[0].float()
        frames = pixels[:, :, pixels.shape[2] // 2] if pixels.ndim == 5 else pixels
        return (frames.clamp(-1, 1) + 1) / 2

    def encode(images: Tensor) -> Tensor:
        pixels = (images.to(vae.device) * 2 - 1).to(vae.dtype)
        encoded = vae.encode(pixels.unsqueeze(2) if of_videos else pixels)
        latents = (encoded.latent if "latent" in encoded else encoded.latent_dist.mode()).float()
        latents = latents.squeeze(2) if latents.ndim > dimensions else latents
        return (latents - scaled(mean, latents)) / scaled(std, latents)

    return decode, encode


__all__ = ["open_backbone"]
