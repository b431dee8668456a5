"""Damaged solvers must fail the checks that the other files make: a check that cannot fail shows nothing."""

import dataclasses

import pytest
import torch
from ba_solver.bas_core import Guidance, editing, prediction, solver, time_grid
from ba_solver.training.baselines import BASELINES
from ba_solver.training.network import loop, stages
from ba_solver.training.schedules import end_fit, fitting, linear_form, surrogate
from checks import (
    check_baseline_order,
    check_calls,
    check_chunking,
    check_eta,
    check_exact_return,
    check_fade,
    check_flowedit_order,
    check_independence,
    check_inversion_order,
    check_mask,
    check_matches_naive,
    check_oracle_order,
)
from problems import FunctionSideNet, Oracle, small_sidenet
from training_checks import (
    check_end_fit,
    check_pairs,
    record,
    train_on_pairs,
)


def rk4_with_equal_weights(velocity, x, t0, t1, history):
    step, half = t1 - t0, (t1 - t0) / 2
    a = velocity(x, t0)
    b = velocity(x + half * a, t0 + half)
    c = velocity(x + half * b, t0 + half)
    d = velocity(x + step * c, t1)
    return x + step / 4 * (a + b + c + d), history


def heun_with_lopsided_weights(velocity, x, t0, t1, history):
    v0 = velocity(x, t0)
    v1 = velocity(x + (t1 - t0) * v0, t1)
    return x + (t1 - t0) * (0.6 * v0 + 0.4 * v1), history


def adams_bashforth2_for_constant_steps(velocity, x, t0, t1, history):
    v = velocity(x, t0)
    slope = 1.5 * v - 0.5 * history[-1] if history else v
    return x + (t1 - t0) * slope, (v,)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("rk4", rk4_with_equal_weights),
        ("heun", heun_with_lopsided_weights),
        ("adams_bashforth2", adams_bashforth2_for_constant_steps),
        ("midpoint", BASELINES["euler"].step),
        ("adams_bashforth4", BASELINES["adams_bashforth3"].step),
        ("adams_pec", BASELINES["adams_bashforth3"].step),
    ],
)
def test_the_order_check_finds_a_damaged_baseline(name, step):
    with pytest.raises(AssertionError, match="order"):
        check_baseline_order(dataclasses.replace(BASELINES[name], step=step))


# --- damages to the solver: each a function of monkeypatch ------------------------------------------------------------


def swap_first_two_velocities(patch):
    """The velocity at the anchor is taken for the one at the first inner node, and the other way round."""
    intact = solver.integrate

    def integrate(rule, v, x, t, s):
        first, second = rule.nodes[:2]
        return intact(rule, v | {first: v[second], second: v[first]}, x, t, s)

    patch.setattr(solver, "integrate", integrate)


def with_queries(patch, change):
    """`change` turns the queries of every phase into others."""
    intact = solver.predict
    patch.setattr(solver, "predict", lambda sidenet, queries, *rest: intact(sidenet, change(queries), *rest))


def look_the_wrong_way_back(patch):
    """The corrector with h of the wrong sign."""
    with_queries(
        patch,
        lambda queries: [q._replace(time=2 * q.near.t - q.time) if q.time > q.near.t else q for q in queries],
    )


def right_anchor_at_the_left_state(patch):
    """The model is called at the end's time but at the start's state."""
    intact = solver.bi_anchor_step

    class Left(solver.StepHook):
        def adjust(self, state):
            return state.x if state.accepted else state.x_start

    def step(solver_, *rest):
        return intact(dataclasses.replace(solver_, hook=Left()), *rest)

    patch.setattr(solver, "bi_anchor_step", step)


def correct_the_left_half(patch):
    """The nodes nearer to the left anchor are predicted anew instead of those nearer to the right one."""
    nodes = property(lambda self: tuple(c for c in self.rule.nodes if 0 < c < 0.5))
    patch.setattr(solver.Solver, "corrected_nodes", nodes)


def keep_the_forward_nodes(patch):
    """No corrected nodes at all."""
    patch.setattr(solver.Solver, "corrected_nodes", property(lambda self: ()))


def accept_the_predictor(patch):
    """No second integration."""
    intact = solver.make_solver

    class Predicted(solver.StepHook):
        def adjust(self, state):
            return state.x if state.predicted is None else state.predicted

    patch.setattr(
        solver, "make_solver", lambda *given, **named: dataclasses.replace(intact(*given, **named), hook=Predicted())
    )


def call_the_model_at_the_end(patch):
    """The last interval too gets a right anchor."""
    intact = solver.bi_anchor_step

    def step(solver_, index, x, times, *rest):
        result = intact(solver_, index, x, times, *rest)
        if index == len(times) - 2:
            solver_.field(result.x, times[-1])
        return result

    patch.setattr(solver, "bi_anchor_step", step)


def forget_the_right_anchor(patch):
    """v_end is not reused: each interval calls the model at its corrected start."""
    intact = solver.bi_anchor_step

    def step(solver_, index, x, times, branches, left, previous):
        fresh = left._replace(v=solver_.field(x, left.t, len(left.v))) if index else left
        return intact(solver_, index, x, times, branches, fresh, previous)

    patch.setattr(solver, "bi_anchor_step", step)


def mix_the_batch(patch):
    """A little of the batch's mean gets into every sample."""
    intact = solver.integrate

    def integrate(rule, v, x, t, s):
        return intact(rule, v, torch.lerp(x, x.mean(0, keepdim=True), 1e-6), t, s)

    patch.setattr(solver, "integrate", integrate)


def mix_the_conditions(patch):
    """The classes are laid out sample by sample, where the states lie branch by branch."""

    def conditions(field, branches, queries):
        return torch.stack(field.conditions[:branches], 1).flatten().repeat(queries)

    patch.setattr(prediction, "_conditions", conditions)


def guide_by_the_anchors_time(patch):
    """Every node is guided as the anchor is that it is predicted from."""

    def predict(self, queries, *_, **__):
        near = queries[0].near
        branches = 2 if self.field.guidance.active(near.t) and len(near.v) > 1 else 1
        found = solver.predict(self.sidenet, queries, self.field, branches, self.chunk)
        return [self.field.guidance.combine(v, near.t) for v in found]

    patch.setattr(solver.Solver, "predict", predict)


def with_sidenet(patch, change):
    """`change(sidenet, chunk)` is called in the SideNet's place."""
    intact = solver.predict

    def predict(sidenet, queries, field, branches, chunk=None):
        return intact(FunctionSideNet(change(sidenet, chunk), sidenet.anchors), queries, field, branches, chunk)

    patch.setattr(solver, "predict", predict)


def drop_the_remainder(patch):
    """What is left over after the last whole chunk is predicted as no change."""
    with_sidenet(
        patch,
        lambda sidenet, chunk: (
            lambda x, **inputs: torch.zeros_like(x) if chunk and len(x) < chunk else sidenet(x=x, **inputs)
        ),
    )


def cut_only_the_states(patch):
    """Every chunk of the states meets the first chunk's steps."""

    def change(sidenet, chunk):
        first = {}
        return lambda x, h, **inputs: sidenet(x=x, h=first.setdefault("h", h)[: len(x)], **inputs)

    with_sidenet(patch, change)


def skip_the_unconditional_branch(patch):
    """Calls outside the CFG interval never evaluate it, though nodes ahead may need it."""
    patch.setattr(
        solver,
        "branches_for_calls",
        lambda solver_, times: [2 if solver_.field.guidance.active(t) else 1 for t in times[:-1]],
    )
    intact = solver.predict

    def predict(sidenet, queries, field, branches, chunk=None):
        whole = [q._replace(near=q.near._replace(v=q.near.v.expand(branches, *q.near.v.shape[1:]))
                            if len(q.near.v) < branches else q.near) for q in queries]  # fmt: skip
        return intact(sidenet, whole, field, branches, chunk)

    patch.setattr(solver, "predict", predict)


GUIDED = Guidance(2.0, (0.3, 0.75))
GRID = time_grid(5, 1.3, dtype=torch.float64)


def paper_check():
    check_matches_naive("lobatto4", 1, GRID, GUIDED)


def order_check():
    check_oracle_order("lobatto4", 6, (8, 16))


def calls_check():
    check_calls(Oracle(), "bi_anchor", 5)


def independence_check():
    check_independence(small_sidenet())


def chunking_check():
    check_chunking(small_sidenet(), 4)


CHECKS = [paper_check, order_check, calls_check, independence_check, chunking_check]
DAMAGES = [
    (swap_first_two_velocities, [order_check, paper_check]),
    (look_the_wrong_way_back, [order_check, paper_check]),
    (right_anchor_at_the_left_state, [order_check, paper_check]),
    (correct_the_left_half, [paper_check]),
    (keep_the_forward_nodes, [paper_check]),
    (accept_the_predictor, [paper_check]),
    (call_the_model_at_the_end, [calls_check]),
    (forget_the_right_anchor, [calls_check, paper_check]),
    (mix_the_batch, [independence_check, paper_check]),
    (mix_the_conditions, [independence_check, paper_check]),
    (guide_by_the_anchors_time, [paper_check]),
    (drop_the_remainder, [chunking_check]),
    (cut_only_the_states, [chunking_check]),
    (skip_the_unconditional_branch, [paper_check]),
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_checks_pass_when_nothing_is_damaged(check):
    check()


@pytest.mark.parametrize(
    ("damage", "check"), [pytest.param(d, c, id=f"{d.__name__}-{c.__name__}") for d, checks in DAMAGES for c in checks]
)
def test_a_damaged_solver_fails_the_check(damage, check, monkeypatch):
    damage(monkeypatch)
    with pytest.raises(AssertionError):
        check()


# --- damages to editing -------------------------------------------------------------------------------------------


def add_residuals_to_accepted_ends_only(patch):
    """The right anchor of an edit is where the solver proposes it, without the trajectory's residual."""
    intact = editing._EditHook.adjust
    patch.setattr(editing._EditHook, "adjust", lambda self, p: intact(self, p) if p.accepted else p.x)


def keep_the_wrong_states(patch):
    """The trajectory's states are those of the steps before."""
    intact = editing._source_trajectory

    def trajectory(field, sidenet, grid, states, *rest):
        return intact(field, sidenet, grid, [states[0], *states[:-2], states[-1]], *rest)

    patch.setattr(editing, "_source_trajectory", trajectory)


def keep_the_velocities_in_the_wrong_order(patch):
    intact = editing._source_trajectory
    patch.setattr(
        editing, "_source_trajectory", lambda f, n, grid, states, vs, chunk: intact(f, n, grid, states, vs[::-1], chunk)
    )


def swap_the_sides_of_the_mask(patch):
    intact = editing.check_mask
    patch.setattr(editing, "check_mask", lambda mask, image: 1 - intact(mask, image))


def pull_at_all_times(patch):
    patch.setattr(editing.Control, "eta_at", lambda self, t: self.eta)


def never_fade(patch):
    patch.setattr(editing.Control, "residual_weight", lambda self, left: torch.ones_like(left[:, :1]))


def never_pull(patch):
    patch.setattr(editing.Control, "eta_at", lambda self, t: 0.0)


def stop_a_step_early(patch):
    """The path's noise is the state before the last step up."""
    intact = editing.run_bi_anchor
    patch.setattr(editing, "run_bi_anchor", lambda solver_, x, grid, *rest: intact(solver_, x, grid[:-1], *rest))


def return_check():
    for kind in ("inversion", "straight"):
        check_exact_return(kind, small_sidenet(), Guidance(2.0), 4)


def mask_check():
    check_mask("inversion")


def inversion_check():
    check_inversion_order(Oracle(), 6, (8, 16))


EDITING_CHECKS = [return_check, mask_check, check_eta, check_fade, check_flowedit_order, inversion_check]
EDITING_DAMAGES = [
    (add_residuals_to_accepted_ends_only, [return_check]),
    (keep_the_wrong_states, [return_check]),
    (keep_the_velocities_in_the_wrong_order, [return_check, check_flowedit_order]),
    (swap_the_sides_of_the_mask, [mask_check]),
    (pull_at_all_times, [check_eta]),
    (never_pull, [check_eta]),
    (never_fade, [check_fade]),
    (stop_a_step_early, [inversion_check]),
]


@pytest.mark.parametrize("check", EDITING_CHECKS)
def test_the_editing_checks_pass_when_nothing_is_damaged(check):
    check()


@pytest.mark.parametrize(
    ("damage", "check"),
    [pytest.param(d, c, id=f"{d.__name__}-{c.__name__}") for d, checks in EDITING_DAMAGES for c in checks],
)
def test_damaged_editing_fails_the_check(damage, check, monkeypatch):
    damage(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check()


# --- damages to the trainer ---------------------------------------------------------------------------------------


def forget_the_gradients(patch):
    intact = loop.TrainingState.gradients

    def gradients(self, loss_at):
        loss = intact(self, loss_at)
        self.model.zero_grad()
        return loss

    patch.setattr(loop.TrainingState, "gradients", gradients)


def climb(patch):
    """Gradients of the wrong sign."""
    intact = loop.TrainingState.gradients

    def gradients(self, loss_at):
        loss = intact(self, loss_at)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()
        return loss

    patch.setattr(loop.TrainingState, "gradients", gradients)


def elsewhere(truth):
    """Another trajectory's truth, at other places."""
    return truth.roll(1, 0).flip(-1, -2).roll(1, -1)


def shuffle_the_targets(patch):
    """Everything that is trained or fitted is compared with the truth of something else."""
    pairs, fitted = stages.relative_loss, fitting.least_squares
    patch.setattr(
        stages, "relative_loss", lambda net, e, n: pairs(net, dataclasses.replace(e, target=elsewhere(e.target)), n)
    )
    patch.setattr(fitting, "least_squares", lambda columns, target: fitted(columns, elsewhere(target)))


def forget_the_rollouts(patch):
    """The surrogate stays as it was before any."""
    patch.setattr(surrogate.Surrogate, "learn", lambda self: None)


def another_unit(patch):
    """Derivatives are taken for other numbers than those that are moved."""
    patch.setattr(end_fit, "from_numbers", lambda numbers, *rest: linear_form.from_numbers(numbers.flip(-1), *rest))


def forget_a_row(patch):
    """One step's weights are lost where a method becomes a schedule's numbers."""
    real = linear_form.from_numbers

    def damaged(numbers, steps, *part):
        times, weights = real(numbers, steps, *part)
        weights[:, -1] = weights[:, -2] * times[:, -1:].sub(times[:, :1]) / times[:, -2:-1].sub(times[:, :1])
        return times, weights

    patch.setattr(linear_form, "from_numbers", damaged)


TRAINER_DAMAGES = [
    (forget_the_gradients, [check_pairs]),
    (climb, [check_pairs]),
    (shuffle_the_targets, [check_pairs]),
    (forget_the_rollouts, [check_end_fit]),
    (another_unit, [check_end_fit]),
    (forget_a_row, [check_end_fit]),
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A recording, and a SideNet that was trained on it before the trainer was damaged."""
    root = tmp_path_factory.mktemp("recorded")
    record(root / "guided", "--guidance", "2", "--trajectories", "96")
    return root / "guided", train_on_pairs(root / "guided", root / "sidenet.safetensors")[0]


@pytest.mark.parametrize(
    ("damage", "check"),
    [pytest.param(d, c, id=f"{d.__name__}-{c.__name__}") for d, checks in TRAINER_DAMAGES for c in checks],
)
def test_a_damaged_trainer_fails_the_check(damage, check, recorded, tmp_path, monkeypatch):
    """`test_fit.py` asks the same of the trainer as it is."""
    damage(monkeypatch)
    with pytest.raises((AssertionError, ArithmeticError)):
        check(*recorded, tmp_path)
