"""How much work a SideNet is worth: presets for `ba-solver make` and for ComfyUI's node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from .settings import UsageError

S = TypeVar("S")

# quick: no network, but schedules alone. These have about a hundred numbers, for which a few trajectories are enough.
# full: a network too, and schedules tuned by gradients.
QUICK, FULL = "quick", "full"
PRESETS: Mapping[str, Mapping[str, Any]] = {
    QUICK: {"steps": 0, "trajectories": 19, "validation": 3, "points": 22, "prefixes": 0, "record_batch": 8, "tune": 0},
    FULL: {"prefixes": 320, "tune": 480},
}
# On so many trajectories the reference solver's exactness is measured: more would be a large part of quick.
CHECKED = 1


def with_preset(settings: S, preset: str) -> S:
    """Settings with a preset's values, where they are still the defaults.

    Raises:
        UsageError: there is no such preset.
    """
    if preset not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}.")
    default = {field.name: field.default for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    chosen = {name: value for name, value in PRESETS[preset].items() if getattr(settings, name) == default[name]}
    return dataclasses.replace(settings, **chosen)  # type: ignore[type-var]
