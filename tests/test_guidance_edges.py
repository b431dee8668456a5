"""CFG at the ends of its interval: both modes to the same end and order, and edges as people write them."""

from itertools import pairwise

import pytest
import torch
from ba_solver.bas_core import Guidance, model_field, solve, time_grid
from problems import noise, smooth_grid

SCALE = 2.0
DOWN = torch.linspace(1, 0, 9, dtype=torch.float64)


def branch(x, t, conditions):
    """Two branches that differ everywhere, also at t = 0."""
    t = t.view(-1, 1, 1, 1).to(x)
    return -x * (0.5 + t) + (1 + conditions.view(-1, 1, 1, 1)) * (1.3 + torch.sin(3 * t))


def field(mode, guidance):
    conditions = torch.ones(2, dtype=torch.float64)
    return model_field(branch, conditions, -conditions, guidance, mode)


def end(mode, steps, guidance, times=None, **options):
    x = noise(2, 1, 2, 2)
    return solve(field(mode, guidance), None, x, smooth_grid(steps) if times is None else times, **options)


@pytest.mark.parametrize("options", [{}, {"rule": "lobatto2"}, {"method": "single_anchor"}], ids=str)
@pytest.mark.parametrize(
    "times", [torch.linspace(1, 0, 9).double(), torch.linspace(0, 1, 9).double()], ids=["down", "up"]
)
def test_both_modes_end_alike_where_cfg_is_on_everywhere(times, options):
    """A straight line in place of the SideNet is linear in the branches, so the modes differ by rounding alone."""
    ends = [end(mode, 8, Guidance(SCALE), times, **options) for mode in ("per_branch", "combined")]
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)
    unguided = end("per_branch", 8, Guidance(1.0), times, **options)
    assert (ends[0] - unguided).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["per_branch", "combined"])
@pytest.mark.parametrize("rule", ["lobatto2", "lobatto4"])
def test_guided_solutions_have_their_order_down_to_zero(mode, rule):
    """Second order for the straight line; it was first where CFG was dropped at t = 0."""
    exact = end(mode, 1280, Guidance(SCALE), rule=rule)
    errors = [(end(mode, steps, Guidance(SCALE), rule=rule) - exact).abs().max().item() for steps in (40, 80, 160)]
    orders = [torch.log2(torch.tensor(a / b)).item() for a, b in pairwise(errors)]
    assert min(orders) > 1.7, orders


@pytest.mark.parametrize("steps", range(2, 21))
def test_edges_on_the_grid_are_where_they_were_written(steps):
    """lo is outside and hi inside, whatever float32 makes of the times; t = 0 and 1 are inside the whole range."""
    grid = time_grid(steps)
    for i in range(1, steps):
        edge = round(1 - i / steps, 12)
        below, above = Guidance(SCALE, (0.0, edge)), Guidance(SCALE, (edge, 1.0))
        assert [below.active(t) for t in grid[:-1]] == [False] * i + [True] * (steps - i)
        assert [above.active(t) for t in grid[:-1]] == [True] * i + [False] * (steps - i)
    assert all(Guidance(SCALE).active(t) for t in grid)
    assert not Guidance(SCALE, (0.0, 0.7)).active(0.0), "a given interval is as published"


def test_an_interval_in_a_list_is_the_whole_range_too():
    assert field("combined", Guidance(SCALE, [0, 1])).can_omit_unconditional


def test_classes_that_a_model_has_not_are_refused_where_they_are_given():
    """On a GPU, a model call with one would end the program."""
    good, bad = torch.tensor([0, 10]), torch.tensor([11, 3, -1])
    assert model_field(branch, good, good, null_class=10)
    for given in ((bad, bad), (good, torch.tensor([11, -1, 3])), (bad, None)):
        with pytest.raises(ValueError, match=r"Classes must be from 0 to 10; got -1, 11\."):
            model_field(branch, *given, null_class=10)
