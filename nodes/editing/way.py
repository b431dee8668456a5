"""One side of an edit: what the MODEL is told, and how strongly."""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.samplers


class Way(NamedTuple):
    """The conditioning of one side.

    Attributes:
        model: the MODEL.
        positive: CONDITIONING.
        negative: CONDITIONING, or None where the scale is 1.
        scale: of CFG.
    """

    model: Any
    positive: Any
    negative: Any
    scale: float

    def guider(self) -> Any:
        """ComfyUI's guider for it.

        Raises:
            ValueError: guidance without a negative.
        """
        guider = comfy.samplers.CFGGuider(self.model)
        if self.scale == 1:
            guider.inner_set_conds({"positive": self.positive})
        elif self.negative is None:
            raise ValueError(
                f"A guidance of {self.scale:g} needs a negative conditioning, and none is connected. Connect "
                "'negative', or set the guidance to 1."
            )
        else:
            guider.set_conds(self.positive, self.negative)
        guider.set_cfg(self.scale)
        return guider
