"""Schedules that ask the network: what it predicts is added in the measure that was fitted, and that pays."""

from collections import Counter
from dataclasses import replace
from statistics import geometric_mean

import pytest
import torch
from ba_solver.bas_core import Schedule, model_field, solve, time_grid
from ba_solver.bas_core.prediction import StraightLine
from ba_solver.training.baselines import run_baseline
from ba_solver.training.recording.replay import Replay
from ba_solver.training.schedules.judging import clearly_nearer
from ba_solver.training.schedules.linear_form import LinearForm, linear_form, schedule_of
from ba_solver.training.schedules.rollouts import roll_out, scattered
from ba_solver.training.schedules.search import (
    network_nfe,
    search_for,
    search_with_network,
    validated_schedules,
)
from ba_solver.training.schedules.surrogate import draw_coordinates
from problems import FunctionSideNet, noise, randomise, small_sidenet
from training_problems import GAUSSIAN_MEAN, SHAPE, swirl, swirl_backbone, trajectories_of, two_points_backbone

METADATA = {"guidance": [1.0, 1.0], "guidance_interval": [0.0, 1.0], "cfg_mode": "combined", "record_batch": 8}
LABELS = torch.tensor([0, 1, 0])
ALL = draw_coordinates(torch.ones(SHAPE))


def form(steps, network=None):
    """Of no known method: its weights are scattered."""
    known = linear_form("dpmpp_2m", time_grid(steps, 2.0, dtype=torch.float64))
    change = scattered(known, 1, 0.1, torch.Generator().manual_seed(steps))[0]
    return LinearForm(known.times, known.weights + change, network)


def sampled(sidenet, over):
    return solve(model_field(swirl, LABELS), sidenet, noise(3, *SHAPE, dtype=torch.float32), over)


@pytest.mark.parametrize("part", [(1.0, 0.0), (0.9, 0.2)])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_with_the_straight_line_it_ends_where_it_did(steps, part):
    asking = schedule_of(form(steps, torch.linspace(-0.5, 1.5, steps, dtype=torch.float64))).scaled(*part)
    torch.testing.assert_close(sampled(StraightLine(), asking), sampled(None, schedule_of(form(steps)).scaled(*part)))


def test_the_network_is_asked_where_its_answer_is_used():
    """In the steps that take a share of it; under plain times in every step, before and after the model call."""
    for over, times in (
        (schedule_of(form(5)), 0),
        (schedule_of(form(5, torch.tensor([0, 0.5, 0, 0, 1.0]))), 2),
        (Schedule(time_grid(5)), 9),
    ):
        asked = []

        def change(h, slope, asked=asked, **_):
            asked.append(h)
            return StraightLine()(h=h, slope=slope)

        sampled(FunctionSideNet(change, 2), over)
        assert len(asked) == times


@pytest.mark.parametrize("analytic", [False, True])
def test_rollouts_are_samplings_by_the_schedule(analytic):
    """With a random network, and with the data mean in the place of the first call."""
    sidenet = randomise(small_sidenet(dtype=torch.float32, in_channels=2, anchors=2, num_classes=2, data_mean_size=4))
    whole = form(4, torch.tensor([0.3, -0.2, 0.7, 1.1], dtype=torch.float64))
    x = noise(3, *SHAPE, dtype=torch.float32)
    field = model_field(swirl, LABELS)
    with torch.no_grad():
        mean = -sidenet.analytic_velocity(torch.zeros(1, *SHAPE), 1.0)[0] if analytic else None
        rolled = roll_out(field, x, whole, ALL, mean=mean, sidenet=sidenet)
        without = roll_out(field, x, replace(whole, network=None), ALL, mean=mean)
    assert rolled.predictions.abs().amax((1, 2)).min() > 1e-3 and not without.predictions.any()
    ends = solve(model_field(swirl, LABELS), sidenet, x, schedule_of(whole, analytic))
    torch.testing.assert_close(rolled.ends, ALL.of(ends), atol=1e-5, rtol=1e-4)
    assert (rolled.ends - without.ends).abs().max() > 1e-2


def replays(count=16, validation=6, backbone=None):
    backbone = backbone or swirl_backbone(None, None)
    labels = torch.arange(count + validation) % 2
    trajectories = trajectories_of(lambda x, t, y: backbone.velocity(x, t, y, 1.0), labels, 48)
    nfe = Counter()
    return [Replay(backbone, part, METADATA, nfe) for part in trajectories.split(validation)], nfe


def exact(x, v, t, h, cond, **_):
    """The change of velocity along the model's own path."""
    field = model_field(swirl, cond)
    start, end = float(t[0]), float(t[0] - h[0])
    ahead = run_baseline("rk4", field, x, torch.linspace(start, end, 9))
    return field.velocity(ahead, torch.tensor(end)) - v


def nonsense(x, v, **_):
    return torch.randn(v.shape, generator=torch.Generator().manual_seed(len(v)))


def test_a_good_network_is_asked_and_a_bad_one_does_no_harm(capsys):
    """What is taken of an exact one leaves less than half of the errors, on noises that nothing was fitted on."""
    (fit, validation), nfe = replays()
    search = search_for(fit, [3, 4], None, (2, 2), None)
    found = validated_schedules(search, validation, None)
    stages = {n: list(each) for n, each in search.stages.items()}
    before = nfe.total()
    asking = search_with_network(search, found, validation, FunctionSideNet(exact, 2), (1, 2))
    assert nfe.total() - before == network_nfe(16, 6, [3, 4], False, (1, 2))
    for n, each in asking.items():
        assert each.error < 0.5 * found[n].error, (n, each.error, found[n].error)
    search.stages = stages
    for n, each in search_with_network(search, found, validation, FunctionSideNet(nonsense, 2), (1,)).items():
        assert geometric_mean(each.errors) <= geometric_mean(found[n].errors) and each.error <= found[n].error
    assert "the network leaves" in capsys.readouterr().out


def test_an_analytic_first_step_needs_a_network_that_keeps_the_mean():
    """Without one it would be a model call more than the schedule is for."""
    (fit, validation), nfe = replays(backbone=two_points_backbone(None, None))
    search = search_for(fit, [2], GAUSSIAN_MEAN, (2,), None)
    found = validated_schedules(search, validation, GAUSSIAN_MEAN)
    assert search.stages[2][-1].analytic
    before = nfe["validation"]
    assert search_with_network(search, found, validation, FunctionSideNet(nonsense, 2), (1,)) == found
    assert nfe["validation"] == before


def test_another_schedule_is_nearer_by_more_than_a_standard_error():
    own = [0.1, 0.2, 0.4, 0.1]
    assert clearly_nearer([0.8 * each for each in own], own)
    assert not clearly_nearer(own, own)
    assert not clearly_nearer([0.02, 0.22, 0.44, 0.11], own)  # one noise says so, the others say the contrary
    assert not clearly_nearer([0.08], [0.1]) and clearly_nearer([0.05], [0.1])  # a single noise has to say it loudly
    assert not clearly_nearer([0.11], [0.1])
    assert not clearly_nearer([0.05, 0.05, 0.05, 2.0], [0.1, 0.1, 0.1, 0.1])  # one goes astray
