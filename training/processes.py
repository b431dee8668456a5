"""Several processes (`accelerate launch`): who is who, and means over all of them.

ComfyUI's users have one process and no `accelerate`, so it is imported only where there are more.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

# torch's own variables.
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def processes(cpu: bool) -> tuple[int, int, Callable[[], None]]:
    """This process's number, how many there are, and a function that waits for all the others."""
    if PROCESSES == 1:
        return 0, 1, lambda: None
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    return state.process_index, state.num_processes, state.wait_for_everyone


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor that every process has, the same on all of them afterwards."""
    if PROCESSES == 1:
        return value
    from accelerate.utils import reduce

    mean: Tensor = reduce(value, "mean")
    return mean
