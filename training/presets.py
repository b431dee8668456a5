"""How much work a SideNet is worth: presets for `ba-solver make` and for ComfyUI's node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# quick: no network, but schedules alone. These have about a hundred numbers, for which a few trajectories are enough.
# full: a network too, from the settings' own defaults.
QUICK, FULL = "quick", "full"
PRESETS: Mapping[str, Mapping[str, Any]] = {
    QUICK: {
        "steps": 0,
        "trajectories": 19,
        "validation": 3,
        "points": 22,
        "prefixes": 0,
        "record_batch": 8,
        "tune": 0,
    },
    FULL: {},
}
# The reference solver's exactness is measured on so many trajectories: more would be a large part of the quick preset.
CHECKED = 1
