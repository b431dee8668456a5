"""`torch.compile` and calls whose batch changes from two branches to one and back."""

import pytest
import torch
from ba_solver.bas_core import Guidance, Schedule, model_field, solve, time_grid
from problems import NULL, noise, small_sidenet, small_sit
from torch._dynamo.testing import CompileCounter

SCHEDULE = Schedule(time_grid(7).tolist(), cfg_coefficients=[[], [], [], [], [0.1] * 8, [], [0.1] * 11])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mode", ["per_branch", "combined"])
def test_a_model_is_compiled_twice_and_not_at_every_call(mode, batch):
    """Once for both branches and once for one, in all samplings of a size."""
    torch._dynamo.reset()
    sit, counter = small_sit(dtype=torch.float32), CompileCounter()
    compiled = torch.compile(sit, backend=counter)
    labels = torch.zeros(batch, dtype=torch.long)
    counts = []
    for guidance, schedule in ((Guidance(2.0), SCHEDULE), (Guidance(2.0, (0.2, 0.7)), time_grid(7))) * 2:
        field = model_field(compiled, labels, labels + NULL, guidance, mode)
        sidenet = small_sidenet(in_channels=3, anchors=2, dtype=torch.float32)
        solve(field, sidenet, noise(batch, 3, 8, 8, dtype=torch.float32), schedule)
        counts.append(counter.frame_count)
    assert counts == [2, 2, 2, 2]
