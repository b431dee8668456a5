"""Settings: one frozen dataclass a command, read from a TOML file and overridden by flags."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..bas_core.files import CheckpointError, write_atomically
from .presets import preset_values
from .text_files import read_user_text

S = TypeVar("S")


class UsageError(ValueError):
    """A setting that cannot be used; the message says which and why."""


def read_settings(kind: type[S], arguments: Sequence[str], program: str, presets: Collection[str] = ()) -> S:
    """Settings from a preset, from `--config FILE` (TOML) and from flags; a flag wins over the file, and both over the
    preset.

    Args:
        kind: the command's dataclass.
        arguments: the command line after the command.
        program: for the help text.
        presets: the names that `--preset` takes; see `presets.preset_values`.

    Raises:
        UsageError: an unknown key, flag or preset (the message lists the valid ones), or a file that is no TOML.
        SystemExit: `--help`, or a value of the wrong type (the message names it).
    """
    import tyro

    flags = list(arguments)
    config = _take_config(flags)
    valid = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given = [flag.partition("=")[0].removeprefix("--") for flag in flags if flag.startswith("--")]
    allowed = valid | {"help", "config"} | {f"no_{name}" for name in valid}
    _check_known([name for name in given if name.replace("-", "_") not in allowed], valid, "option --", program)
    flags = [*(_toml_flags(config, valid, program) if config else []), *flags]
    if presets:
        flags = [*_preset_flags(flags, presets, str(getattr(kind, "nfe", ""))), *flags]
    return tyro.cli(kind, args=flags, prog=program)


def _preset_flags(flags: Sequence[str], presets: Collection[str], nfe: str) -> list[str]:
    """The settings of the preset that the flags name, as flags, for the numbers of calls that they name or `nfe`."""
    name, nfe = _value(flags, "--preset", ""), _value(flags, "--nfe", nfe)
    if name and name not in presets:
        raise UsageError(f"--preset must be one of {', '.join(presets)}; got {name!r}.")
    return _as_flags(preset_values(name, nfe)) if name else []


def _value(flags: Sequence[str], flag: str, value: str) -> str:
    """What a flag is given, the last time that it is there; or `value`."""
    for i, each in enumerate(flags):
        if each == flag:
            value = "".join(flags[i + 1 : i + 2])
        elif each.startswith(f"{flag}="):
            value = each.partition("=")[2]
    return value


def _take_config(flags: list[str]) -> Path | None:
    """Remove `--config FILE` from the flags and return the file."""
    for i, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name == "--config":
            if not equals and i + 1 == len(flags):
                raise UsageError("--config needs the name of a TOML file.")
            taken = flags[i : i + (1 if equals else 2)]
            del flags[i : i + len(taken)]
            return Path(value if equals else taken[1])
    return None


def _check_known(unknown: Sequence[str], valid: set[str], what: str, where: str) -> None:
    if unknown:
        raise UsageError(f"Unknown {what}{unknown[0]} in {where}. Valid ones: {', '.join(sorted(valid))}.")


def _toml_flags(path: Path, valid: set[str], program: str) -> list[str]:
    """The file as flags, so that types are checked in one place."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    if not path.is_file():
        raise UsageError(f"--config {path}: there is no such file.")
    try:
        content: dict[str, Any] = tomllib.loads(read_user_text(path))
    except (tomllib.TOMLDecodeError, CheckpointError) as error:
        raise UsageError(f"--config {path} is no TOML file: {error}") from error
    _check_known([key for key in content if key.replace("-", "_") not in valid], valid, "key ", f"{path} for {program}")
    for key, value in content.items():
        if isinstance(value, dict):
            raise UsageError(f"{path}: {key} must be a value or a list of values, not a table.")
    return _as_flags(content)


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for key, value in values.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return flags


def plain(settings: Any) -> dict[str, Any]:
    """Settings as values that JSON can hold, to be stored with the result."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    return values


def shareable(settings: Any) -> dict[str, Any]:
    """The same with files and folders by their last name alone: people pass SideNets on, and paths say who they are."""
    named = json.dumps(dataclasses.asdict(settings), default=lambda value: getattr(value, "name", str(value)))
    values: dict[str, Any] = json.loads(named)
    if "backbone" in values:
        kind, colon, where = values["backbone"].partition(":")
        values["backbone"] = kind + colon + Path(where).name
    return values


def differences(
    known: Mapping[str, Any],
    asked: Mapping[str, Any],
    may_differ: Collection[str] = (),
    words: tuple[str, str] = ("was", "now"),
) -> str:
    """The settings in which two differ, such as "seed was 1, now 9"; empty where none does.

    Args:
        known: settings of what exists.
        asked: settings of what is asked for; only these are compared.
        may_differ: settings that do not matter.
        words: before the known and the asked value.
    """
    wanted = json.loads(json.dumps(asked, default=str))
    return "; ".join(
        f"{name} {words[0]} {known.get(name)!r}, {words[1]} {value!r}"
        for name, value in wanted.items()
        if name not in may_differ and known.get(name) != value
    )


# --- values that several commands check -----------------------------------------------------------------------------


def parse_nfe(text: str, flag: str = "--nfe") -> list[int]:
    """'4,5,7' to numbers of calls.

    Raises:
        UsageError: not whole numbers from 1 to 1000.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= 1000 for part in parts):
        raise UsageError(f"{flag} must be whole numbers from 1 to 1000 separated by commas, such as 5,7; got {text!r}.")
    return sorted({int(part) for part in parts})


def check_device(name: str) -> torch.device:
    """A device that is there; of several processes (`accelerate launch`) each gets its own.

    Raises:
        UsageError: it is not.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used here ({reason}). Try --device cpu.") from error
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        local: torch.device = PartialState(cpu=device.type == "cpu").device
        return local
    return device


def check_positive(settings: Any, *names: str) -> None:
    """Refuse settings below 1.

    Raises:
        UsageError: naming the first of them.
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(settings, name)}.")


def prepare_folder(path: Path, flag: str = "--out") -> None:
    """Make the output folder and see that it can be written, before the work starts.

    Raises:
        UsageError: it cannot.
    """
    test = path / f".writable-{os.getpid()}"  # of its own, for other processes do the same
    try:
        write_atomically(test, lambda temporary: temporary.touch())
        test.unlink()
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written: {error}") from error
