"""The solver against plain re-implementations of the paper, and its invariants."""

from itertools import pairwise

import pytest
import torch
from ba_solver.bas_core import Field, Guidance, get_rule, model_field, solve, time_grid
from ba_solver.bas_core import solver as solver_module
from ba_solver.bas_core.grids import grid_for_nfe
from ba_solver.bas_core.prediction import Anchor, Query, StraightLine, check_sidenet, predict
from ba_solver.bas_core.schedule import Schedule, plain_schedule
from ba_solver.bas_core.solver import (
    bi_anchor_step,
    make_solver,
    run_bi_anchor,
    run_single_anchor,
    single_anchor_step,
)
from ba_solver.training.baselines import BASELINES, run_baseline
from checks import (
    TIGHT,
    check_chunking,
    check_independence,
    check_matches_naive,
    check_test_field_tells_branches_apart,
    guided_field,
)
from problems import (
    FunctionSideNet,
    Oracle,
    class_velocity,
    exact_field,
    labels,
    noise,
    small_sidenet,
    smooth_grid,
    spread,
    state,
    velocity,
)
from reference import naive_predictor_corrector, naive_single_anchor

UNIFORM, SHIFTED = time_grid(5, dtype=torch.float64), time_grid(4, 2.0, dtype=torch.float64)
WITHOUT_SIDENET = "predictor_corrector"
GUIDANCES = [(1.0, (0.0, 1.0)), (2.0, (0.0, 1.0)), (2.0, (0.0, 0.7)), (1.5, (0.3, 0.8)), (2.0, (0.45, 0.5))]


def as_tensor(t: float) -> torch.Tensor:
    return torch.tensor(t, dtype=torch.float64)


def random_anchors(*times: float) -> list[Anchor]:
    """Anchors of two samples and two branches."""
    return [
        Anchor(noise(2, 2, 4, 4, seed=s), noise(2, 2, 2, 4, 4, seed=s + 9), as_tensor(t)) for s, t in enumerate(times)
    ]


# --- the call at t = 1 ------------------------------------------------------------------------------------------------

MEAN = noise(2, 4, 4, seed=5)
SHORT = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.0], dtype=torch.float64)


def gaussian_velocity(x, t):
    """The flow to independent normal data with mean MEAN and variance 0.3: at t = 1 exactly x - MEAN."""
    t = spread(t, x)
    variance = t**2 + 0.3 * (1 - t) ** 2
    return (t - 0.3 * (1 - t)) / variance * (x - (1 - t) * MEAN) - MEAN


def sidenet_with_mean(anchors=2, mean=MEAN):
    sidenet = small_sidenet(anchors=anchors, data_mean_size=4, num_classes=0)
    sidenet.data_mean.copy_(mean)
    return sidenet


@pytest.mark.parametrize("method", ["bi_anchor", "single_anchor"])
@pytest.mark.parametrize("anchors", [1, 2])
def test_a_sidenet_that_knows_the_mean_saves_the_first_call_and_nothing_else(anchors, method):
    sidenet, x = sidenet_with_mean(anchors), noise(3, 2, 4, 4)
    fields = [model_field(gaussian_velocity) for _ in range(3)]
    whole = solve(fields[0], sidenet, x, SHORT, method=method)
    saving = Schedule(SHORT, analytic_first_step=True)
    saved = solve(fields[1], sidenet, x, saving, method=method)
    other = solve(fields[2], sidenet_with_mean(anchors, MEAN + 0.1), x, saving, method=method)
    assert [field.calls for field in fields] == [4, 3, 3] == [Schedule(SHORT).calls, saving.calls, saving.calls]
    torch.testing.assert_close(saved, whole, **TIGHT)
    assert (other - whole).abs().max() > 1e-3


@pytest.mark.parametrize("times", [[1.0, 0.84, 0.5, 0.0], [0.99, 0.95, 0.5, 0.0], [0.0, 0.07, 0.5, 1.0]], ids=str)
def test_the_first_call_is_made_unless_a_short_step_leads_away_from_pure_noise(times):
    field, run = (
        model_field(gaussian_velocity),
        plain_schedule(torch.tensor(times, dtype=torch.float64), has_data_mean=True),
    )
    solve(field, sidenet_with_mean(), noise(1, 2, 4, 4), run)
    assert field.calls == 3 == run.calls


def test_without_a_mean_the_first_call_is_made():
    for sidenet in (None, small_sidenet(anchors=2, num_classes=0), Oracle(2)):
        field = exact_field()
        solve(field, sidenet, noise(1, 2, 4, 4).abs(), Schedule(SHORT, analytic_first_step=True))
        assert field.calls == 4


def test_a_grid_for_a_number_of_calls_has_one_more_step_where_the_first_is_saved():
    asked = ((3.0, True), (3.0, False), (1.0, True))  # the last, uniform, does not start short
    made = [grid_for_nfe(lambda n, shift=shift: time_grid(n, shift), 5, skip) for shift, skip in asked]
    assert [len(grid) - 1 for grid in made] == [6, 5, 5]


# --- against the paper, written out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("anchors", [1, 2])
@pytest.mark.parametrize("times", [UNIFORM, SHIFTED, UNIFORM.flip(0)], ids=["uniform", "shifted", "ascending"])
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("rule", ["lobatto3", "lobatto4", "simpson38"])
def test_bi_anchor_equals_the_paper_written_out(rule, guidance, times, anchors):
    check_matches_naive(rule, anchors, times, Guidance(*guidance))


@pytest.mark.parametrize("anchors", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_bi_anchor_equals_the_paper_on_random_grids_and_intervals(seed, anchors):
    """Which branches are needed where depends on all of them; the reference always evaluates both."""
    draw = torch.rand(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    times = draw[:7].sort(descending=True).values
    check_matches_naive("lobatto4", anchors, times, Guidance(2.5, tuple(draw[7:].sort().values.tolist())), seed)


@pytest.mark.parametrize("times", [UNIFORM, SHIFTED, UNIFORM.flip(0)], ids=["uniform", "shifted", "ascending"])
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("rule", ["legendre1", "legendre3", "lobatto4"])
def test_single_anchor_equals_the_paper_written_out(rule, guidance, times):
    sidenet, x = small_sidenet(), noise(2, 2, 4, 4)
    field, quadrature = guided_field(2, Guidance(*guidance)), get_rule(rule)
    got = solve(field, sidenet, x, times, method="single_anchor", rule=rule)
    nodes_and_weights = quadrature.nodes, quadrature.weights
    expected = naive_single_anchor(class_velocity, sidenet, x, times.tolist(), nodes_and_weights, labels(2), guidance)
    torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("times", [UNIFORM, SHIFTED, smooth_grid(6, 0.1, 0.9)], ids=["uniform", "shifted", "ascending"])
@pytest.mark.parametrize("sidenet", [None, "zero"])
def test_without_a_sidenet_or_with_a_zero_one_it_is_the_predictor_corrector(sidenet, times):
    sidenet = small_sidenet(anchors=2, in_channels=1, num_classes=0).zero_output() if sidenet else None
    expected = naive_predictor_corrector(velocity, state(), times.tolist())
    torch.testing.assert_close(solve(exact_field(), sidenet, state(), times), expected, rtol=1e-13, atol=1e-13)


def test_a_zero_one_anchor_sidenet_predicts_with_euler_and_corrects_with_both_ends():
    """Every forward node then holds v(left) and every backward node v(right): Euler, and after it the trapezoid."""
    x, expected, times = state(), state(), SHIFTED.tolist()
    v = velocity(x, times[0])
    for t, s in pairwise(times[:-1]):
        right = velocity(expected + (s - t) * v, s)
        expected, v = expected + (s - t) / 2 * (v + right), right
    expected = expected + (times[-1] - times[-2]) * v
    sidenet = small_sidenet(in_channels=1, num_classes=0).zero_output()
    torch.testing.assert_close(solve(exact_field(), sidenet, x, SHIFTED), expected, rtol=1e-13, atol=1e-13)


def test_single_anchor_without_a_sidenet_is_euler():
    got = solve(exact_field(), None, state(), SHIFTED, method="single_anchor")
    torch.testing.assert_close(got, run_baseline("euler", exact_field(), state(), SHIFTED), **TIGHT)


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sidenet", [None, small_sidenet(anchors=1), small_sidenet(anchors=2)], ids=["none", "1", "2"])
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_guided_mode_integrates_the_combined_velocity(guidance, sidenet):
    scale, (low, high) = guidance
    cond, uncond = labels(2)

    def combined(x, t, y):
        v = class_velocity(x, t, y)
        return torch.lerp(class_velocity(x, t, uncond), v, scale) if low < t[0] <= high else v

    x = noise(2, 2, 4, 4)
    got = solve(guided_field(2, Guidance(*guidance), "combined"), sidenet, x, UNIFORM)
    torch.testing.assert_close(got, solve(model_field(combined, cond), sidenet, x, UNIFORM), **TIGHT)


@pytest.mark.parametrize(
    ("name", "mode"),
    # Without a SideNet the solver, in branch mode, decides on guidance at every quadrature node and not at every call.
    [
        (name, mode)
        for name in BASELINES
        for mode in ("per_branch", "combined")
        if (name, mode) != (WITHOUT_SIDENET, "per_branch")
    ],
)
def test_baselines_integrate_the_guided_velocity(name, mode):
    cond, uncond = labels(2)

    def combined(x, t):
        c, u = class_velocity(x, t, cond), class_velocity(x, t, uncond)
        return u + 2 * (c - u) if t[0] <= 0.7 else c  # at t = 0 the limit of the guided field

    x, guidance = noise(2, 2, 4, 4), Guidance(2.0, (0.0, 0.7))
    got = run_baseline(name, guided_field(2, guidance, mode), x, UNIFORM)
    torch.testing.assert_close(got, run_baseline(name, model_field(combined), x, UNIFORM), **TIGHT)


def test_both_modes_agree_without_a_sidenet_where_guidance_applies_throughout():
    """Straight lines through the branches combine to the straight line through the guided velocity."""
    x, times = noise(2, 2, 4, 4), smooth_grid(5, 1.0, 0.1)
    results = [solve(guided_field(2, Guidance(2.0), mode), None, x, times) for mode in ("per_branch", "combined")]
    torch.testing.assert_close(*results, **TIGHT)


@pytest.mark.parametrize(
    ("anchors", "needed"), [(1, [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]), (2, [1, 1, 2, 2, 2, 2, 2, 2, 1, 1])]
)
def test_the_unconditional_branch_is_evaluated_only_where_a_node_needs_it(anchors, needed):
    """CFG in (0.35, 0.65], ten uniform steps, nodes at 0.28 and 0.72 of each.

    The calls at 0.7 ... 0.4 predict guided nodes. With two anchors the call at 0.8 helps to predict the nodes of
    (0.7, 0.6), and the one at 0.3 those of (0.4, 0.3), of which the one at 0.372 is guided. The tests against the
    paper show that the result is as if both branches were always evaluated.
    """
    seen = []

    def evaluate(x, t, branches):
        seen.append(branches)
        return torch.stack([class_velocity(x, t, y) for y in labels(2)[:branches]])

    field = Field(evaluate, labels(2), Guidance(2.0, (0.35, 0.65)))
    solve(field, small_sidenet(anchors=anchors), noise(2, 2, 4, 4), time_grid(10, dtype=torch.float64))
    assert seen == needed


def test_the_guidance_scale_reaches_a_sidenet_that_asks_for_it():
    sidenet, x, guidance = small_sidenet(cfg_input=True), noise(2, 2, 4, 4), Guidance(3.0)

    def told(x, v, t, h, cond, **_):
        return sidenet(x, v, t, h, cond, scale=torch.full_like(t, 3.0))

    nets = (sidenet, FunctionSideNet(told))
    results = [solve(guided_field(2, guidance, "combined"), net, x, UNIFORM) for net in nets]
    torch.testing.assert_close(*results, **TIGHT)
    other = solve(guided_field(2, Guidance(3.001), "combined"), sidenet, x, UNIFORM)
    assert not torch.allclose(other, results[0], **TIGHT)


# --- invariants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchors", [1, 2])
def test_a_step_of_length_zero_is_the_identity(anchors, monkeypatch):
    t, integrated = as_tensor(0.6), []
    intact = solver_module.integrate

    def recording(rule, v, *rest):
        integrated.append(dict(v))  # the step goes on to fill v
        return intact(rule, v, *rest)

    monkeypatch.setattr(solver_module, "integrate", recording)
    field = guided_field(2, Guidance(2.0))
    solver = make_solver(field, small_sidenet(anchors=anchors), "lobatto4")
    left, earlier = random_anchors(0.6, 0.8)
    for previous in (None, earlier):
        for times in ([t, t], [t, t, t]):  # as the last step, and as one with a corrector
            integrated.clear()
            end, v_t, _ = bi_anchor_step(solver, 0, left.x, times, 2, left, previous)
            assert torch.equal(end, left.x) and len(integrated) == len(times) - 1
            assert set(integrated[0]) == set(solver.rule.nodes)
            for v in (v_t, *integrated[0].values()):
                torch.testing.assert_close(v, field.guidance.combine(left.v, t), **TIGHT)
    assert torch.equal(single_anchor_step(solver, 0, left.x, [t, t]).x, left.x)


def test_a_wrapper_that_lacks_a_member_fails_at_once():
    """A two-anchor SideNet in a wrapper without `anchors` would silently become one with one anchor."""
    net = small_sidenet(anchors=2)
    for wrapper in (torch.nn.DataParallel(net), lambda **inputs: net(**inputs)):
        with pytest.raises(TypeError, match="lacks anchors"):
            solve(guided_field(2, Guidance(2.0)), wrapper, noise(2, 2, 4, 4), UNIFORM)
    assert check_sidenet(net) is net


@pytest.mark.parametrize("intervals", [1, 3])
@pytest.mark.parametrize("method", ["bi_anchor", "single_anchor"])
@pytest.mark.parametrize("anchors", [None, 1, 2])
def test_straight_paths_are_exact(anchors, method, intervals):
    """v = (x - mu) / t, the flow onto one point mu: each path is straight, and ends in mu."""
    mu = noise(2, 2, 4, 4, seed=5)
    sidenet = anchors and small_sidenet(anchors=anchors, num_classes=0).zero_output()
    field = model_field(lambda x, t: (x - mu) / spread(t, x))
    end = solve(field, sidenet, noise(2, 2, 4, 4), smooth_grid(intervals), method=method)
    torch.testing.assert_close(end, mu, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("anchors", [1, 2])
def test_batch_items_do_not_influence_each_other(anchors):
    check_test_field_tells_branches_apart()
    check_independence(small_sidenet(anchors=anchors))


@pytest.mark.parametrize("anchors", [1, 2])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
def test_chunked_equals_unchunked(chunk, anchors):
    check_chunking(small_sidenet(anchors=anchors), chunk)


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_chunks_are_no_larger_than_asked(chunk):
    """And together they are the whole: 3 samples x 2 branches x 4 nodes of two steps, forward and back."""
    sizes, net = [], small_sidenet()

    def counting(x, **rest):
        sizes.append(len(x))
        return net(x, **rest)

    solve(guided_field(3, Guidance(2.0)), FunctionSideNet(counting), noise(3, 2, 4, 4), smooth_grid(2), chunk=chunk)
    assert max(sizes) == chunk and sum(sizes) == 6 * (3 + 1 + 3)


@pytest.mark.parametrize("times", [UNIFORM, UNIFORM.flip(0)], ids=["descending", "ascending"])
@pytest.mark.parametrize("method", ["bi_anchor", "single_anchor"])
@pytest.mark.parametrize("predictor", [Oracle(1), Oracle(2), None, "network"], ids=["1", "2", "none", "network"])
def test_gradients_flow_through_whole_solutions(predictor, method, times):
    """Against finite differences, in the state."""
    predictor = small_sidenet(in_channels=1, anchors=2, num_classes=0) if predictor == "network" else predictor
    x = state(1).requires_grad_()
    run, rule = (run_single_anchor, "legendre3") if method == "single_anchor" else (run_bi_anchor, "lobatto4")
    solver = make_solver(exact_field(), predictor, rule)
    assert torch.autograd.gradcheck(lambda x: run(solver, x, times), x)
    assert not solve(exact_field(), predictor, x, times, method=method).requires_grad


def test_gradients_reach_the_sidenets_parameters():
    net, x = small_sidenet(), noise(1, 2, 4, 4)

    def end(bias):
        net.output_conv._parameters["bias"] = bias
        return run_bi_anchor(make_solver(guided_field(1, Guidance(2.0)), net), x, SHIFTED)

    assert torch.autograd.gradcheck(end, net.output_conv.bias.detach().clone().requires_grad_())


def test_video_equals_its_frames_one_by_one():
    sidenet, video = small_sidenet(anchors=2), noise(2, 2, 3, 4, 4)
    whole = solve(guided_field(2, Guidance(2.0, (0.0, 0.7))), sidenet, video, SHIFTED)
    for frame in range(3):
        alone = solve(guided_field(2, Guidance(2.0, (0.0, 0.7))), sidenet, video[:, :, frame], SHIFTED)
        torch.testing.assert_close(whole[:, :, frame], alone, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "run", [lambda f, x: solve(f, None, x, UNIFORM.float()), lambda f, x: run_baseline("rk4", f, x, UNIFORM.float())]
)
def test_half_precision_states_are_integrated_in_float32(run, dtype):
    """Also where the backbone answers in half precision."""
    seen = set()

    def half_network(x, t):
        seen.add((x.dtype, t.dtype))
        return velocity(x, t).to(dtype)

    x = state().to(dtype)
    end = run(model_field(half_network), x)
    assert seen == {(torch.float32, torch.float32)} and end.dtype == torch.float32
    assert torch.equal(end, run(model_field(half_network), x.float()))


def test_nothing_given_is_changed_and_nothing_is_remembered():
    """Inputs stay as they are, and the same call gives the same bits."""
    x, times, field, net = noise(2, 2, 4, 4), UNIFORM.clone(), guided_field(2, Guidance(2.0)), small_sidenet(anchors=2)
    first = solve(field, net, x, times)
    assert torch.equal(x, noise(2, 2, 4, 4)) and torch.equal(times, UNIFORM)
    assert torch.equal(first, solve(field, net, x, times))


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True], ids=["toward data", "toward noise"])
def test_two_anchor_predictions_are_exact_at_both_anchors(swap):
    """Whatever the network says: v at h = 0, and v_b at the second anchor's time."""
    near, far = random_anchors(0.7, 0.45)[:: -1 if swap else 1]
    field, net = guided_field(2, Guidance(2.0)), small_sidenet(anchors=2)
    queries = [Query(near, far, near.t), Query(near, far, far.t), Query(near, far, (near.t + far.t) / 2)]
    at_near, at_far, between = predict(net, queries, field, 2)
    torch.testing.assert_close(at_near, near.v, **TIGHT)
    torch.testing.assert_close(at_far, far.v, **TIGHT)
    assert (between - (near.v + far.v) / 2).abs().max() > 1e-3, "the network must matter between them"


def test_the_straight_line_is_linear_between_and_beyond_the_anchors():
    near, far = random_anchors(0.7, 0.45)
    times = [as_tensor(t) for t in (0.9, 0.6, 0.2)]
    lines = predict(StraightLine(), [Query(near, far, t) for t in times], guided_field(2, Guidance(2.0)), 2)
    for t, v in zip(times, lines, strict=True):
        torch.testing.assert_close(v, near.v + (far.v - near.v) * (t - 0.7) / (0.45 - 0.7), **TIGHT)


def test_each_query_is_told_its_own_step_time_and_condition():
    """A predictor that returns what it was told shows how a phase is laid out in one batch."""
    near, far = random_anchors(0.7, 0.45)
    field = guided_field(2, Guidance(2.0))
    queries = [Query(near, far, as_tensor(0.6)), Query(far, near, as_tensor(0.5))]
    for told, expected in (
        ("t", [[0.7, 0.7], [0.45, 0.45]]),
        ("h", [[0.1, 0.1], [-0.05, -0.05]]),
        ("span", [[0.25, 0.25], [-0.25, -0.25]]),
        ("cond", [[labels(2)[0], labels(2)[1]]] * 2),
    ):

        def echo(x, v, told=told, **inputs):
            return spread(inputs[told].to(x.dtype), x).expand_as(x) - v

        got = torch.stack(list(predict(FunctionSideNet(echo, anchors=2), queries, field, 2)))
        wanted = torch.stack(
            [torch.stack([torch.as_tensor(b, dtype=got.dtype).expand(2) for b in q]) for q in expected]
        )
        torch.testing.assert_close(got[..., 0, 0, 0], wanted)
