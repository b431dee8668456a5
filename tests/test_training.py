"""Recording, training examples and the training loop, on fields whose truth is known."""

from dataclasses import replace

import pytest
import torch
from ba_solver.bas_core import RULES, CheckpointError, Field, SideNetConfig, model_field
from ba_solver.training.chains import LAST_TIME, Chains, load_chains, record_chains, save_chains
from ba_solver.training.evaluate import converged_reference
from ba_solver.training.loop import LoopSettings, train
from ba_solver.training.pairs import KINDS, QueryRange, draw_examples, draw_queries
from ba_solver.training.train import TrainSettings, residual_variance, squared_errors, train_sidenet

SHAPE = (2, 4, 4)
RULE = RULES["lobatto4"]


def swirl(x, t, y):
    """A curved field that depends on state, time and class."""
    turn = torch.stack([-x[:, 1], x[:, 0]], 1)
    return 3.0 * turn * (1 + y[:, None, None, None] * torch.cos(4 * t)[:, None, None, None]) - x


def record(count=24, points=40, field=swirl):
    labels = torch.arange(count) % 2
    return record_chains(lambda y: model_field(field, y), labels, SHAPE, points, seed=3, batch=8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_chains_hold_the_field_along_its_path():
    """Each recorded velocity is the field at its recorded state, and the path follows it; one call a point."""
    fields: list[Field] = []

    def field_of(y):
        fields.append(model_field(swirl, y))
        return fields[-1]

    chains = record_chains(field_of, torch.tensor([0, 1, 0]), SHAPE, 160, seed=3)
    assert fields[0].calls == 160
    assert (
        (chains.times[:, 0] == 1).all()
        and (chains.times[:, -1] == torch.tensor(LAST_TIME)).all()
        and (chains.times.diff() < 0).all()
    )
    for i in (0, 57, 159):
        expected = swirl(chains.states[:, i], chains.times[:, i], chains.labels)
        torch.testing.assert_close(chains.velocities[:, i], expected)
    steps = chains.times.diff()[:, :, None, None, None]
    trapezoid = steps * (chains.velocities[:, 1:] + chains.velocities[:, :-1]) / 2
    torch.testing.assert_close(chains.states[:, 1:] - chains.states[:, :-1], trapezoid, atol=2e-3, rtol=0)


def test_chains_may_end_early_and_know_where_their_paths_end():
    """Openings end where they are told to; whole chains end at their images."""
    labels = torch.zeros(3, dtype=torch.long)
    opening = record_chains(lambda y: model_field(swirl, y), labels, SHAPE, 12, seed=3, until=0.7)
    assert (opening.times[:, -1] == torch.tensor(0.7)).all() and (opening.times.diff() < 0).all()
    whole = record_chains(lambda y: model_field(swirl, y), labels, SHAPE, 200, seed=3)
    expected = converged_reference(model_field(swirl, labels), whole.states[:, 0])
    missing = (whole.states[:, -1] - expected).norm()
    assert (whole.ends(torch.arange(3)) - expected).norm() < 0.05 * missing


def test_recording_is_reproducible_and_shards_round_trip(tmp_path):
    first, second = record(), record()
    path = tmp_path / "chains.safetensors"
    save_chains(path, first, {"backbone": "abc"})
    loaded, about = load_chains(path)
    assert about == {"backbone": "abc"}
    for name in ("times", "states", "velocities", "labels"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert torch.equal(getattr(first, name), getattr(loaded, name))


def test_damaged_chains_are_refused_by_name(tmp_path):
    path = tmp_path / "chains.safetensors"
    save_chains(path, record(), {})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        load_chains(path)
    chains = record()
    chains.states[0, 3] = float("nan")
    save_chains(path, chains, {})
    with pytest.raises(CheckpointError, match="NaN"):
        load_chains(path)


@pytest.mark.parametrize("anchors", [1, 2])
def test_queries_are_those_of_the_sampler(anchors):
    """Targets lie where the kind says, toward the data in descending runs; every kind occurs."""
    wanted, kinds = draw_queries(RULE, anchors, 4000, QueryRange(ascending=0.0), generator())
    near, far, target = wanted.unbind(1)
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


def test_examples_are_read_off_the_chains_and_lines_are_exact_for_linear_velocities():
    """Where velocity is linear in time the straight line through two anchors leaves nothing; one anchor does."""
    times = torch.sort(torch.rand(6, 50, generator=generator()), dim=1, descending=True).values
    slope, start = torch.randn(2, 6, 1, *SHAPE, generator=generator(1))
    velocities = start + slope * times[:, :, None, None, None]
    chains = Chains(times, velocities.clone(), velocities, torch.arange(6))
    e = draw_examples(chains, RULE, 2, 500, QueryRange(), generator(2))
    with_line = e.span != 0
    assert with_line.float().mean() > 0.5
    assert squared_errors(e.straight_line(), e)[with_line].max() < 1e-6
    assert squared_errors(e.v, e)[with_line].min() > 0
    # The target is the recorded velocity at t - h, the anchor's at t.
    rows = e.labels
    truth = start[rows, 0] + slope[rows, 0] * (e.t - e.h)[:, None, None, None]
    torch.testing.assert_close(e.target, truth, atol=1e-5, rtol=0)
    assert (e.h != 0).all() and (e.h != e.span).float().mean() > 0.95


def test_openings_answer_the_first_interval_and_chains_the_rest():
    """Where an opening reaches it is asked; queries beyond its end, and all others, go to the whole chains."""
    chains, openings = (
        record(count=12),
        record_chains(lambda y: model_field(swirl, y), torch.full((8,), 1), SHAPE, 10, seed=9, until=0.8),
    )
    marked = replace(openings, labels=torch.full((8,), 7))
    e = draw_examples(chains, RULE, 2, 600, QueryRange(), generator(1), marked)
    from_opening = e.labels == 7
    first = (e.t == 1) & (e.span == 0)
    assert from_opening.sum() > 30 and first[from_opening].all()
    assert ((e.t - e.h)[from_opening] >= 0.8 - 1e-6).all()
    assert ((e.t - e.h)[first & ~from_opening] < 0.8 + 0.02).all() and (first & ~from_opening).any()
    # Whatever the source, the target is the field at a recorded state that follows from the near anchor's.
    labels = torch.where(from_opening, 1, e.labels)
    torch.testing.assert_close(e.v, swirl(e.x, e.t, labels))


@pytest.mark.parametrize("anchors", [1, 2])
def test_training_learns_what_the_line_misses(anchors):
    """On held-out chains the SideNet explains a good part of what the multistep method leaves.

    The first interval is left out: what eighty chains hold of it, sixteen others do not confirm.
    """
    chains = record(count=96)
    config = SideNetConfig(
        in_channels=2, base_channels=16, embedding_dim=32, num_layers=2, num_classes=2, anchors=anchors
    )
    settings = TrainSettings(LoopSettings(steps=400, batch=64, learning_rate=1e-2, warmup=10, ema=0.95))
    train_part, held_out = chains.split(16)
    _, left = train_sidenet(config, train_part, held_out, settings)
    assert max(left[kind] for kind in ("between", "beyond", "last")) < 0.85, left
    untrained = train_sidenet(config, train_part, held_out, TrainSettings(LoopSettings(0, 1, 1.0)))[0]
    blank = residual_variance(untrained, anchors, held_out, settings)
    assert blank == dict.fromkeys(KINDS, 1.0)


def toy_run(steps, path, stop_after=None):
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
    whole = toy_run(4, None).state_dict()
    with pytest.raises(KeyboardInterrupt):
        toy_run(4, tmp_path / "run.pt", stop_after=2)
    resumed = toy_run(4, tmp_path / "run.pt").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_save(tmp_path):
    model = torch.nn.Linear(2, 1)
    settings = LoopSettings(steps=5, batch=1, learning_rate=0.1, save_every=1)
    path = tmp_path / "run.pt"

    def loss_at(step, share):
        return model(torch.ones(1, 2)).sum() * (float("nan") if step == 3 else 1.0)

    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        train(model, loss_at, settings, "toy", path)
    assert torch.load(path, weights_only=True)["step"] == 3
