"""ComfyUI's attention in our networks, so that what people choose there applies to them too."""

from __future__ import annotations

import math
from typing import Any

import comfy.ldm.modules.attention as comfy_attention
from torch import Tensor

from ...bas_core.sidenet import SideNet

# ComfyUI's functions that make the matrix of attention, or large parts of it. The others are fused.
UNFUSED = ("attention_basic", "attention_split", "attention_sub_quad")
# Scores and their softmax, in float32.
BYTES_A_PAIR = 8


class ComfyAttention:
    """A `sit.AttentionFunction` that is ComfyUI's of the moment: as chosen on its command line, or set by a node.

    Attributes:
        options: `transformer_options` of the sampling, in which nodes may replace the function for one MODEL.
    """

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = comfy_attention.optimized_attention(
            q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True, transformer_options=self.options
        )
        return found


def attention_bytes(sidenet: SideNet, shape: tuple[int, ...]) -> int:
    """Memory that ComfyUI's attention takes for one sample of [C, *spatial] beside its inputs and output."""
    if comfy_attention.optimized_attention.__name__ not in UNFUSED or sidenet.config.architecture == "local":
        return 0
    config = sidenet.config
    frames = shape[1] if len(shape) == 4 else 1
    positions = math.prod(math.ceil(side / config.patch_size) for side in shape[-2:])
    return frames * config.num_heads * positions**2 * BYTES_A_PAIR
