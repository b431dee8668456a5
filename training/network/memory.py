"""The memory of a training step, and in how many passes it fits into the free memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Of the free memory, how much a step may take: gradients of activations come on top of what is kept for them.
SHARE = 0.4


def saved_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of a loss for its backward pass."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(seen.values())


def passes_within(batch: int, each: float, free: int) -> int:
    """The fewest passes of equal size that a batch can be trained in.

    Args:
        batch: samples a step.
        each: bytes for one.
        free: bytes on the device.
    """
    most = max(1, math.floor(SHARE * free / max(1.0, each)))
    return next(passes for passes in range(1, batch + 1) if batch % passes == 0 and batch // passes <= most)
