"""Which schedule is taken for a number of steps, and on which times a part of the path is sampled."""

from itertools import pairwise

import pytest
import torch
from ba_solver.bas_core import (
    Guidance,
    Schedule,
    load_sidenet,
    load_sit,
    model_field,
    select_part,
    select_schedule,
    solve,
)
from ba_solver.bas_core.selection import PLAIN_FROM, spread
from ba_solver.training.demo.assets import SIDENET_FILE, SIT_FILE
from test_schedule import fitted

# 4 NFE: an analytic first step, and 2 of 5 calls conditional-only. 6 NFE: plain coefficients.
SMALL = fitted([1.0, 0.95, 0.8, 0.6, 0.4, 0.2, 0.0], cfg_coefficients=[[], [], [0.1] * 4, [], [0.1] * 7])
LARGE = fitted([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0], cfg_coefficients=(), analytic_first_step=False)
SCHEDULES = {4: SMALL, 6: LARGE}


def test_the_cases_are_as_described():
    assert (SMALL.nfe, SMALL.calls, LARGE.nfe) == (4, 5, 6)


@pytest.mark.parametrize("analytic", [True, False])
@pytest.mark.parametrize("conditional_only", [True, False])
def test_no_number_of_steps_takes_more_calls(analytic, conditional_only):
    for steps in range(1, 21):
        found = select_schedule(SCHEDULES, steps, analytic=analytic, conditional_only=conditional_only)
        assert found.nfe <= steps
        assert analytic or not found.analytic_first_step
        assert conditional_only or not found.conditional_only


def test_the_largest_fitted_one_is_taken_until_plain_steps_are_better():
    found = {steps: select_schedule(SCHEDULES, steps) for steps in range(3, 12)}
    assert found[4] == found[5] == SMALL and found[6] == found[7] == found[8] == LARGE
    assert not found[3].fitted and not found[9].fitted and found[9].steps == 9 == PLAIN_FROM * 6
    assert found[3].times[0] == 1 and found[3].times[-1] == 0


def test_without_its_savings_a_schedule_counts_what_it_then_costs():
    """With every call whole the small one costs 5; with a call for the first step too, 6."""
    assert select_schedule(SCHEDULES, 5, conditional_only=False).coefficients == SMALL.coefficients
    assert not select_schedule(SCHEDULES, 4, conditional_only=False).fitted
    assert select_schedule({4: SMALL}, 6, analytic=False, conditional_only=False).coefficients == SMALL.coefficients
    assert not select_schedule({4: SMALL}, 5, analytic=False, conditional_only=False).fitted


def test_times_spread_leave_out_the_short_step_that_is_analytic():
    assert spread({4: SMALL}, 5).tolist() == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert spread({6: LARGE}, 6).tolist() == pytest.approx(list(LARGE.times))


def test_parts_meet_and_divide_the_times_between_them():
    """As many steps as the whole has: the parts' times are the whole's."""
    first, second = select_part({6: LARGE}, 1.0, 0.5, 3), select_part({6: LARGE}, 0.5, 0.0, 3)
    assert first.times == pytest.approx(LARGE.times[:4]) and second.times == pytest.approx(LARGE.times[3:])
    between = select_part({6: LARGE}, 0.8, 0.15, 4)
    assert between.times[0] == 0.8 and between.times[-1] == 0.15 and between.steps == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_schedule({}, 5), "no schedule"),
        (lambda: select_schedule(SCHEDULES, 0), "at least 1 step"),
        (lambda: select_part(SCHEDULES, 0.5, 0.5, 3), "1 >= start > end >= 0"),
        (lambda: select_part(SCHEDULES, 1.0, 0.0, 0), "at least 1 step"),
    ],
)
def test_what_cannot_be_selected_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_more_steps_never_end_farther_off_on_the_demo():
    """60 noises, on which neighbouring schedules' mean errors are known to a tenth."""
    sit, (sidenet, card) = load_sit(SIT_FILE), load_sidenet(SIDENET_FILE)
    labels = torch.arange(60) % 10
    null = torch.full_like(labels, sit.null_class)
    noise = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(5))

    def end(schedule):
        field = model_field(sit, labels, null, Guidance(2.0), mode="combined")
        with torch.inference_mode():
            return solve(field, sidenet, noise, schedule)

    exact = end(Schedule(spread(card.schedules_for(2.0), 60).tolist()))
    errors, before = {}, None
    for steps in (4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 18, 20):
        schedule = select_schedule(card.schedules_for(2.0), steps)
        if schedule != before:
            errors[steps] = (end(schedule) - exact).square().flatten(1).mean(1).sqrt().mean().item()
        before = schedule
    values = list(errors.values())
    assert all(after < 1.25 * before for before, after in pairwise(values)), errors
    assert values[-1] < 0.2 * values[0]
