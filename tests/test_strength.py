"""A SideNet's strength, at large and place by place; and grids stretched to other numbers of intervals."""

import pytest
import torch
from ba_solver.bas_core import Guidance, WeightedSideNet, resample_grid, solve, time_grid, with_strength
from checks import guided_field
from problems import FunctionSideNet, noise, small_sidenet, smooth_grid

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def run(sidenet, method="bi_anchor"):
    return solve(guided_field(2, Guidance(2.0, (0.0, 0.7))), sidenet, noise(2, 2, 4, 4), smooth_grid(4), method=method)


@pytest.mark.parametrize("anchors", [1, 2])
@pytest.mark.parametrize("method", ["bi_anchor", "single_anchor"])
def test_strength_leads_from_the_baseline_to_the_sidenet(anchors, method):
    sidenet = small_sidenet(anchors=anchors)
    ends = run(None, method), run(sidenet, method)
    assert (ends[0] - ends[1]).abs().max() > 1e-3
    assert with_strength(sidenet, 1.0) is sidenet
    for strength, end in ((0.0, ends[0]), (1e-9, ends[0]), (1 - 1e-9, ends[1])):
        torch.testing.assert_close(run(with_strength(sidenet, strength), method), end, rtol=1e-6, atol=1e-6)
    middle = run(with_strength(sidenet, 0.5), method)
    assert all((middle - end).abs().max() > 1e-4 for end in ends)


def test_weights_by_place_act_by_place():
    """One step of a SideNet that is the same everywhere: half the picture takes it, half the straight line."""

    def constant(*, h, x, **_):
        return h.reshape(-1, 1, 1, 1) * torch.ones_like(x)

    mask = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    seen = []

    def weight(times):
        seen.extend(times.tolist())
        return mask

    weighted = run(WeightedSideNet(FunctionSideNet(constant), weight))
    # At the weight 1 a constant change of velocity, at 0 none beyond the line: each as without any mask.
    torch.testing.assert_close(
        weighted[..., :2], run(WeightedSideNet(FunctionSideNet(constant), lambda t: 1.0))[..., :2], **TIGHT
    )
    torch.testing.assert_close(weighted[..., 2:], run(None)[..., 2:], **TIGHT)
    assert set(seen) <= {float(t) for t in smooth_grid(4)}, "weights are asked for at anchors"


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_bad_strength(strength):
    with pytest.raises(ValueError, match="must be a number from 0 on"):
        with_strength(small_sidenet(), strength)


def test_resampled_grids_keep_their_shape():
    grid = time_grid(6, 3.0)
    assert torch.equal(resample_grid(grid, 6), grid)
    for intervals in (1, 3, 7, 20):
        new = resample_grid(grid, intervals)
        assert len(new) == intervals + 1 and new[0] == 1 and new[-1] == 0 and (new.diff() < 0).all()
    torch.testing.assert_close(resample_grid(grid, 3), grid[::2])
    torch.testing.assert_close(resample_grid(grid, 12)[::2], grid)
    torch.testing.assert_close(resample_grid(time_grid(5), 8), time_grid(8))
    with pytest.raises(ValueError, match="intervals must be at least 1"):
        resample_grid(grid, 0)
    with pytest.raises(ValueError, match="strictly descend"):
        resample_grid(torch.tensor([1.0, 0.5, 0.5]), 3)
