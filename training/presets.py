"""How much work a SideNet is worth: presets for `ba-solver make` and for ComfyUI's node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# quick: no network, but schedules alone. These have about a hundred numbers, for which a few trajectories are enough.
# full: more trajectories and rollouts, and a network, from the settings' own defaults.
QUICK, FULL = "quick", "full"
PRESETS: Mapping[str, Mapping[str, Any]] = {
    QUICK: {
        "steps": 0,
        "trajectories": 15,
        "validation": 3,
        "jitter": False,
        "checked": 1,
        "rounds": (4, 4),
    },
    FULL: {},
}
# quick for one number of model calls, where every call is dear (video): points that suit most models, unmeasured.
ONE_NUMBER: Mapping[str, Any] = {
    "trajectories": 6, "validation": 1, "pilot": 1, "points": 30, "checked": 0,
}  # fmt: skip


def preset_values(name: str, nfe: str) -> dict[str, Any]:
    """The settings of a preset for numbers of model calls such as "5,7,10"."""
    one = name == QUICK and nfe.strip().isdigit()
    return {**PRESETS[name], **(ONE_NUMBER if one else {})}
