"""What a training asks of the processes it runs in: `accelerate` where there are several, and plain torch in one.

ComfyUI's users have no `accelerate`, and one process.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..progress import PROCESSES
from ..settings import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

# What accelerate calls them.
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class OneProcess:
    """The part of accelerate's `Accelerator` that a training uses, for one process.

    Args:
        device: of the model.
        precision: one of PRECISIONS.
    """

    num_processes = 1
    process_index = 0
    is_main_process = True

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.precision = device, precision
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
        self.optimizers: list[torch.optim.Optimizer] = []

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> OneStepper:
        """Wrap an optimizer, so that what it steps by is scaled back."""
        self.optimizers.append(optimizer)
        return OneStepper(optimizer, self)

    def autocast(self) -> AbstractContextManager[Any]:
        """Computes in the precision."""
        half = HALVES.get(self.precision)
        return torch.autocast(self.device.type, half, enabled=half is not None)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip_grad_norm_(self, parameters: Any, most: float) -> None:
        """Shorten the gradients where they are too long."""
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, most)

    def reduce(self, value: Tensor, how: str) -> Tensor:
        """What all processes have, as one."""
        return value


class OneStepper:
    """An optimizer that steps by gradients which may be scaled."""

    def __init__(self, optimizer: torch.optim.Optimizer, process: OneProcess) -> None:
        self.optimizer, self.process = optimizer, process

    def step(self) -> None:
        """One step; none where half precision has run over, as accelerate does it."""
        scaler = self.process.scaler
        if scaler is None:
            self.optimizer.step()
            return
        scaler.step(self.optimizer)
        if self.optimizer is self.process.optimizers[-1]:
            scaler.update()


def processes_for(model: nn.Module, precision: str, batch: int, accumulate: int) -> Accelerator | OneProcess:
    """Processes, precision and gradient scaling, where the model is.

    Raises:
        UsageError: the precision is unknown or the device cannot do it, or the batch does not divide.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"--precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
    device = next(model.parameters()).device
    on_cpu = device.type == "cpu"
    if on_cpu and precision == "fp16":
        raise UsageError("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU.")
    found: Accelerator | OneProcess
    if PROCESSES == 1:
        found = OneProcess(device, precision)
    else:
        from accelerate import Accelerator

        found = Accelerator(cpu=on_cpu, mixed_precision=PRECISIONS[precision])
    passes = found.num_processes * accumulate
    if accumulate < 1 or batch % passes:
        raise UsageError(
            f"--batch must be a multiple of processes times --accumulate, here {passes}, so that all do the same; "
            f"got {batch}."
        )
    return found
