"""Conditional-only calls: what they compute and evaluate, when they do nothing, that fitting finds them, and files."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from ba_solver.bas_core import (
    Field,
    Guidance,
    Schedule,
    SideNetCard,
    load_sidenet,
    model_field,
    save_sidenet,
    solve,
    time_grid,
)
from ba_solver.bas_core.guidance import NO_GUIDANCE
from ba_solver.bas_core.schedule import RunningSums, ScheduleHook, StepHook
from ba_solver.training.schedules.fitting import takes_conditional_only
from checks import check_refused_in_a_file, guided_field
from greedy_fit import Fitting, fit_schedule
from problems import class_velocity, labels, noise, small_sidenet

TIMES = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
# Of five anchors the first is saved or made and forgotten; then whole, half, whole, half.
ROWS = [[], [0.7, -0.4], [], [0.5, 0.3, 0.1, -0.2, 0.6]]
SCALE = 2.5
GRID = torch.tensor(TIMES, dtype=torch.float64)
RUN = Schedule(GRID, cfg_coefficients=ROWS)


def start():
    return noise(2, 2, 4, 4).double()


def sided(x, t, side):
    """Velocities of one branch, which feed back on the state."""
    return class_velocity(x, torch.full((len(x),), float(t), dtype=x.dtype), labels(len(x))[side])


def naive_run(x, rows):
    """Euler's method on guided velocities, with the half calls written out from the module's description."""
    conditional, known = [], []
    for i in range(5):
        t = TIMES[i]
        c, u = sided(x, t, 0), sided(x, t, 1)
        row = rows[i - 1] if i else []
        if row:
            earlier = [c - before for before in conditional]
            u = c - sum(w * term for w, term in zip(row, [*known, *earlier], strict=True))
        elif i:
            known.append(c - u)
        if i:
            conditional.append(c)
        x = x + (TIMES[i + 1] - t) * (u + SCALE * (c - u))
    return x


def euler(field, x, hook):
    for index, (t0, t1) in enumerate(pairwise(GRID)):
        x = x + (t1 - t0) * field.guidance.combine(hook.call_model(field, index, x, t0, 2), t0)
    return x


def check_run():
    for mode in ("combined", "per_branch"):
        field = guided_field(2, Guidance(SCALE), mode)
        found = euler(field, start(), RUN.hook())
        torch.testing.assert_close(found, naive_run(start(), ROWS), atol=1e-12, rtol=0)
        assert (field.calls, field.conditional_only, field.nfe) == (5, 2, 4.0)


def check_straight_paths_stay_exact():
    """Where neither branch changes nor do they differ, as where an inpaint mask keeps the image, weights do nothing."""
    speed = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(2, 1, 4, 4)
    field = model_field(lambda x, t, c: torch.cat([speed] * (len(x) // 2)), *labels(2), Guidance(SCALE))
    x = torch.zeros_like(speed)
    end = solve(field, None, x, RUN)
    torch.testing.assert_close(end, x - speed, atol=1e-12, rtol=0)


def alike(x, t, classes):
    """Branches whose difference turns in a plane as time passes: two whole calls say everything."""
    generator = torch.Generator().manual_seed(4)
    a, b, c = torch.randn((3, *x.shape[1:]), generator=generator, dtype=x.dtype)
    turning = a * torch.cos(2 * t).reshape(-1, 1, 1, 1) + b * torch.sin(2 * t).reshape(-1, 1, 1, 1)
    return c + turning * (1 + (classes < 3).to(x.dtype)).reshape(-1, 1, 1, 1)


def check_fit_finds_the_weights():
    """Where the difference is a combination of those before it, a run on fitted half calls is the whole one."""
    times = torch.tensor([1.0, 0.9, 0.8, 0.65, 0.45, 0.2, 0.0], dtype=torch.float64)
    field = model_field(alike, *labels(2), Guidance(SCALE), "combined")
    whole = solve(field, None, start(), times)
    fitting = Fitting(None, field, start(), lambda t: whole)
    field.calls = 0
    run = fit_schedule(fitting, Schedule(times), True)[1]
    assert field.calls == 6 and [bool(row) for row in run.cfg_coefficients] == [False, False, False, True, False, True]
    field = model_field(alike, *labels(2), Guidance(SCALE), "combined")
    thrifty = solve(field, None, start(), replace(run, coefficients=()))
    torch.testing.assert_close(thrifty, whole, atol=1e-5, rtol=0)
    assert field.nfe == 5 == run.nfe


def check_evaluations():
    """A half call evaluates one branch of each sample, a whole one both."""
    evaluated = []

    def model(x, t, classes):
        evaluated.append(classes.tolist())
        return class_velocity(x, t, classes)

    conditional, unconditional = (part.tolist() for part in labels(2))
    field = model_field(model, *labels(2), Guidance(SCALE), "combined")
    solve(field, small_sidenet().double(), start(), RUN)
    both = conditional + unconditional
    assert evaluated == [both, both, conditional, both, conditional]


def forget_the_change(patch):
    patch.setattr(RunningSums, "take", lambda self: None)


def predict_the_velocity(patch):
    """From velocities themselves in place of their changes: a straight path is bent."""
    intact = ScheduleHook.predict_difference

    def predict(self, *given):
        conditional, difference = intact(self, *given)
        return conditional, difference + conditional

    patch.setattr(ScheduleHook, "predict_difference", predict)


def always_whole(patch):
    patch.setattr(ScheduleHook, "call_model", StepHook.call_model)


def one_place_off(patch):
    intact = ScheduleHook.call_model

    def shifted(self, field, index, x, t, branches):
        return intact(self, field, max(0, index - 1), x, t, branches)

    patch.setattr(ScheduleHook, "call_model", shifted)


CHECKS = [check_run, check_straight_paths_stay_exact, check_fit_finds_the_weights, check_evaluations]


@pytest.mark.parametrize("check", CHECKS)
def test_conditional_only_calls(check):
    check()


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        (forget_the_change, check_run),
        (forget_the_change, check_fit_finds_the_weights),
        (predict_the_velocity, check_straight_paths_stay_exact),
        (always_whole, check_run),
        (always_whole, check_evaluations),
        (one_place_off, check_run),
    ],
)
def test_damaged_conditional_only_calls_fail_the_check(damage, check, monkeypatch):
    damage(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check()


def test_whole_calls_alone_are_the_plain_solver():
    for mode in ("combined", "per_branch"):
        plain, same = (
            solve(guided_field(2, Guidance(SCALE), mode), small_sidenet().double(), start(), run)
            for run in (GRID, Schedule(GRID, cfg_coefficients=[[], [], [], [], []]))
        )
        torch.testing.assert_close(same, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("guidance", [NO_GUIDANCE, Guidance(SCALE, (0.0, 0.7))])
def test_without_two_branches_at_every_time_there_are_none(guidance):
    for mode in ("combined", "per_branch"):
        field = guided_field(2, guidance, mode)
        solve(field, None, start(), RUN)
        assert (field.calls, field.conditional_only) == (5, 0)
        assert takes_conditional_only(field, 10) is False


def test_what_a_budget_is_spent_on():
    """Two half calls, the last and the last but two, pay for one more anchor; the first two calls stay whole."""
    fitting = Fitting(None, guided_field(2, Guidance(SCALE)), start(), lambda t: start())
    assert [takes_conditional_only(fitting.field, nfe) for nfe in (3, 4, 5, 10)] == [False, True, True, True]
    run = fit_schedule(fitting, Schedule(torch.linspace(1, 0, 6)), True)[1]
    assert [bool(row) for row in run.cfg_coefficients] == [False, False, True, False, True]


def test_conditional_only_calls_are_worth_it():
    """On a guided nonlinear flow, 6 calls of which two are conditional-only come nearer than 5 whole ones."""
    x = start()
    fine = torch.linspace(1, 0, 401, dtype=torch.float64)
    field = guided_field(2, Guidance(SCALE), "combined")
    states = [x]
    solve(field, None, x, fine, callback=lambda step: states.append(step.x_next))

    def truth(t):
        return states[round(400 * (1 - float(t)))]

    found = {}
    whole = Field(lambda x, t, count: field.cfg.combine(field.evaluate(x, t, 2), t[0])[None])
    for kind, tried in {"half": field, "whole": whole}.items():
        fitting = Fitting(None, tried, x, truth)
        grids = [time_grid(5 + (kind == "half"), shift) for shift in (0.7, 1.0, 1.4, 2.0)]
        runs = [fit_schedule(fitting, Schedule(grid.tolist()), kind == "half") for grid in grids]
        run = min(runs, key=lambda pair: (pair[0] - states[-1]).norm())[1]
        before = tried.nfe
        end = solve(tried, None, x, run.with_times(torch.tensor(run.times, dtype=torch.float64)))
        assert tried.nfe - before == 5
        found[kind] = (end - states[-1]).square().mean().sqrt()
    assert not run.cfg_coefficients and found["half"] < 0.7 * found["whole"]


def test_files_keep_them(tmp_path):
    card = SideNetCard(schedules={1.0: {4: Schedule(TIMES, cfg_coefficients=ROWS)}})
    save_sidenet(tmp_path / "a.safetensors", small_sidenet(), card)
    loaded = load_sidenet(tmp_path / "a.safetensors")[1]
    assert loaded.schedules == card.schedules


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[[], [0.1]]", "come in as many rows"),
        ("[[0.1], [], [], []]", "the first of them empty"),
        ("[[], [0.1, 0.2], [], [0.1]]", "one number for each earlier call"),
        ('[[], [], [], ["a"]]', "do not describe a SideNet"),
        ("[[], [1e999, 1], [], []]", "must be finite"),
        ("[1, 2]", "do not describe a SideNet"),
        ("[[], [], [], []]", "listed under 4 model calls takes 5"),
    ],
)
def test_damaged_conditional_only_calls_in_a_file_are_refused(rows, message, tmp_path):
    schedules = f'{{"2": {{"4": {{"times": {TIMES}, "cfg_coefficients": {rows}}}}}}}'
    check_refused_in_a_file(tmp_path / "a.safetensors", TIMES[1:], {"schedules": schedules}, message)
