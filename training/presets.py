"""How much work a SideNet is worth: the same three efforts for the command line and for ComfyUI's node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from .settings import UsageError

S = TypeVar("S")

# quick: no network. A few runs are enough for times and weights, of which there are a hundred; a few more to measure.
# full: the network too, from 256 runs and the starts of 320.
QUICK = "quick"
PRESETS: Mapping[str, Mapping[str, Any]] = {
    QUICK: {"steps": 0, "trajectories": 19, "validation": 3, "points": 22, "starts": 0, "record_batch": 8, "tune": 0},
    "full": {"starts": 320, "tune": 480},
}
# On so many trajectories a recording's exactness is measured: to learn that it is not far off costs a fifteenth of quick.
CHECKED = 1


def with_effort(settings: S, effort: str) -> S:
    """Settings with what an effort says, where they are still the defaults.

    Raises:
        UsageError: there is no such effort.
    """
    if effort not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}; got {effort!r}.")
    usual = {field.name: field.default for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    chosen = {name: value for name, value in PRESETS[effort].items() if getattr(settings, name) == usual[name]}
    return dataclasses.replace(settings, **chosen)  # type: ignore[type-var]
