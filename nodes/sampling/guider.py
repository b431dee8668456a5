"""ComfyUI's CFG guider, told of one prompt or of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.samplers


def set_prompts(guider: Any, positives: Mapping[str, Any], negative: Any, cfg: float) -> None:
    """Give a CFG guider CONDITIONINGs by name, and the negative where it is used.

    Raises:
        ValueError: a CFG scale without a negative.
    """
    if cfg != 1 and negative is None:
        raise ValueError(f"A CFG of {cfg:g} needs a negative conditioning. Connect 'negative', or set cfg to 1.")
    guider.inner_set_conds(dict(positives) if cfg == 1 else {**positives, "negative": negative})
    guider.set_cfg(cfg)


def guider_for(model: Any, positive: Any, negative: Any, cfg: float) -> Any:
    """A guider for one prompt; raises as `set_prompts`."""
    guider = comfy.samplers.CFGGuider(model)
    set_prompts(guider, {"positive": positive}, negative, cfg)
    return guider
