"""Recording, training examples and the training loop, on fields whose truth is known."""

from dataclasses import replace

import pytest
import torch
from ba_solver.bas_core import RULES, model_field
from ba_solver.training.measuring.rivals import converged_reference
from ba_solver.training.network.loop import LoopSettings, Microbatch, train
from ba_solver.training.network.losses import squared_errors
from ba_solver.training.network.pairs import KINDS, QueryRange, draw_examples, draw_queries
from ba_solver.training.recording.reference_solver import (
    LAST_TIME,
    adapted_times,
    default_times,
    jittered,
    record_trajectory,
)
from ba_solver.training.recording.trajectories import Trajectories
from training_problems import SHAPE, swirl, trajectories_of

RULE = RULES["lobatto4"]


def record(count=24, points=40):
    return trajectories_of(swirl, torch.arange(count) % 2, points)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_trajectories_hold_the_field_along_its_path():
    """Each recorded velocity is the field at its recorded state, and the path follows it; one call a point."""
    field = model_field(swirl, torch.tensor([0, 1, 0]))
    times = jittered(default_times(160), generator())
    states, velocities = record_trajectory(field, torch.randn(3, *SHAPE, generator=generator()), times)
    assert field.calls == 160
    for i in (0, 57, 159):
        torch.testing.assert_close(velocities[:, i], swirl(states[:, i], times[i].expand(3), torch.tensor([0, 1, 0])))
    trapezoid = times.diff()[None, :, None, None, None] * (velocities[:, 1:] + velocities[:, :-1]) / 2
    torch.testing.assert_close(states[:, 1:] - states[:, :-1], trapezoid, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("shift", "start", "until"), [(1.0, 1.0, LAST_TIME), (3.0, 1.0, 0.87), (1.0, 0.93, LAST_TIME)])
def test_recorded_times_fall_between_their_ends_and_begin_finely(shift, start, until):
    """They fall, whatever the jitter; two recordings differ; a multistep solver finds short first steps."""
    for seed in range(20):
        times = jittered(default_times(24, shift, start, until), generator(seed))
        assert times[0] == torch.tensor(start) and times[-1] == torch.tensor(until) and (times.diff() < 0).all()
        assert times.diff()[0].abs() < 0.25 * times.diff().abs().max()
    usual = default_times(24)
    assert (jittered(usual, generator(1)) != jittered(usual, generator(2))).sum() == 22


@pytest.mark.parametrize("bend", [0.85, 0.1])
def test_adapted_times_lie_where_the_velocity_bends(bend):
    """At either end of the path; the ends stay, and with as many points the reference solver ends nearer."""

    def field(x, t, y):
        return -x * (1 + 8 * torch.exp(-(((t - bend) / 0.04) ** 2)))[:, None, None, None]

    labels = torch.zeros(4, dtype=torch.long)
    noise = torch.randn(4, *SHAPE, generator=generator(1))
    usual = default_times(40)
    _, velocities = record_trajectory(model_field(field, labels), noise, usual)
    found = adapted_times(24, usual, velocities)
    assert found[0] == 1 and found[-1] == usual[-1] and (found.diff() < 0).all() and len(found) == 24
    near = ((found - bend).abs() < 0.08).sum()
    assert near > 1.7 * ((default_times(24) - bend).abs() < 0.08).sum()
    truth = record_trajectory(model_field(field, labels), noise, default_times(1000))[0][:, -1]
    errors = [
        (record_trajectory(model_field(field, labels), noise, times)[0][:, -1] - truth).norm()
        for times in (found, default_times(24))
    ]
    assert errors[0] < 0.5 * errors[1], errors


def test_prefixes_end_early_and_trajectories_know_their_ends():
    """Prefixes end where they are asked to; whole trajectories end at their images."""
    labels = torch.zeros(3, dtype=torch.long)
    start = trajectories_of(swirl, labels, 12, until=0.7)
    assert (start.times[:, -1] == torch.tensor(0.7)).all() and (start.times.diff() < 0).all()
    whole = trajectories_of(swirl, labels, 200)
    expected = converged_reference(model_field(swirl, labels), whole.states[:, 0])
    missing = (whole.states[:, -1] - expected).norm()
    assert (whole.ends(torch.arange(3)) - expected).norm() < 0.05 * missing


@pytest.mark.parametrize("anchors", [1, 2])
def test_queries_are_those_of_the_sampler(anchors):
    """Targets lie where the kind says, toward the data in descending runs; every kind occurs."""
    wanted, kinds, skipped = draw_queries(RULE, anchors, 4000, QueryRange(ascending=0.0), generator())
    near, far, target = wanted.unbind(1)
    assert not skipped.any()
    of = {kind: kinds == i for i, kind in enumerate(KINDS)}
    assert all(rows.sum() > 50 for rows in of.values())
    ahead = ~of["between"]
    assert (target[ahead] < near[ahead]).all()
    assert (far[of["first"]] == near[of["first"]]).all() and (near[of["first"]] == 1).all()
    if anchors == 2:
        assert (far[of["beyond"]] > near[of["beyond"]]).all()
        low, high = torch.minimum(near, far), torch.maximum(near, far)
        inside = of["between"]
        assert ((low < target) & (target < high))[inside].all()
        # The nearer anchor answers.
        assert ((near - target).abs() <= (far - target).abs() + 1e-6)[inside].all()
    else:
        assert (far == near).all() and (target > near)[of["between"]].all()


def test_examples_are_read_off_the_trajectories_and_lines_are_exact_for_linear_velocities():
    """Where velocity is linear in time the straight line through two anchors leaves nothing; one anchor does."""
    times = torch.sort(torch.rand(6, 50, generator=generator()), dim=1, descending=True).values
    slope, start = torch.randn(2, 6, 1, *SHAPE, generator=generator(1))
    velocities = start + slope * times[:, :, None, None, None]
    trajectories = Trajectories(times, velocities.clone(), velocities, torch.arange(6))
    e = draw_examples(trajectories, RULE, 2, 500, QueryRange(), generator(2)).read()
    with_line = e.span != 0
    assert with_line.float().mean() > 0.5
    assert squared_errors(e.straight_line(), e)[with_line].max() < 1e-6
    assert squared_errors(e.v, e)[with_line].min() > 0
    # The target is the recorded velocity at t - h, the anchor's at t.
    rows = e.labels
    truth = start[rows, 0] + slope[rows, 0] * (e.t - e.h)[:, None, None, None]
    torch.testing.assert_close(e.target, truth, atol=1e-5, rtol=0)
    assert (e.h != 0).all() and (e.h != e.span).float().mean() > 0.95


def test_prefixes_answer_what_they_reach_and_trajectories_the_rest():
    """Queries that lie within the prefixes' stretch go to them; all others to the whole trajectories."""
    trajectories, prefixes = (
        record(count=12),
        trajectories_of(swirl, torch.full((8,), 1), 10, seed=9, until=0.8),
    )
    marked = replace(prefixes, labels=torch.full((8,), 7))
    e = draw_examples(trajectories, RULE, 2, 600, QueryRange(), generator(1), marked).read()
    from_prefix = e.labels == 7
    earliest = torch.stack([e.t, e.t - e.h, e.t - e.span]).amin(0)
    assert from_prefix.sum() > 30 and (earliest[from_prefix] >= 0.8 - 1e-6).all()
    assert (earliest[~from_prefix] < 0.8 + 0.02).all() and (from_prefix & (e.t < 1)).any()
    # Whatever the source, the target is the field at a recorded state that follows from the near anchor's.
    labels = torch.where(from_prefix, 1, e.labels)
    torch.testing.assert_close(e.v, swirl(e.x, e.t, labels))


def test_an_analytic_first_step_has_the_mean_in_its_anchor():
    """Only at t = 1, only in runs toward the data that begin with a short step, and as often as asked."""
    trajectories, mean = record(count=12), torch.randn(SHAPE, generator=generator(3))
    ranges = QueryRange(nfe=(8, 15), shift=(3.0, 4.0), analytic_first_step=0.5)
    wanted, _, skipped = draw_queries(RULE, 2, 2000, ranges, generator(1))
    at_noise = (wanted[:, 0] == 1) & (wanted[:, 2] < 1) & (wanted[:, 1] == 1)
    assert 0.3 < skipped[at_noise].float().mean() < 0.5
    e = draw_examples(trajectories, RULE, 2, 2000, ranges, generator(1), mean=mean).read()
    guessed = (e.v - (e.x - mean)).flatten(1).abs().amax(1) < 1e-6
    torch.testing.assert_close(e.v[~guessed], swirl(e.x, e.t, e.labels)[~guessed])
    assert (e.t[guessed] == 1).all() and guessed.any() and (skipped & (wanted[:, 0] == 1))[guessed].all()
    # As the second anchor, it changes the slope alone.
    second = skipped & (e.t - e.span == 1) & (e.span != 0)
    assert second.any()
    there = (e.v + e.slope * e.span[:, None, None, None])[second]
    nearest = (there[:, None] - (trajectories.states[:, 0] - mean)).flatten(2).abs().amax(2).amin(1)
    assert nearest.max() < 1e-4


def fit_toy(steps, path, stop_after=None):
    """Fit a linear map; optionally be interrupted after a number of steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    settings = LoopSettings(steps=steps, batch=8, learning_rate=0.1, warmup=1, save_every=1)

    def loss_at(step, share):
        if step == stop_after:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=settings.generator(step))
        return (model(x) - x[:, :2]).square().mean()

    return train(model, loss_at, settings, "toy", path)


def test_four_steps_equal_two_stop_resume_two(tmp_path):
    """To rounding: a skipped or doubled step moves the weights by about the learning rate, .1."""
    whole = fit_toy(4, None).state_dict()
    with pytest.raises(KeyboardInterrupt):
        fit_toy(4, tmp_path / "toy.pt", stop_after=2)
    resumed = fit_toy(4, tmp_path / "toy.pt").state_dict()
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_save(tmp_path):
    model = torch.nn.Linear(2, 1)
    settings = LoopSettings(steps=5, batch=1, learning_rate=0.1, save_every=1)
    path = tmp_path / "toy.pt"

    def loss_at(step, share):
        return model(torch.ones(1, 2)).sum() * (float("nan") if step == 3 else 1.0)

    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        train(model, loss_at, settings, "toy", path)
    assert torch.load(path, weights_only=True)["step"] == 3


@pytest.mark.parametrize("with_prefixes", [False, True])
def test_a_microbatch_reads_its_part_alone(with_prefixes):
    """All parts together are the batch, in any order, and each state is read once."""
    trajectories = trajectories_of(swirl, torch.arange(6) % 2, 24)
    prefixes = trajectories_of(swirl, torch.arange(6) % 2, 12, seed=9, until=0.6) if with_prefixes else None
    arguments = (trajectories, RULE, 2, 12, QueryRange())

    def drawn(part):
        return draw_examples(*arguments, generator(4), prefixes).read(part)

    whole = drawn(lambda rows: rows)
    parts = [drawn(Microbatch(i, 3).of) for i in range(3)]
    assert [len(each.t) for each in parts] == [4, 4, 4]
    for name in ("t", "h", "target"):
        together = torch.cat([getattr(each, name) for each in parts])
        one, other = (x.flatten(1).sum(1) if x.ndim > 1 else x for x in (together, getattr(whole, name)))
        torch.testing.assert_close(one.sort().values, other.sort().values)
