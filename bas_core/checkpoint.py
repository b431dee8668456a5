"""Read and write SideNets and SiTs as safetensors, and read the public `.pt` files, without executing anything."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .guidance import Mode
from .half_calls import HalfCalls
from .sidenet import SideNet, SideNetConfig
from .sit import SiT, SiTConfig, sit_config_from_state_dict
from .step_weights import StepWeights

SIDENET_FORMAT = "ba-solver-sidenet"
SIT_FORMAT = "ba-solver-sit"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A file that is not what it should be; the message names the file, the fault and the remedy."""


# --- files ------------------------------------------------------------------------------------------------------


def write_atomically(path: Path | str, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` beside `path` and rename the result, so that no reader ever sees half a file.

    Raises:
        OSError: the folder or file cannot be written (the message says which); nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # some writers keep their files to themselves, which a shared models folder must not
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise OSError(f"Cannot write {path}: {error}. Choose a folder that can be written and has room.") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_safetensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata strings, atomically."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(whole, temporary, dict(metadata)))


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (on the CPU) and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}). It may be truncated (copy or download it again) or of "
            "another kind (the official .pt files are read by the converter)."
        ) from error


def read_pickled_tensors(path: Path | str) -> dict[str, Any]:
    """The dictionary in a `.pt` file, read with `weights_only`: code in the pickle is refused, not run.

    REPA and SiT store their training arguments as an `argparse.Namespace`, which is mapped to a plain record.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, wants to run code, or holds no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Check the path.")
    try:
        with torch.serialization.safe_globals([(SimpleNamespace, "argparse.Namespace")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, OSError) as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it refers to {refused[1]}" if refused else "it is damaged"
        raise CheckpointError(
            f"{path} is refused: {what}. Only tensors and plain values are read; anything else in a pickle can run "
            "code. Nothing of it was executed."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dictionary of tensors; got {type(content).__name__}.")
    return content


def state_dict_of(content: Mapping[str, Any], keys: tuple[str, ...], where: str) -> dict[str, Tensor]:
    """The first of `keys` that is there, or the content itself if it is a bare state dict; `module.` stripped."""
    found: Any = next((content[key] for key in keys if isinstance(content.get(key), Mapping)), content)
    state = {str(name).removeprefix("module."): value for name, value in found.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{where} holds no tensors under {', '.join(keys)} nor at its top level.")
    return state


def check_format(metadata: Mapping[str, str], expected: str, path: Path | str) -> None:
    """Refuse a file of another format or of a version newer than this code."""
    found = metadata.get("format")
    if found != expected:
        what = f"its format is {found!r}" if found else "it has no 'format' in its metadata"
        raise CheckpointError(f"{path} is no {expected} file: {what}. Choose another file.")
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}; this code reads up to {FORMAT_VERSION}. Update ba-solver."
        )


def parse_json(metadata: Mapping[str, str], key: str, path: Path | str) -> Any:
    """One JSON value of the metadata."""
    try:
        return json.loads(metadata[key])
    except KeyError:
        raise CheckpointError(f"{path} lacks {key!r} in its metadata.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} has a damaged {key!r} in its metadata: {error}.") from error


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path | str) -> None:
    """Refuse missing, unknown, misshapen and non-finite tensors, each by name."""
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    if missing or unknown:
        faults = [f"{len(names)} {what} (first {names[0]!r})" for what, names in
                  (("missing", missing), ("unknown", unknown)) if names]  # fmt: skip
        raise CheckpointError(f"The tensors of {path} do not fit: {', '.join(faults)}.")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"Tensor {name!r} of {path} must be {tuple(expected[name].shape)}; got {tuple(tensor.shape)}."
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"Tensor {name!r} of {path} holds values that are not finite.")


# --- SiT --------------------------------------------------------------------------------------------------------


def save_sit(
    path: Path | str, state: Mapping[str, Tensor], config: SiTConfig, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a SiT with its configuration; `extra` values are stored as JSON strings."""
    metadata = {"format": SIT_FORMAT, "format_version": str(FORMAT_VERSION), "config": json.dumps(asdict(config))}
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

    Public files may hold `ema`, `model` or a bare state dict, with or without `module.` prefixes; REPA's
    `projectors.*` are ignored.

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
    if path.suffix == ".safetensors":
        content, metadata = read_safetensors(path)
    else:
        content = read_pickled_tensors(path)
    state = state_dict_of(content, (weights, "ema", "model"), str(path))
    state = {name: value for name, value in state.items() if not name.startswith("projectors.")}
    try:
        if metadata.get("format") == SIT_FORMAT:
            check_format(metadata, SIT_FORMAT, path)
            config = SiTConfig(**parse_json(metadata, "config", path))
        else:
            config = sit_config_from_state_dict(state, convention, num_heads)
        with torch.device("meta"):
            expected = SiT(config).state_dict()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_tensors(state, expected, path)
    model = SiT(config, device="meta")
    model.load_state_dict({k: v.to(device, dtype) for k, v in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A short digest of a model's weights, to tell which backbone a SideNet was trained for."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        digest.update(state[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- SideNet ----------------------------------------------------------------------------------------------------


Fit = TypeVar("Fit", StepWeights, HalfCalls)


@dataclass(frozen=True)
class SideNetCard:
    """What a SideNet file says of itself beside its configuration.

    Attributes:
        velocity: "branch" (the SideNet predicts each branch of CFG) or "guided" (the guided velocity).
        guidance_range: lowest and highest CFG scale it was trained for.
        backbone: name, kind and fingerprint of the model it belongs to.
        time_grids: the best grid found for a number of backbone calls, descending from 1 to 0.
        step_weights: rows of `StepWeights` that were fitted on these grids.
        half_calls: rows of `HalfCalls` that were fitted on these grids.
        training: objective, chains, calls, steps, seconds, seed, versions.
        evaluation: the error table.
        licence: of the weights.
    """

    velocity: Mode = "branch"
    guidance_range: tuple[float, float] = (1.0, 1.0)
    backbone: dict[str, str] = field(default_factory=dict)
    time_grids: dict[int, list[float]] = field(default_factory=dict)
    step_weights: dict[int, list[list[float]]] = field(default_factory=dict)
    half_calls: dict[int, list[list[float]]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    licence: str = ""

    def weights_for(self, times: Sequence[float] | Tensor) -> StepWeights | None:
        """The step weights that were fitted on the grid of a run; None where there are none."""
        return self._fitted(StepWeights, self.step_weights, times)

    def half_calls_for(self, times: Sequence[float] | Tensor) -> HalfCalls | None:
        """The half calls that were fitted on the grid of a run; None where there are none."""
        return self._fitted(HalfCalls, self.half_calls, times)

    def _fitted(
        self, kind: type[Fit], rows: Mapping[int, list[list[float]]], times: Sequence[float] | Tensor
    ) -> Fit | None:
        known = (kind(self.time_grids[calls], found) for calls, found in rows.items())
        return next((fit for fit in known if fit.suit(times)), None)


def save_sidenet(path: Path | str, sidenet: SideNet, card: SideNetCard | None = None) -> None:
    """Write a SideNet in the project's format, atomically.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    config = sidenet.config
    metadata = {
        "format": SIDENET_FORMAT,
        "format_version": str(FORMAT_VERSION),
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
    check_format(metadata, SIDENET_FORMAT, path)
    try:
        config = SideNetConfig(**parse_json(metadata, "config", path))
        card = _read_card(metadata, path)
        expected = SideNet(config, device="meta")
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its metadata do not describe a SideNet: {error}") from error
    if metadata.get("latent_channels", str(config.in_channels)) != str(config.in_channels):
        raise CheckpointError(f"{path} contradicts itself: latent_channels and config name different channels.")
    return _fill(expected, state, path, device, dtype), card


def _read_card(metadata: Mapping[str, str], path: Path | str) -> SideNetCard:
    names = ("guidance_range", "backbone", "time_grids", "training", "evaluation")
    values: dict[str, Any] = {name: parse_json(metadata, name, path) for name in names}
    velocity: Any = metadata.get("velocity")
    if velocity not in ("branch", "guided"):
        raise CheckpointError(f"{path}: velocity must be 'branch' or 'guided'; got {velocity!r}.")
    low, high = values.pop("guidance_range")
    grids = {int(calls): [float(t) for t in grid] for calls, grid in values.pop("time_grids").items()}
    fitted: dict[str, dict[int, list[list[float]]]] = {}
    for name, kind in (("step_weights", StepWeights), ("half_calls", HalfCalls)):
        known = parse_json(metadata, name, path) if name in metadata else {}  # older files have none
        fitted[name] = {int(n): [[float(w) for w in row] for row in rows] for n, rows in known.items()}
        for calls, rows in fitted[name].items():
            if calls not in grids:
                raise CheckpointError(
                    f"{path}: there are {name.replace('_', ' ')} for {calls} calls, but no time grid."
                )
            kind(grids[calls], rows)
    return SideNetCard(
        velocity=velocity,
        guidance_range=(float(low), float(high)),
        time_grids=grids,
        step_weights=fitted["step_weights"],
        half_calls=fitted["half_calls"],
        licence=metadata.get("licence", ""),
        **values,
    )


def load_official_sidenet(path: Path | str) -> SideNet:
    """Read an official SideNet (`.pt` with `ema_side_model` or `side_model`, or a bare state dict; PAPER section 5).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, wants to run code, or is no official SideNet.
    """
    state = state_dict_of(read_pickled_tensors(path), ("ema_side_model", "side_model"), str(path))
    for name in ("input_conv.weight", "output_conv.weight", "y_embedder.embedding_table.weight"):
        if name not in state:
            raise CheckpointError(f"{path} is no official SideNet: tensor {name!r} is missing.")
    try:
        width, inputs = state["input_conv.weight"].shape[:2]
        classes, embedding = state["y_embedder.embedding_table.weight"].shape
        blocks = [int(name.split(".")[1]) for name in state if name.startswith("blocks.")]
        config = SideNetConfig(
            in_channels=inputs // 2,
            base_channels=width,
            embedding_dim=embedding,
            num_layers=1 + max(blocks, default=-1),
            num_classes=classes - 1,
        )
    except ValueError as error:
        raise CheckpointError(f"{path} is no official SideNet: {error}") from error
    return _fill(SideNet(config, device="meta"), state, path, "cpu", None)


def _fill(
    sidenet: SideNet,
    state: dict[str, Tensor],
    path: Path | str,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> SideNet:
    check_tensors(state, sidenet.state_dict(), path)
    sidenet.load_state_dict({k: v.to(device, dtype or v.dtype) for k, v in state.items()}, assign=True)
    return sidenet.eval().requires_grad_(False)
