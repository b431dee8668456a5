"""Multistep coefficients of a schedule: what they compute, when they do nothing, that fitting finds them, and files."""

import pytest
import torch
from ba_solver.bas_core import (
    Guidance,
    Schedule,
    SideNetCard,
    load_sidenet,
    model_field,
    save_sidenet,
    schedule,
    solve,
)
from ba_solver.bas_core.schedule import RunningSums, ScheduleHook
from ba_solver.training.schedules.linear_form import linear_form, schedule_of
from checks import check_refused_in_a_file, guided_field
from greedy_fit import Fitting, fit_schedule
from problems import exact_field, flow_map, noise, small_sidenet, state, uneven_grid

TIMES = [1.0, 0.7, 0.45, 0.2, 0.0]


def random_weights(times=TIMES, size=0.3):
    generator = torch.Generator().manual_seed(5)
    rows = [
        (size * torch.randn(2 + row // 2 + 2 * (row % 2), generator=generator)).tolist()
        for row in range(2 * (len(times) - 1) - 1)
    ]
    return Schedule(times, rows)


def naive_run(velocity, x, run):
    """The predictor-corrector with weighted terms, written out from the module's description."""
    times, rows = run.times, iter(run.coefficients)
    known = [(times[0], velocity(x, times[0]))]
    for i in range(len(times) - 1):
        t0, t1 = times[i], times[i + 1]
        d, now = t1 - t0, known[i][1]
        straight = x + d * now
        slope = (now - known[i - 1][1]) / (t0 - known[i - 1][0]) if i else 0
        probe = straight + d**2 / 2 * slope
        w = next(rows)
        end = (
            probe
            + w[0] * (probe - straight)
            + sum(a * d * (v - now) for a, (_, v) in zip(w[1:-1], known[:i], strict=True))
            + w[-1] * d * now
        )
        if i == len(times) - 2:
            return end
        known.append((t1, velocity(end, t1)))
        accepted = x + d / 2 * (now + known[-1][1])
        others = [v for j, (_, v) in enumerate(known) if j != i]
        w = next(rows)
        x = accepted + w[0] * (accepted - straight) + w[1] * (end - straight)
        x = x + sum(a * d * (v - now) for a, v in zip(w[2:-1], others, strict=True)) + w[-1] * d * now
    raise AssertionError


def check_weighted_run():
    run = random_weights()
    field = exact_field()
    x = solve(field, None, state(), run)
    torch.testing.assert_close(x, naive_run(field.velocity, state(), run), atol=1e-12, rtol=0)
    assert field.calls == 4 + 4  # the solver's and the naive one's


def check_straight_paths_stay_exact():
    """Any weights of differences leave a velocity that does not change alone."""
    speed = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 1, 2, 2)
    field = model_field(lambda x, t: speed)
    run = random_weights()
    differences = Schedule(run.times, [(*row[:-1], 0.0) for row in run.coefficients])
    x = solve(field, None, state(), differences)
    torch.testing.assert_close(x, state() - speed, atol=1e-12, rtol=0)


def changing_velocity(x, t):
    """Velocities that depend on time alone, in three ways mixed differently at every place."""
    t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1)
    a, b, c = torch.randn((3, *x.shape[1:]), generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    return a * torch.exp(-3 * t) + b * torch.cos(4 * t) + c


def check_fit_finds_the_weights():
    """Three velocities span all of them: from the third on, fitted steps are exact, and so is the end."""
    times = torch.tensor(TIMES, dtype=torch.float64)
    noise = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    fine = torch.linspace(1, 0, 4001, dtype=torch.float64)
    middles = (fine[1:] + fine[:-1]) / 2
    moved = torch.stack([changing_velocity(noise, t)[0] for t in middles]).cumsum(0) / -4000

    def truth(t):
        steps = round(4000 * (1 - float(t)))
        return noise if steps == 0 else noise + moved[steps - 1]

    field = model_field(changing_velocity)
    plain = (solve(field, None, noise, times) - truth(0.0)).abs().max()
    fitted, run = fit_schedule(Fitting(None, field, noise, truth), Schedule(times))
    assert plain > 1e-2 and (fitted - truth(0.0)).abs().max() < 1e-5
    again = solve(field, None, noise, run)
    torch.testing.assert_close(again, fitted, atol=1e-12, rtol=0)


def forget_a_velocity(patch):
    intact = schedule.RunningSums.add

    def without_one(self, number, tensor):
        intact(self, number, 0 * tensor if number == 1 else tensor)

    patch.setattr(schedule.RunningSums, "add", without_one)


def weight_accepted_ends_only(patch):
    intact = ScheduleHook.adjust

    def adjust(self, state):
        adjusted = intact(self, state)
        return state.x if state.predicted is None else adjusted

    patch.setattr(ScheduleHook, "adjust", adjust)


def measure_from_the_state(patch):
    """Velocities themselves in place of their differences: a straight path is bent."""
    intact = schedule.velocity_weights

    def whole(rows):
        return [row | {number // 2: 0.0} for number, row in enumerate(intact(rows))]

    patch.setattr(schedule, "velocity_weights", whole)


CHECKS = [check_weighted_run, check_straight_paths_stay_exact, check_fit_finds_the_weights]


@pytest.mark.parametrize("check", CHECKS)
def test_coefficients(check):
    check()


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        (forget_a_velocity, check_weighted_run),
        (weight_accepted_ends_only, check_weighted_run),
        (weight_accepted_ends_only, check_fit_finds_the_weights),
        (measure_from_the_state, check_weighted_run),
        (measure_from_the_state, check_straight_paths_stay_exact),
    ],
)
def test_damaged_coefficients_fail_the_check(damage, check, monkeypatch):
    damage(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_zero_weights_are_the_plain_solver_bit_by_bit():
    times = torch.tensor(TIMES, dtype=torch.float64)
    net, field, x = small_sidenet(), guided_field(2, Guidance(2.0)), noise(2, 2, 4, 4)
    plain = solve(field, net, x, times)
    zero = Schedule(TIMES, [[0.0] * len(row) for row in random_weights().coefficients])
    assert torch.equal(solve(field, net, x, zero), plain)
    assert not torch.equal(solve(field, net, x, random_weights(size=0.01).with_times(times)), plain)


def test_fitted_weights_serve_other_starts():
    """On a nonlinear flow, weights from some starts lower the error from others."""
    times = uneven_grid(4)
    starts = torch.linspace(0.4, 1.3, 64, dtype=torch.float64).reshape(16, 1, 2, 2)
    fitting = Fitting(None, exact_field(), starts, lambda t: flow_map(starts, 1.0, float(t)))
    run = fit_schedule(fitting, Schedule(times))[1]
    held_out = state() + 0.013
    exact = flow_map(held_out, 1.0, 0.0)
    plain, fitted = ((solve(exact_field(), None, held_out, over) - exact).abs().mean() for over in (times, run))
    assert fitted < 0.3 * plain


def test_files_keep_them(tmp_path):
    card = SideNetCard(schedules={1.0: {4: random_weights()}})
    save_sidenet(tmp_path / "a.safetensors", small_sidenet(), card)
    assert load_sidenet(tmp_path / "a.safetensors")[1].schedules == card.schedules


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("[[0.1], [0.2]]", "come in rows of"),
        ('[["a"]]', "do not describe a SideNet"),
        ("[1, 2]", "do not describe a SideNet"),
        ("7", "do not describe a SideNet"),
    ],
)
def test_damaged_weights_in_a_file_are_refused(weights, message, tmp_path):
    schedules = f'{{"2": {{"4": {{"times": {TIMES}, "coefficients": {weights}}}}}}}'
    check_refused_in_a_file(tmp_path / "a.safetensors", TIMES, {"schedules": schedules}, message)


def test_bad_weights_and_methods_are_refused():
    with pytest.raises(ValueError, match="come in rows of \\[2, 4, 3, 5, 4, 6, 5\\] numbers; got \\[1\\]"):
        Schedule(TIMES, [[0.0]])
    with pytest.raises(ValueError, match="must be finite"):
        random_weights(size=float("inf"))
    with pytest.raises(ValueError, match="were fitted for bi_anchor; got method 'single_anchor'"):
        solve(exact_field(), None, state(), random_weights(), method="single_anchor")


def test_running_sums_keep_the_fewest_tensors():
    """Sums of any weights, taken as a schedule takes them, against sums of everything."""
    generator = torch.Generator().manual_seed(1)
    given = [noise(1, 1, 2, 2, seed=i) for i in range(12)]
    weights = [
        {j: float(torch.randn((), generator=generator)) for j in range(i // 2 + 1 + i % 2) if j % 5 != 4}
        for i in range(23)
    ]
    sums, kept = RunningSums(weights), []
    for i in range(23):
        if i == 0 or i % 2:
            sums.add(i // 2 + i % 2, given[i // 2 + i % 2])
        kept.append(len(sums.kept))
        expected = sum(w * given[j] for j, w in weights[i].items())
        torch.testing.assert_close(sums.take(), expected, atol=1e-12, rtol=1e-12)
    assert max(kept) == 8 and not sums.kept, kept


def test_velocities_that_no_coefficient_reads_are_not_kept():
    """Adams-Bashforth 2 reads two of them, however many steps there are."""
    form = linear_form("adams_bashforth2", torch.linspace(1, 0, 21))
    weights = schedule.velocity_weights(schedule_of(form).coefficients)
    sums, kept = RunningSums(weights), []
    for i in range(len(weights)):
        if i == 0 or i % 2:
            sums.add(i // 2 + i % 2, torch.ones(1))
        kept.append(len(sums.kept))
        sums.take()
    assert max(kept) == 2
    assert not schedule.plain_schedule(TIMES).hook().velocities.weights
