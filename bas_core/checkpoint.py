"""SideNets and SiTs in files: our safetensors, and the public `.pt` files."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .files import (
    CheckpointError,
    belongs_to,
    check_format,
    check_tensors,
    count_blocks,
    parse_config,
    parse_json,
    parse_object,
    read_pickled_tensors,
    read_safetensors,
    state_dict_of,
    write_safetensors,
)
from .grids import starts_short
from .guidance import Mode
from .runs import FittedRun, Inversion
from .sidenet import SideNet, SideNetConfig
from .sit import SiT, SiTConfig, sit_config_from_state_dict

SIDENET_FORMAT, SIDENET_VERSION = "ba-solver-sidenet", 3
SIT_FORMAT, SIT_VERSION = "ba-solver-sit", 1
OWN_TENSOR = "emb_fusion.0.weight"  # which only SideNets have
# Runs that were fitted at a CFG scale are as good as any from this to that multiple of it (docs/training.md).
SERVED = (0.5, 1.5)
# What sizes and numbers that no network can have end in.
IMPOSSIBLE = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError)


# --- SiT --------------------------------------------------------------------------------------------------------


def save_sit(
    path: Path | str, state: Mapping[str, Tensor], config: SiTConfig, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a SiT with its configuration; `extra` values are stored as JSON strings."""
    metadata = {"format": SIT_FORMAT, "format_version": str(SIT_VERSION), "config": json.dumps(asdict(config))}
    write_safetensors(path, state, metadata | {k: json.dumps(v) for k, v in (extra or {}).items()})


def load_sit(
    path: Path | str,
    convention: str | None = None,
    num_heads: int | None = None,
    weights: Literal["ema", "model"] = "ema",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SiT:
    """Load a SiT: our safetensors, or a public SiT or REPA checkpoint (`.pt`, `.pth` or safetensors).

    Public files may hold `ema`, `model` or a bare state dict, with or without what `torch.compile` and wrappers for
    several GPUs put into names; REPA's `projectors.*` are ignored.

    Args:
        path: the file.
        convention, num_heads: what a public file does not say, see `sit_config_from_state_dict`.
        weights: which of them to take from a file that holds both. The official SideNets were trained beside
            `model`.
        device, dtype: where and in what to hold the weights.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, unsafe, or no SiT.
    """
    path = Path(path)
    metadata: dict[str, str] = {}
    if path.suffix.lower() == ".safetensors":
        content, metadata = read_safetensors(path)
    else:
        content = read_pickled_tensors(path, lazy=True)
    state = state_dict_of(content, (weights, "ema", "model"), str(path))
    state = {name: value for name, value in state.items() if not name.startswith("projectors.")}
    try:
        if metadata.get("format") == SIT_FORMAT:
            check_format(metadata, SIT_FORMAT, SIT_VERSION, path)
            config = parse_config(SiTConfig, metadata, path)
        else:
            config = sit_config_from_state_dict(state, convention, num_heads)
        _check_depth(config.depth, state)
        with torch.device("meta"):
            expected = SiT(config).state_dict()
    except CheckpointError:
        raise
    except IMPOSSIBLE as error:
        raise CheckpointError(f"{path}: {error} {_hint(state, 'x_embedder.proj.weight')}".rstrip()) from error
    check_tensors(state, expected, path)
    model = SiT(config, device="meta")
    model.load_state_dict({k: v.to(device, dtype) for k, v in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _check_depth(depth: int, state: Mapping[str, Tensor]) -> None:
    """Before a network is made, which would take as long as its depth is large."""
    if depth != count_blocks(state):
        raise ValueError(f"it must have {depth} blocks; got {count_blocks(state)}")


def _hint(state: Mapping[str, Tensor], own: str) -> str:
    """What a file is that lacks the tensor `own`."""
    return "" if own in state else belongs_to(state)


# --- SideNet ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SideNetCard:
    """What a SideNet file says of itself beside its configuration.

    Attributes:
        velocity: "branch" (the SideNet predicts each branch of CFG) or "guided" (the guided velocity).
        guidance_range: lowest and highest CFG scale it was trained for.
        backbone: name, kind and fingerprint of the model it belongs to.
        runs: the fitted run that costs a number of backbone calls.
        more_runs: others for other CFG scales, by the scale; see `runs_at`.
        inversions: runs to the noise and back without guidance, by the calls of each way.
        training: objective, chains, calls, steps, seconds, seed, versions.
        evaluation: the error table.
        licence: of the weights.

    Raises:
        ValueError: a run or an inversion costs another number of calls than it is listed under, or a scale is none.
    """

    velocity: Mode = "branch"
    guidance_range: tuple[float, float] = (1.0, 1.0)
    backbone: dict[str, str] = field(default_factory=dict)
    runs: dict[int, FittedRun] = field(default_factory=dict)
    more_runs: dict[float, dict[int, FittedRun]] = field(default_factory=dict)
    inversions: dict[int, Inversion] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    licence: str = ""

    def __post_init__(self) -> None:
        for scale in self.more_runs:
            if not 0 < scale < math.inf:
                raise ValueError(f"Runs are for a CFG scale above 0; some are listed under {scale:g}.")
        ways = {calls: inversion.up for calls, inversion in self.inversions.items()}
        for runs in (self.runs, *self.more_runs.values(), ways):
            for calls, run in runs.items():
                if run.cost != calls:
                    raise ValueError(f"The run listed under {calls} calls costs {run.cost:g}.")

    @property
    def guidance(self) -> float:
        """The CFG scale that it is for, or the middle of their range."""
        return sum(self.guidance_range) / 2

    def serves(self, scale: float) -> bool:
        """Whether it has been trained for a CFG scale, or has runs that suit it."""
        low, high = self.guidance_range
        fitted = [*([self.guidance] if self.runs else []), *self.more_runs]
        return low - 1e-3 <= scale <= high + 1e-3 or any(_misfit(own, scale) <= 1 for own in fitted)

    def scales(self) -> str:
        """The CFG scales that it was made for in words, such as "2", "1 to 2" or "2 and 4"."""
        low, high = self.guidance_range
        own = f"{low:g}{'' if low == high else f' to {high:g}'}"
        return " and ".join([own, *(f"{scale:g}" for scale in sorted(self.more_runs))])

    def runs_at(self, scale: float) -> dict[int, FittedRun]:
        """The fitted runs for a CFG scale: those of the nearest, where nearer is rather a smaller one (`SERVED`)."""
        return min({self.guidance: self.runs, **self.more_runs}.items(), key=lambda pair: _misfit(pair[0], scale))[1]


def _misfit(own: float, scale: float) -> float:
    """How far a CFG scale is from one that runs were fitted for: 1 at the ends of what they serve."""
    ratio = math.log(max(scale, 1e-9) / max(own, 1e-9))
    return max(ratio / math.log(SERVED[1]), ratio / math.log(SERVED[0]))


def save_sidenet(path: Path | str, sidenet: SideNet, card: SideNetCard | None = None) -> None:
    """Write a SideNet in the project's format, atomically.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    config = sidenet.config
    metadata = {
        "format": SIDENET_FORMAT,
        "format_version": str(SIDENET_VERSION),
        "config": json.dumps(asdict(config)),
        "latent_channels": str(config.in_channels),
    }
    for name, value in asdict(card or SideNetCard()).items():
        metadata[name] = value if isinstance(value, str) else json.dumps(value)
    write_safetensors(path, sidenet.state_dict(), metadata)


def load_sidenet(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[SideNet, SideNetCard]:
    """Load a SideNet in the project's format.

    Args:
        path: a safetensors file that `save_sidenet` wrote.
        device: where to hold the weights.
        dtype: in what to hold them; None = as stored.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, no SideNet, of a newer version, or its tensors do not fit.
    """
    state, metadata = read_safetensors(path)
    stripped = "Its tensors are a SideNet's, so its metadata were removed, as merging tools do; get the original file."
    hint = stripped if OWN_TENSOR in state else belongs_to(state)
    check_format(metadata, SIDENET_FORMAT, SIDENET_VERSION, path, hint)
    try:
        config = parse_config(SideNetConfig, metadata, path)
        if metadata.get("latent_channels", str(config.in_channels)) != str(config.in_channels):
            raise ValueError("latent_channels and config name different channels")
        card = _read_card(metadata, config, path)
        _check_depth(config.num_layers, state)
        expected = SideNet(config, device="meta")
    except IMPOSSIBLE as error:
        raise CheckpointError(f"{path}: its metadata do not describe a SideNet: {error}") from error
    return _fill(expected, state, path, device, dtype), card


def _read_card(metadata: Mapping[str, str], config: SideNetConfig, path: Path | str) -> SideNetCard:
    values = {name: parse_object(metadata, name, path) for name in ("backbone", "training", "evaluation")}
    if not all(isinstance(value, str) for value in values["backbone"].values()):
        raise ValueError("backbone must hold texts alone")
    for name in ("recorded", "settings", "started_from"):
        if not isinstance(values["training"].get(name, {}), dict):
            raise ValueError(f"{name} in training must be an object")
    velocity: Any = metadata.get("velocity")
    if velocity not in ("branch", "guided"):
        raise CheckpointError(f"{path}: velocity must be 'branch' or 'guided'; got {velocity!r}.")
    low, high = parse_json(metadata, "guidance_range", path)
    more, inversions = (
        parse_object(metadata, name, path) if name in metadata else {} for name in ("more_runs", "inversions")
    )
    if {type(low), type(high)} - {int, float} or not 0 <= low <= high < math.inf:
        raise ValueError(f"guidance_range must be two scales, the lower first; got {low!r:.60} and {high!r:.60}")
    return SideNetCard(
        velocity=velocity,
        guidance_range=(float(low), float(high)),
        runs=_read_runs(metadata, config, path),
        more_runs={float(scale): _runs(each) for scale, each in more.items()},
        inversions={int(calls): Inversion(**_named_runs(ways)) for calls, ways in inversions.items()},
        licence=metadata.get("licence", ""),
        **values,
    )


def _read_runs(metadata: Mapping[str, str], config: SideNetConfig, path: Path | str) -> dict[int, FittedRun]:
    """The fitted runs of a file, by number of calls. Version 1 kept their parts apart, and left it to the reader to
    see whether a run saves its first call."""
    if "time_grids" not in metadata:
        return _runs(parse_object(metadata, "runs", path))
    grids = parse_json(metadata, "time_grids", path)
    weights, halves = (
        parse_json(metadata, name, path) if name in metadata else {} for name in ("step_weights", "half_calls")
    )
    strange = {*weights, *halves} - set(grids)
    if strange:
        raise CheckpointError(f"{path}: there are weights for {min(strange)} calls, but no time grid.")
    return {
        int(calls): FittedRun(
            times,
            weights.get(calls, ()),
            halves.get(calls, ()),
            skip_first=config.mean_size > 0 and starts_short(times),
        )
        for calls, times in grids.items()
    }


def _runs(found: Mapping[str, Any]) -> dict[int, FittedRun]:
    return {int(calls): run for calls, run in _named_runs(found).items()}


def _named_runs(found: Mapping[str, Any]) -> dict[str, FittedRun]:
    if not all(isinstance(parts.get("skip_first", False), bool) for parts in found.values()):
        raise ValueError("skip_first of a run must be true or false")
    return {name: FittedRun(**parts) for name, parts in found.items()}


def load_official_sidenet(path: Path | str) -> SideNet:
    """Read an official SideNet (`.pt` with `ema_side_model` or `side_model`, or a bare state dict; PAPER section 5).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, wants to run code, or is no official SideNet.
    """
    content = read_pickled_tensors(path, lazy=True)
    state = state_dict_of(content, ("ema_side_model", "side_model"), str(path))
    for name in ("input_conv.weight", "output_conv.weight", "y_embedder.embedding_table.weight"):
        if name not in state:
            hint = _hint(state, OWN_TENSOR)
            raise CheckpointError(f"{path} is no official SideNet: tensor {name!r} is missing. {hint}".rstrip())
    try:
        width, inputs = state["input_conv.weight"].shape[:2]
        classes, embedding = state["y_embedder.embedding_table.weight"].shape
        config = SideNetConfig(
            in_channels=inputs // 2,
            base_channels=width,
            embedding_dim=embedding,
            num_layers=count_blocks(state),
            num_classes=classes - 1,
        )
        expected = SideNet(config, device="meta")
    except IMPOSSIBLE as error:
        raise CheckpointError(f"{path} is no official SideNet: {error}") from error
    return _fill(expected, state, path, "cpu", None)


def _fill(
    sidenet: SideNet,
    state: dict[str, Tensor],
    path: Path | str,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> SideNet:
    check_tensors(state, sidenet.state_dict(), path)
    # Tools that cast a part of a file alone leave it in several types, with which no layer computes.
    stored = functools.reduce(torch.promote_types, {v.dtype for v in state.values()})
    sidenet.load_state_dict({k: v.to(device, dtype or stored) for k, v in state.items()}, assign=True)
    return sidenet.eval().requires_grad_(False)
