"""Files: written atomically, read without executing anything, refused in words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

C = TypeVar("C")


class CheckpointError(ValueError):
    """A file that is not what it should be; the message names the file, the fault and the remedy."""


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


def read_head(path: Path | str, count: int = 64) -> bytes:
    """The first bytes of a file, which shows that it is there and can be read.

    Raises:
        FileNotFoundError: there is no file; the message says what is there instead.
        PermissionError: it may not be read.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            what = "It is a folder." if path.is_dir() else "It is something else."
            raise FileNotFoundError(f"There is no file {path}. {what} Name the file.")
        with open(path, "rb") as file:
            return file.read(count)
    except PermissionError as error:
        raise PermissionError(
            f"{path} may not be read. Let the user that runs this read the file and its folder."
        ) from error
    except FileNotFoundError as error:
        if error.errno is None:
            raise
        link = f"It is a link to {os.readlink(path)}, which is not there. " if path.is_symlink() else ""
        raise FileNotFoundError(f"There is no file {path}. {link}Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        number = error.errno if isinstance(error, OSError) else errno.EINVAL
        if number not in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL):
            raise
        what = "It is a link that leads in a circle" if number == errno.ELOOP else str(error)
        raise FileNotFoundError(f"There is no file {path}. {what}. Check the path.") from error


# What else a file may be, and what to do with it.
FILE_HINTS = {
    "safetensors": "It is a safetensors file, which needs no conversion; its name must end in .safetensors.",
    "pytorch": "It is a PyTorch file. An official SideNet in one is read by the converter: ba-solver convert.",
    "lfs": "It is a pointer of Git LFS, not the file. Fetch that with: git lfs pull",
    "page": "It is a web page. Download the file itself.",
}


def sniff_file(head: bytes) -> str:
    """The key in FILE_HINTS of a file that begins with these bytes; empty where it is not known."""
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "pytorch"
    if head.startswith(b"version https://git-lfs"):
        return "lfs"
    return "page" if head.lstrip().startswith(b"<") else ""


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
    head = read_head(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as error:  # what a damaged header raises depends on where it is damaged
        other = {**FILE_HINTS, "safetensors": ""}.get(sniff_file(head))
        advice = other or "It may be truncated (copy or download it again) or of another kind."
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}). {advice}") from error


def read_pickled_tensors(path: Path | str, lazy: bool = False) -> dict[str, Any]:
    """The dictionary in a `.pt` file, read with `weights_only`: code in the pickle is refused, not run.

    REPA and SiT store their training arguments as an `argparse.Namespace`, which is mapped to a plain record.

    Args:
        path: the file.
        lazy: leave tensors on disk until they are used, where the file allows it. Such a file must not be written anew
            meanwhile.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, wants to run code, or holds no dictionary.
    """
    head = read_head(path)
    try:
        mapped = lazy and zipfile.is_zipfile(path) and _is_uncompressed(path)
        with torch.serialization.safe_globals([(SimpleNamespace, "argparse.Namespace")]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is refused: {_why_refused(error, head)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dictionary of tensors; got {type(content).__name__}.")
    return content


def _is_uncompressed(path: Path | str) -> bool:
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _why_refused(error: Exception, head: bytes) -> str:
    kind = sniff_file(head)
    if kind not in ("", "pytorch"):
        return FILE_HINTS[kind]
    refused = re.search(r"GLOBAL (\S+)", str(error))
    what = f"it refers to {refused[1]}" if refused else "it is damaged"
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        what += ", or larger than the memory that is left"
    return (
        f"{what}. Only tensors and plain values are read; anything else in a pickle can run code. Nothing of it was "
        "executed."
    )


# What compiling, wrapping for several GPUs and the like put into names.
WRAPPER_NAMES = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def state_dict_of(content: Mapping[str, Any], keys: tuple[str, ...], where: str) -> dict[str, Tensor]:
    """The first of `keys` that is there, or the content itself if it is a bare state dict; without names of wrappers.

    Raises:
        CheckpointError: it holds no tensors, or two of one name.
    """
    found: Any = next((content[key] for key in keys if isinstance(content.get(key), Mapping)), content)
    state: dict[str, Tensor] = {}
    for wrapped, value in found.items():
        name = ".".join(part for part in str(wrapped).split(".") if part not in WRAPPER_NAMES)
        if not isinstance(value, Tensor) or name == "n_averaged":  # an averaged model's count
            continue
        if name in state:
            raise CheckpointError(f"{where} holds two tensors {name!r}, one of them as {str(wrapped)!r}.")
        state[name] = value
    if not state:
        raise CheckpointError(f"{where} holds no tensors under {', '.join(keys)} nor at its top level.")
    return state


LORA = re.compile(r"lora_(up|down|A|B|unet|te)|\.lora\.|hada_w|lokr_w|\.alpha$")
# What is known by a tensor of its own, and where it belongs.
MODEL_HINTS = {
    "emb_fusion.0.weight": "It is a SideNet: put it into models/sidenets.",
    "x_embedder.proj.weight": "It is a SiT: put it into models/sit.",
    "model.diffusion_model.": "It is a whole checkpoint: put it into models/checkpoints.",
    "decoder.conv_in.": "It is a VAE: put it into models/vae.",
}


def sniff_model(names: Iterable[str]) -> str:
    """What a file of tensors with these names is, and what to do with it; empty where it is not known."""
    names = list(names)
    if any(LORA.search(name) for name in names):
        return "It is a LoRA: put it into models/loras."
    return next((what for start, what in MODEL_HINTS.items() if any(name.startswith(start) for name in names)), "")


def check_format(metadata: Mapping[str, str], expected: str, supported: int, path: Path | str, hint: str = "") -> None:
    """Refuse a file of another format or version.

    Args:
        metadata: of the file.
        expected, supported: format and version.
        path: of the file.
        hint: what it is instead, if it does not say so itself.
    """
    found = metadata.get("format")
    if found != expected:
        what = f"its format is {found!r}" if found else "it has no 'format' in its metadata"
        hint = hint if found in (None, "", "pt") else ""  # "pt" is what other programs write into any file
        raise CheckpointError(f"{path} is no {expected} file: {what}. {hint or 'Choose another file.'}")
    version = metadata.get("format_version", "")
    if version != str(supported):
        remedy = "Make the file anew" if version.isdecimal() and int(version) < supported else "Update ba-solver"
        raise CheckpointError(f"{path} has format version {version!r}; this code reads {supported}. {remedy}.")


def parse_json(metadata: Mapping[str, str], key: str, path: Path | str) -> Any:
    """One JSON value of the metadata."""
    try:
        value = json.loads(metadata[key])
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could not be shown
    except KeyError:
        raise CheckpointError(f"{path} lacks {key!r} in its metadata.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged {key!r} in its metadata: {error}.") from error
    return value


def parse_object(metadata: Mapping[str, str], key: str, path: Path | str) -> dict[str, Any]:
    """One JSON object of the metadata."""
    value = parse_json(metadata, key, path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key!r} in its metadata must be an object; got {type(value).__name__}.")
    return value


def parse_config(kind: type[C], metadata: Mapping[str, str], path: Path | str) -> C:
    """A dataclass in the metadata, whose values have the types of its defaults: half a layer, or 2.0 of them, would
    pass until the first call."""
    values = parse_object(metadata, "config", path)
    for name, value in values.items():
        wanted = type(getattr(kind, name, value))
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f"{name} must be {wanted.__name__}; got {value!r:.60}.")
    return kind(**values)


def count_blocks(state: Mapping[str, Tensor]) -> int:
    """How many `blocks` a state dict has.

    Raises:
        ValueError: they are not numbered from 0 on without a gap.
    """
    found = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    if found != {str(i) for i in range(len(found))}:
        raise ValueError(f"its blocks must be numbered from 0 on; got {', '.join(sorted(found)[:8])}")
    return len(found)


# A float8 weight means little without its scale, which other programs keep under names of their own.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path | str) -> None:
    """Refuse missing, unknown, misshapen and non-finite tensors, and those of strange types, each by name."""
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
        if tensor.dtype not in WEIGHT_DTYPES or tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
            raise CheckpointError(
                f"Tensor {name!r} of {path} is {tensor.dtype} ({tensor.layout}), and must be one of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in WEIGHT_DTYPES)}."
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"Tensor {name!r} of {path} holds values that are not finite.")


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A short digest of a model's weights, to tell which backbone a SideNet was trained for."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        digest.update(state[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
