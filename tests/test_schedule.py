"""A schedule as one value: its NFE, what it refuses, and its scaling."""

import pytest
import torch
from ba_solver.bas_core import (
    Guidance,
    Schedule,
    SideNetCard,
    load_sidenet,
    plain_schedule,
    save_sidenet,
    solve,
    time_grid,
)
from ba_solver.bas_core.schedule import describe_schedules
from checks import guided_field
from problems import noise, small_sidenet

TIMES = [1.0, 0.95, 0.8, 0.6, 0.3, 0.0]
CONDITIONAL_ONLY = [[], [0.7, -0.4], [], [0.5, 0.3, 0.1, -0.2, 0.6]]


def fitted(times=TIMES, **changes):
    generator = torch.Generator().manual_seed(1)
    rows = [
        (0.1 * torch.randn(2 + row // 2 + 2 * (row % 2), generator=generator)).tolist()
        for row in range(2 * len(times) - 3)
    ]
    return Schedule(
        times, **{"coefficients": rows, "cfg_coefficients": CONDITIONAL_ONLY, "analytic_first_step": True, **changes}
    )


def test_what_it_costs_is_what_the_field_counts():
    sidenet = small_sidenet(dtype=torch.float32, anchors=2, data_mean_size=2)
    for run in (
        fitted(),
        fitted(cfg_coefficients=()),
        fitted(analytic_first_step=False),
        Schedule(TIMES),
        fitted(coefficients=()),
    ):
        field = guided_field(2, Guidance(2.0), "combined")
        solve(field, sidenet, noise(2, 2, 4, 4, dtype=torch.float32), run)
        assert (field.calls, field.conditional_only, field.nfe) == (run.calls, run.conditional_only, run.nfe)
    assert [r.nfe for r in (fitted(), fitted(analytic_first_step=False), Schedule(TIMES))] == [3, 4, 5]
    assert describe_schedules({3: fitted()}) == (
        "3 model calls (5 steps, the first one analytic, 2 conditional-only calls, multistep coefficients)"
    )


def test_it_is_a_value():
    """Equal where its numbers are; hashable; and nobody can change it."""
    assert fitted() == fitted() and hash(fitted()) == hash(fitted()) and fitted() != Schedule(TIMES)
    with pytest.raises(AttributeError):
        fitted().times = TIMES
    tensors = Schedule(torch.tensor(TIMES, dtype=torch.float64), [torch.tensor(row) for row in fitted().coefficients])
    assert tensors.times == tuple(TIMES) and isinstance(tensors.coefficients[0], tuple)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"times": [1.0, 0.5, 0.5]}, "strictly descend"),
        ({"times": [1.0]}, "at least two times"),
        ({"times": [1.5, 0.0]}, r"must lie in \[0, 1\]"),
        ({"times": [1.0, float("nan")]}, r"must lie in \[0, 1\]"),
        ({"times": 5}, "sequences of numbers; got int"),
        ({"times": [0.9, 0.5, 0.0], "analytic_first_step": True}, "from pure noise, t = 1.*start at 0.9"),
        ({"times": TIMES, "coefficients": [[0.1]]}, "come in rows of"),
        ({"times": TIMES, "cfg_coefficients": [[], [0.1]]}, "come in as many rows"),
        (
            {"times": TIMES, "cfg_coefficients": [[], *CONDITIONAL_ONLY], "analytic_first_step": True},
            "CFG coefficients for 4 model calls",
        ),
        ({"times": TIMES, "rule": "legendre3"}, "include 0 and 1.*got legendre3"),
        ({"times": TIMES, "rule": 3}, "Unknown quadrature rule 3"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**parts)


def test_scaled_to_a_models_start_the_first_step_is_a_call():
    shrunk = fitted().scaled(0.98)
    assert shrunk.cfg_coefficients == fitted().cfg_coefficients and not shrunk.analytic_first_step and shrunk.nfe == 4
    assert list(shrunk.times) == pytest.approx([0.98 * t for t in TIMES])


def test_plain_times_start_analytically_where_the_step_is_short_and_the_mean_is_known():
    short, long = torch.tensor([1.0, 0.95, 0.5, 0.0]), torch.tensor([1.0, 0.5, 0.0])
    assert plain_schedule(short, has_data_mean=True).analytic_first_step
    assert not plain_schedule(short).analytic_first_step
    assert not plain_schedule(long, has_data_mean=True).analytic_first_step


class Counted:
    """A SideNet that counts how many samples it is asked for."""

    def __init__(self, sidenet):
        self.sidenet, self.anchors, self.asked = sidenet, 2, 0
        self.cfg_input, self.has_data_mean = sidenet.cfg_input, sidenet.has_data_mean
        self.analytic_velocity = sidenet.analytic_velocity

    def __call__(self, **inputs):
        self.asked += len(inputs["x"])
        return self.sidenet(**inputs)


def test_it_is_run_by_the_rule_that_it_was_fitted_for():
    """The trapezoid asks once a step, lobatto4 three times ahead and twice back; another rule is refused."""
    x, ends, asked = noise(1, 2, 4, 4, dtype=torch.float32), [], []
    field = guided_field(1, Guidance(2.0), "combined")
    for schedule, rule in ((fitted(rule="lobatto2"), None), (fitted(), None), (fitted(), "lobatto4")):
        sidenet = Counted(small_sidenet(dtype=torch.float32, anchors=2, data_mean_size=2))
        ends.append(solve(field, sidenet, x, schedule, rule=rule))
        asked.append(sidenet.asked)
    assert asked == [5, 5 * 3 + 4 * 2, 5 * 3 + 4 * 2]
    torch.testing.assert_close(ends[1], ends[2])
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)
    with pytest.raises(ValueError, match="fitted for the rule lobatto2; got lobatto4"):
        solve(field, sidenet, x, fitted(rule="lobatto2"), rule="lobatto4")
    assert {fitted(rule="lobatto2").with_times(TIMES).rule, fitted(rule="lobatto2").scaled(0.9).rule} == {"lobatto2"}


def test_files_keep_every_part(tmp_path):
    """The rule too, whether or not it is the usual one."""
    plain = Schedule([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    for run in (fitted(), fitted(rule="lobatto2")):
        card = SideNetCard("combined", (2.0, 2.0), schedules={2.0: {3: run, 5: plain}})
        save_sidenet(tmp_path / "a.safetensors", small_sidenet(anchors=2, data_mean_size=2), card)
        loaded = load_sidenet(tmp_path / "a.safetensors")[1]
        assert loaded == card and loaded.schedules[2.0][3].rule == run.rule


def test_a_schedule_of_tensors_is_one_of_numbers(tmp_path):
    """It can be compared, hashed and saved."""
    times = torch.tensor([1.0, 0.5, 0.25, 0.0])
    rows = [torch.full((2 + i // 2 + 2 * (i % 2),), 0.5) for i in range(5)]
    made, same = Schedule(times, rows), Schedule(times.tolist(), [row.tolist() for row in rows])
    assert made == same and hash(made) == hash(same) and made != Schedule(times)
    save_sidenet(tmp_path / "a.safetensors", small_sidenet(), SideNetCard(schedules={1.0: {3: made}}))
    assert load_sidenet(tmp_path / "a.safetensors")[1].schedules == {1.0: {3: same}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    """Neither times nor coefficients nor guidance are rounded to it."""
    rows = [[0.01] * (2 + i // 2 + 2 * (i % 2)) for i in range(2 * 4 - 1)]
    schedule = Schedule([1.0, 0.9408, 0.6, 0.3, 0.0], rows, [[], [], [0.1] * 4, [0.1] * 5])
    net, x = small_sidenet(anchors=2, cfg_input=True, dtype=torch.float32), noise(2, 2, 4, 4, dtype=torch.float32)

    def ends():
        fields = [guided_field(2, Guidance(2.0, where), mode) for where in ((0.0, 1.0), (0.1, 0.6))
                  for mode in ("per_branch", "combined")]  # fmt: skip
        return [solve(field, net, x, over) for field in fields for over in (schedule, time_grid(5, 3.0, 0.1))]

    expected = ends()
    torch.set_default_dtype(dtype)
    try:
        found = ends()
        assert schedule.grid[1] == torch.tensor(0.9408, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)


def test_a_cfg_scale_that_is_supported_has_schedules():
    """Wherever the file has any, whichever scale it was trained at."""
    four = {4: Schedule(time_grid(4))}
    for own in (1.0, 2.0, 4.0):
        card = SideNetCard(cfg_range=(2.0, 2.0), schedules={own: four})
        supported = [cfg for cfg in (0.5, 1.0, 2.0, 3.0, 5.9, 20.0) if card.supports_cfg(cfg)]
        assert supported and all(card.schedules_for(cfg) == four for cfg in supported)
        assert card.supports_cfg(own)
