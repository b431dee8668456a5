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
        "trajectories": 11,
        "validation": 3,
        "prefixes": 0,
        "jitter": False,
        "checked": 1,
    },
    FULL: {},
}
