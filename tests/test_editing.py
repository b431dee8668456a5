"""Editing: inversion at the solver's order, exact return, the mask's other side bit by bit, and the controls."""

import pytest
import torch
from ba_solver.bas_core import (
    Control,
    DivergedError,
    Guidance,
    NonFiniteError,
    edit,
    editing_grid,
    invert,
    model_field,
    reconstruct,
    solve,
    straight_trajectory,
    time_grid,
)
from ba_solver.bas_core.editing import mean_of_neighbours
from checks import (
    check_eta,
    check_exact_return,
    check_fade,
    check_flowedit_order,
    check_inversion_order,
    check_mask,
    check_order,
    edited,
    editing_case,
    guided_field,
    source_path,
)
from problems import (
    Oracle,
    class_velocity,
    exact_field,
    flow_map,
    labels,
    noise,
    small_sidenet,
    smooth_grid,
    state,
    uneven_grid,
)

START = 0.05
GRIDS = (2, 3, 5)


# --- inversion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sidenet", "order", "steps"),
    [(None, 2, (160, 320)), (Oracle(1), 6, (8, 16)), (Oracle(2), 6, (8, 16))],
    ids=["multistep", "one anchor", "two anchors"],
)
def test_inversion_reaches_the_noise_at_the_solvers_order(sidenet, order, steps):
    check_inversion_order(sidenet, order, steps)


@pytest.mark.parametrize(
    ("sidenet", "order", "steps"), [(None, 2, (160, 320)), (Oracle(1), 6, (8, 16))], ids=["multistep", "oracle"]
)
def test_forward_then_back_returns_to_the_image_at_the_solvers_order(sidenet, order, steps):
    """Back on another grid, twice as fine: on the same one the leading errors would cancel."""

    def there_and_back(x, up):
        noise_ = invert(exact_field(), sidenet, x, torch.cat([up.flip(0), torch.zeros(1).to(up)])).noise
        return solve(exact_field(), sidenet, noise_, smooth_grid(2 * (len(up) - 1), 1.0, START))

    def error(x, up):
        # A run from START to 1 and back ends where it started; `check_order` compares with the exact path's end.
        return there_and_back(x, up) - x + flow_map(x, up[0], up[-1])

    grid = uneven_grid if sidenet is None else smooth_grid
    check_order(error, order, [grid(n, START, 1.0) for n in steps])


@pytest.mark.parametrize("intervals", GRIDS)
def test_every_way_costs_as_many_calls_as_the_grid_has_intervals(intervals):
    times, source = smooth_grid(intervals), source_path("inversion", intervals=intervals)
    target = guided_field(2, Guidance(2.0))
    edit(target, small_sidenet(), source, Control(0.5))
    assert target.calls == intervals
    reconstruct(target, small_sidenet(), source)
    assert target.calls == 2 * intervals
    for make in (invert, lambda f, s, i, t: straight_trajectory(f, s, i, i, t)):
        field = exact_field()
        make(field, Oracle(), state(), times)
        assert field.calls == intervals


def test_the_model_is_never_read_at_zero_nor_below_the_start():
    times = editing_grid(time_grid(4, dtype=torch.float64), START)
    assert times.tolist() == pytest.approx([1, 0.7625, 0.525, 0.2875, 0.05, 0])
    asked = []

    def velocity(x, t):
        asked.append(float(t[0]))
        return -x

    source = invert(model_field(velocity), None, state(), times)
    edit(model_field(velocity), None, source)
    assert min(asked) == pytest.approx(START) and max(asked) == 1


def test_path_starts_at_the_noise_and_ends_at_the_image():
    image, z, times = noise(2, 2, 4, 4), noise(2, 2, 4, 4, seed=1), smooth_grid(4, 0.8)
    for make in (invert, lambda f, s, i, t: straight_trajectory(f, s, i, z, t)):
        source = make(guided_field(2, Guidance(2.0)), small_sidenet(), image, times)
        assert torch.equal(source.image, image) and source.noise is source.states[0]
        assert torch.equal(source.times, times) and len(source.states) == 5
        assert len(source.residuals) == 7  # two a step, and one for the last
    assert torch.equal(source.noise, 0.8 * z + (1 - times[0]) * image)
    mixed = invert(exact_field(), None, image, times, z)
    torch.testing.assert_close(mixed.states[-2], torch.lerp(image, z, float(times[-2])))


# --- exact return -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0), Guidance(3.0, (0.3, 0.75))], ids=["1", "2", "window"])
@pytest.mark.parametrize("anchors", [0, 1, 2], ids=["no SideNet", "one anchor", "two anchors"])
@pytest.mark.parametrize("kind", ["inversion", "straight"])
def test_return_is_exact_whatever_the_solvers_error(kind, anchors, guidance):
    for intervals in GRIDS:
        check_exact_return(kind, small_sidenet(anchors=anchors) if anchors else None, guidance, intervals)


def test_return_is_exact_to_sixty_decibels_in_single_precision():
    image, times = noise(2, 2, 8, 8, dtype=torch.float32).clamp(-1, 1), time_grid(5)
    sidenet = small_sidenet(dtype=torch.float32)
    field = guided_field(2, Guidance(2.0))
    back = edit(field, sidenet, invert(field, sidenet, image, times))
    assert 10 * torch.log10(4 / (back - image).square().mean()) > 100
    assert back.dtype == torch.float32


def test_plain_return_shows_the_solvers_error():
    """What `reconstruct` is for: it is `solve` from the path's noise, and not exact."""
    sidenet, field, source = editing_case("inversion")
    plain = reconstruct(field, sidenet, source)
    torch.testing.assert_close(plain, solve(field, sidenet, source.noise, source.times))
    torch.testing.assert_close(plain, edit(field, sidenet, source, Control(fade=0.0)))
    assert (plain - source.image).abs().max() > 1e-3


# --- mask and controller ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inversion", "straight"])
def test_outside_the_mask_the_image_is_untouched_bit_by_bit(kind):
    check_mask(kind)


def test_mask_of_ones_is_no_mask_and_soft_edges_lie_between():
    free, source = edited("inversion"), source_path("inversion")
    torch.testing.assert_close(edited("inversion", mask=torch.ones(1, 1, 4, 4)), free)
    soft = edited("inversion", mask=torch.full((1, 1, 4, 4), 0.5))
    nearer = (soft - source.image).abs().mean() / (free - source.image).abs().mean()
    assert 0.1 < nearer < 0.9


def test_eta_pulls_to_the_source_within_its_window():
    check_eta()


def test_residuals_fade_where_the_edit_acts():
    check_fade()
    assert Control(fade=1.0).residual_weight(torch.zeros(1, 2, 3, 4, 4)).shape == (1, 1, 3, 4, 4)


def test_fading_keeps_the_exact_return():
    sidenet, field, source = editing_case("inversion")
    torch.testing.assert_close(edit(field, sidenet, source, Control(fade=0.3)), source.image, rtol=1e-9, atol=1e-9)


def test_samples_of_a_batch_do_not_see_each_other():
    together = edited("inversion", batch=3)
    image, (cond, uncond), sidenet = noise(3, 2, 4, 4), labels(3), small_sidenet()
    for i in range(3):
        part, guidance = slice(i, i + 1), Guidance(2.0)
        own = model_field(class_velocity, cond[part], uncond[part], guidance)
        other = model_field(class_velocity, (cond[part] + 1) % 3, uncond[part], guidance)
        source = invert(own, sidenet, image[part], smooth_grid(4))
        torch.testing.assert_close(edit(other, sidenet, source), together[part], rtol=1e-10, atol=1e-10)


def test_chunks_do_not_change_the_result():
    sidenet, field, source = editing_case("inversion", batch=3)
    torch.testing.assert_close(edit(field, sidenet, source, chunk=4), edit(field, sidenet, source))


def straight(field, sidenet, image, times, callback):
    return straight_trajectory(field, sidenet, image, noise(2, 2, 4, 4), times, callback=callback)


@pytest.mark.parametrize(("make", "steps"), [(invert, 3), (straight, 4)])
def test_callbacks_see_every_step(make, steps):
    there, back, field = [], [], guided_field(2, Guidance(2.0))
    source = make(field, small_sidenet(), noise(2, 2, 4, 4), smooth_grid(4), callback=there.append)
    edit(field, small_sidenet(), source, callback=back.append)
    assert [(s.index, s.total) for s in there] == [(i, steps) for i in range(steps)]
    assert [(s.index, s.total) for s in back] == [(i, 4) for i in range(4)]
    assert all(s.denoised.isfinite().all() for s in (*there, *back))


# --- inversion-free editing ---------------------------------------------------------------------------------------


def test_inversion_free_editing_solves_flowedits_equation_at_second_order():
    check_flowedit_order()


def test_edits_change_the_image_toward_the_target():
    for kind in ("inversion", "straight"):
        assert (edited(kind) - source_path(kind).image).abs().mean() > 0.05


# --- bad input ----------------------------------------------------------------------------------------------------


def test_diverging_inversions_are_stopped_in_words():
    explosive = model_field(lambda x, t: 6.0 * x)
    with pytest.raises(DivergedError, match=r"step \d of 4, at t = .* times as large.*Lower the source guidance"):
        invert(explosive, None, state(), time_grid(5))
    invert(exact_field(), None, state(), time_grid(5))


def test_nan_is_named():
    with pytest.raises(NonFiniteError, match=r"Step 1 of 4, from t = 0.2: The backbone returned NaN"):
        invert(model_field(lambda x, t: x if t[0] < 0.4 else x * float("nan")), None, state(), time_grid(5))


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: invert(exact_field(), None, state(), time_grid(4).flip(0)), "must descend to 0"),
        (lambda: invert(exact_field(), None, state(), torch.tensor([1.0, 0.5])), "must descend to 0"),
        (lambda: invert(exact_field(), None, state(), time_grid(1)), "at least 2 intervals"),
        (lambda: invert(exact_field(), None, state(), time_grid(3), state()[:1]), "noise must have the image's shape"),
        (
            lambda: straight_trajectory(exact_field(), None, state(), state()[:1], time_grid(3)),
            "noise must have the image's",
        ),
        (lambda: invert(exact_field(), None, state() * float("nan"), time_grid(3)), "x must be finite"),
        (lambda: editing_grid(time_grid(3), 1.0), "start must lie between 0 and the grid's first time 1"),
        (lambda: editing_grid(time_grid(3), 0.0), "start must lie between 0"),
        (lambda: Control(eta=1.5), r"eta must lie in \[0, 1\]; got 1.5"),
        (lambda: Control(fade=-1), "fade must be a distance"),
        (lambda: Control(window=(0.9, 0.1)), "window"),
        (lambda: edited("inversion", mask=torch.zeros(1, 1, 4, 4)), "0 everywhere, so nothing may change"),
        (lambda: edited("inversion", mask=torch.ones(1, 1, 5, 4)), "must broadcast with the image"),
        (lambda: edited("inversion", mask=torch.full((1, 1, 4, 4), 2.0)), r"must lie in \[0, 1\]; got 2 to 2"),
    ],
)
def test_bad_input_is_refused_in_words(work, message):
    with pytest.raises(ValueError, match=message):
        work()


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (2, 1, 3, 5, 4)])
def test_the_mean_of_neighbours_is_a_pool_of_three(shape):
    x, pool = noise(*shape), torch.nn.functional.avg_pool2d if len(shape) == 4 else torch.nn.functional.avg_pool3d
    torch.testing.assert_close(mean_of_neighbours(x), pool(x, 3, 1, 1, count_include_pad=False))


def test_a_video_of_one_frame_fades_as_an_image_does():
    image = noise(2, 2, 4, 4)
    video = Control(fade=2.0).residual_weight(image[:, :, None])
    torch.testing.assert_close(video[:, :, 0], Control(fade=2.0).residual_weight(image))


def test_a_straight_trajectory_counts_its_own_calls():
    """A field that was used before counts on; a callback sees the calls of its sampling."""
    field, seen = guided_field(2, Guidance(2.0)), []
    for _ in range(2):
        image = noise(2, 2, 4, 4)
        straight_trajectory(field, None, image, image + 1, smooth_grid(3), callback=lambda s: seen.append(s.calls))
    assert seen == [1, 2, 3] * 2
