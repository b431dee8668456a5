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
    check_format,
    check_tensors,
    count_blocks,
    parse_config,
    parse_json,
    parse_object,
    read_pickled_tensors,
    read_safetensors,
    sniff_model,
    state_dict_of,
    write_safetensors,
)
from .guidance import CFG_MODES, CFGMode
from .schedule import Schedule
from .sidenet import SideNet, SideNetConfig
from .sit import SiT, SiTConfig, sit_config_from_state_dict

SIDENET_FORMAT, SIDENET_VERSION = "ba-solver-sidenet", 4
SIT_FORMAT, SIT_VERSION = "ba-solver-sit", 1
OWN_TENSOR = "emb_fusion.0.weight"  # which only SideNets have
# Schedules that were fitted at a CFG scale serve from this to that multiple of it (docs/measurements.md).
CFG_RANGE = (0.5, 1.5)
# The part of the path that a SideNet is for: the whole.
WHOLE_PATH = (1.0, 0.0)
# What a configuration with impossible sizes raises.
CONFIG_ERRORS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError)


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
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{path}: {error} {_hint(state, 'x_embedder.proj.weight')}".rstrip()) from error
    check_tensors(state, expected, path)
    model = SiT(config, device="meta")
    model.load_state_dict({k: v.to(device, dtype, copy=True) for k, v in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _check_depth(depth: int, state: Mapping[str, Tensor]) -> None:
    """Before a network is made, which would take as long as its depth is large."""
    if depth != count_blocks(state):
        raise ValueError(f"it must have {depth} blocks; got {count_blocks(state)}")


def _hint(state: Mapping[str, Tensor], own: str) -> str:
    """What a file is that lacks the tensor `own`."""
    return "" if own in state else sniff_model(state)


# --- SideNet ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SideNetCard:
    """What a SideNet's file says beside the network's configuration.

    Attributes:
        cfg_mode: "per_branch" (the SideNet predicts each branch of CFG) or "combined" (the guided velocity).
        cfg_range: lowest and highest CFG scale of the training.
        backbone: name, kind and fingerprint of the model.
        schedules: by CFG scale, and by NFE; their times go from 1 to 0, whatever the part.
        part: the part of the path that they and the network are for: the flow times that it starts and ends at, over
            the one that the model's sampling starts from.
        training: objective, trajectories, NFE, steps, seconds, seed, versions.
        evaluation: the error table.
        license: of the weights.

    Raises:
        ValueError: a schedule takes another NFE than it is listed under, a CFG scale is not positive and finite, or
            the part is none.
    """

    cfg_mode: CFGMode = "per_branch"
    cfg_range: tuple[float, float] = (1.0, 1.0)
    backbone: dict[str, str] = field(default_factory=dict)
    schedules: dict[float, dict[int, Schedule]] = field(default_factory=dict)
    part: tuple[float, float] = WHOLE_PATH
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    license: str = ""

    def __post_init__(self) -> None:
        start, end = self.part
        if not 1 >= start > end >= 0:
            raise ValueError(f"A part of the path needs 1 >= start > end >= 0; got {start:g} and {end:g}.")
        for cfg, schedules in self.schedules.items():
            if not 0 < cfg < math.inf:
                raise ValueError(f"Schedules are for a CFG scale above 0; some are listed under {cfg:g}.")
            for nfe, schedule in schedules.items():
                if schedule.nfe != nfe:
                    raise ValueError(f"The schedule listed under {nfe} model calls takes {schedule.nfe:g}.")

    @property
    def cfg(self) -> float:
        """The CFG scale of the training, or the middle of its range."""
        return sum(self.cfg_range) / 2

    @property
    def own_schedules(self) -> dict[int, Schedule]:
        """The schedules for `cfg`, by NFE."""
        return self.schedules_for(self.cfg)

    @property
    def whole_path(self) -> bool:
        """Whether the SideNet is for the whole path."""
        return self.part == WHOLE_PATH

    def check_whole_path(self, name: str) -> None:
        """Refuse a SideNet, of the file `name`, for work that takes the whole path.

        Raises:
            CheckpointError: it is for a part of it.
        """
        if not self.whole_path:
            raise CheckpointError(
                f"The SideNet {name!r} was made for a part of the path, {self.describe_part()}. Use one for the whole."
            )

    def describe_part(self) -> str:
        """The part of the path in words."""
        return "the whole" if self.whole_path else "from flow time {:.3g} to {:.3g}".format(*self.part)

    def supports_cfg(self, cfg: float) -> bool:
        """Whether the SideNet was trained for a CFG scale, or has schedules that serve it."""
        low, high = self.cfg_range
        return low - 1e-3 <= cfg <= high + 1e-3 or any(_cfg_distance(own, cfg) <= 1 for own in self.schedules)

    def describe_cfg(self) -> str:
        """The CFG scales of training and schedules in words, such as "2", "1 to 2" or "2 and 4"."""
        low, high = self.cfg_range
        own = f"{low:g}{'' if low == high else f' to {high:g}'}"
        return " and ".join([own, *(f"{cfg:g}" for cfg in sorted(self.schedules) if cfg != self.cfg)])

    def schedules_for(self, cfg: float) -> dict[int, Schedule]:
        """The schedules of the nearest CFG scale by NFE; none where the file has none. See `CFG_RANGE`."""
        if not self.schedules:
            return {}
        return self.schedules[min(self.schedules, key=lambda own: _cfg_distance(own, cfg))]


def _cfg_distance(own: float, cfg: float) -> float:
    """How far a CFG scale is from a schedule's own: 1 at the ends of `CFG_RANGE`."""
    ratio = math.log(max(cfg, 1e-9) / max(own, 1e-9))
    return max(ratio / math.log(CFG_RANGE[1]), ratio / math.log(CFG_RANGE[0]))


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
    hint = stripped if OWN_TENSOR in state else sniff_model(state)
    check_format(metadata, SIDENET_FORMAT, SIDENET_VERSION, path, hint)
    try:
        config = parse_config(SideNetConfig, metadata, path)
        if metadata.get("latent_channels", str(config.in_channels)) != str(config.in_channels):
            raise ValueError("latent_channels and config name different channels")
        card = _read_card(metadata, path)
        _check_depth(config.num_layers, state)
        expected = SideNet(config, device="meta")
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{path}: its metadata do not describe a SideNet: {error}") from error
    return _fill(expected, state, path, device, dtype), card


def _read_card(metadata: Mapping[str, str], path: Path | str) -> SideNetCard:
    values = {name: parse_object(metadata, name, path) for name in ("backbone", "schedules", "training", "evaluation")}
    if not all(isinstance(value, str) for value in values["backbone"].values()):
        raise ValueError("backbone must hold texts alone")
    for name in ("recorded", "settings", "started_from"):
        if not isinstance(values["training"].get(name, {}), dict):
            raise ValueError(f"{name} in training must be an object")
    cfg_mode: Any = metadata.get("cfg_mode")
    if cfg_mode not in CFG_MODES:
        raise CheckpointError(f"{path}: cfg_mode must be one of {', '.join(CFG_MODES)}; got {cfg_mode!r}.")
    low, high = parse_json(metadata, "cfg_range", path)
    if {type(low), type(high)} - {int, float} or not 0 <= low <= high < math.inf:
        raise ValueError(f"cfg_range must be two scales, the lower first; got {low!r:.60} and {high!r:.60}")
    part = parse_json(metadata, "part", path) if "part" in metadata else WHOLE_PATH
    if len(part) != 2 or {type(time) for time in part} - {int, float}:
        raise ValueError(f"part must be two flow times; got {part!r:.60}")
    schedules = {
        float(cfg): {int(nfe): _read_schedule(parts) for nfe, parts in by_nfe.items()}
        for cfg, by_nfe in values.pop("schedules").items()
    }
    return SideNetCard(
        cfg_mode=cfg_mode,
        cfg_range=(float(low), float(high)),
        schedules=schedules,
        part=(float(part[0]), float(part[1])),
        license=metadata.get("license", ""),
        **values,
    )


def _read_schedule(parts: Mapping[str, Any]) -> Schedule:
    if not isinstance(parts.get("analytic_first_step", False), bool):
        raise ValueError("analytic_first_step of a schedule must be true or false")
    return Schedule(**parts)


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
    except CONFIG_ERRORS as error:
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
    # Copies: tensors as read are mapped to the file, and would change or fail with it.
    sidenet.load_state_dict({k: v.to(device, dtype or stored, copy=True) for k, v in state.items()}, assign=True)
    return sidenet.eval().requires_grad_(False)
