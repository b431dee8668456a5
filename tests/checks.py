"""The numerical checks, as functions of the thing checked, so that `test_power.py` can give them damaged ones."""

from collections.abc import Callable

import pytest
import torch
from ba_solver.bas_core import (
    Control,
    Field,
    Guidance,
    Schedule,
    SideNetCard,
    edit,
    get_rule,
    invert,
    load_sidenet,
    model_field,
    save_sidenet,
    solve,
    straight_trajectory,
    time_grid,
)
from ba_solver.bas_core.files import CheckpointError, read_safetensors, write_safetensors
from ba_solver.training.baselines import Baseline, run_baseline
from problems import (
    Oracle,
    class_velocity,
    endpoint_error,
    exact_field,
    labels,
    noise,
    observed_order,
    seeded_multistep,
    small_sidenet,
    smooth_grid,
    state,
    uneven_grid,
)
from reference import naive_bi_anchor
from torch import Tensor

TOLERANCE = 0.15
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def check_order(run: Callable[[Tensor, Tensor], Tensor], order: int, grids: list[Tensor]) -> None:
    """The order between the finest two of the grids, each of which halves the steps of the one before."""
    errors = [endpoint_error(run, times) for times in grids]
    measured = observed_order(errors)[-1]
    assert abs(measured - order) <= TOLERANCE, f"order {measured:.2f} instead of {order}; errors {errors}"


def check_baseline_order(solver: Baseline, ends: tuple[float, float] = (1.0, 0.0)) -> None:
    """Multistep methods above order 2 are given their history, for a first step of order 1 limits them to 2."""

    def run(x: Tensor, times: Tensor) -> Tensor:
        if solver.order > 2 and solver.calls_per_step == 1:
            return seeded_multistep(solver.step, solver.order, x, times)
        return run_baseline(solver, exact_field(), x, times)

    check_order(run, solver.order, [uneven_grid(n, *ends) for n in (40, 80)])


def run_oracle(rule: str, anchors: int = 1, method: str = "bi_anchor", error: float = 0.0) -> Callable:
    return lambda x, times: solve(exact_field(), Oracle(anchors, error), x, times, rule=rule, method=method)


def check_oracle_order(rule: str, order: int, steps: tuple[int, ...], anchors: int = 1, **options) -> None:
    """With exact velocities in the SideNet's place, the order is the quadrature's degree of exactness plus one."""
    ends = options.pop("ends", (1.0, 0.0))
    check_order(run_oracle(rule, anchors, **options), order, [smooth_grid(n, *ends) for n in steps])


def check_calls(sidenet, method: str, intervals: int) -> None:
    """N intervals cost exactly N backbone calls."""
    field = exact_field()
    solve(field, sidenet, state(), smooth_grid(intervals), method=method)
    assert field.calls == intervals


def check_baseline_calls(solver: Baseline, intervals: int) -> None:
    field = exact_field()
    run_baseline(solver, field, state(), smooth_grid(intervals, 0.9, 0.1))
    assert field.calls == solver.first_calls + intervals * solver.calls_per_step


def check_refused_in_a_file(path, times, metadata: dict[str, str], message: str) -> None:
    """A SideNet's file with a run for 4 calls and damaged metadata is not loaded."""
    save_sidenet(path, small_sidenet(), SideNetCard(schedules={1.0: {4: Schedule(times)}}))
    tensors, intact = read_safetensors(path)
    write_safetensors(path, tensors, {**intact, **metadata})
    with pytest.raises(CheckpointError, match=message):
        load_sidenet(path)


def guided_field(batch: int, guidance: Guidance, mode: str = "per_branch"):
    return model_field(class_velocity, *labels(batch), guidance=guidance, mode=mode)


def check_independence(sidenet) -> None:
    """A batch is solved as its items are one by one."""
    x, (cond, uncond), guidance = noise(3, 2, 4, 4), labels(3), Guidance(2.0, (0.0, 0.7))
    together = solve(model_field(class_velocity, cond, uncond, guidance), sidenet, x, smooth_grid(4))
    for i in range(3):
        item = slice(i, i + 1)
        alone = solve(model_field(class_velocity, cond[item], uncond[item], guidance), sidenet, x[item], smooth_grid(4))
        torch.testing.assert_close(together[item], alone, **TIGHT)


def check_chunking(sidenet, chunk: int) -> None:
    """The result does not depend on how the SideNet calls are cut up."""
    x, guidance = noise(3, 2, 4, 4), Guidance(2.0, (0.0, 0.7))
    whole, cut = (solve(guided_field(3, guidance), sidenet, x, smooth_grid(3), chunk=size) for size in (None, chunk))
    torch.testing.assert_close(cut, whole, **TIGHT)


def check_matches_naive(rule: str, anchors: int, times: Tensor, guidance: Guidance, seed: int = 0) -> None:
    """The solver computes what PAPER.md section 2 says, written out without batching or savings."""
    sidenet = small_sidenet(seed, anchors=anchors)
    x, classes = noise(2, 2, 4, 4, seed=seed), labels(2)
    got = solve(guided_field(2, guidance), sidenet, x, times, rule=rule)
    quadrature = get_rule(rule)
    expected = naive_bi_anchor(
        class_velocity,
        sidenet,
        x,
        times.tolist(),
        (quadrature.nodes, quadrature.weights),
        classes,
        (guidance.scale, guidance.interval),
    )
    torch.testing.assert_close(got, expected, **TIGHT)


def check_test_field_tells_branches_apart() -> None:
    """The classes and branches of the test field differ, or the checks above would show nothing."""
    x, (cond, uncond) = noise(3, 2, 4, 4), labels(3)
    t = torch.full((3,), 0.5, dtype=torch.float64)
    apart = (class_velocity(x, t, cond) - class_velocity(x, t, uncond)).abs().mean((1, 2, 3))
    assert apart.min() > 0.1


# --- editing ------------------------------------------------------------------------------------------------------


def check_inversion_order(sidenet, order: int, steps: tuple[int, ...]) -> None:
    """The noise that an image at t = 0.05 is taken to, against the exact path's state at t = 1."""

    def run(x: Tensor, up: Tensor) -> Tensor:
        return invert(exact_field(), sidenet, x, torch.cat([up.flip(0), torch.zeros(1).to(up)])).noise

    grid = uneven_grid if sidenet is None else smooth_grid
    check_order(run, order, [grid(n, 0.05, 1.0) for n in steps])


def source_path(kind: str, batch: int = 2, sidenet=None, guidance: Guidance = Guidance(2.0), intervals: int = 4):  # noqa: B008
    """A path of either kind to random images, of their own classes."""
    sidenet, field = sidenet or small_sidenet(), guided_field(batch, guidance)
    image, times = noise(batch, 2, 4, 4), smooth_grid(intervals)
    if kind == "inversion":
        return invert(field, sidenet, image, times)
    return straight_trajectory(field, sidenet, image, noise(batch, 2, 4, 4, seed=1), times)


def editing_case(kind: str, batch: int = 2):
    """SideNet, the source's field, and its path."""
    return small_sidenet(), guided_field(batch, Guidance(2.0)), source_path(kind, batch)


def edited(kind: str, control: Control = Control(), mask: Tensor | None = None, batch: int = 2) -> Tensor:  # noqa: B008
    """The images of `source_path` as the next class."""
    cond, uncond = labels(batch)
    target = model_field(class_velocity, (cond + 1) % 3, uncond, Guidance(2.0))
    return edit(target, small_sidenet(), source_path(kind, batch), control, mask)


def check_exact_return(kind: str, sidenet, guidance: Guidance, intervals: int) -> None:
    """Under its own condition, a path ends in its image up to rounding, while the plain solver's return does not."""
    field, image, times = guided_field(2, guidance), noise(2, 2, 4, 4), smooth_grid(intervals)
    if kind == "inversion":
        source = invert(field, sidenet, image, times)
    else:
        source = straight_trajectory(field, sidenet, image, noise(2, 2, 4, 4, seed=1), times)
    torch.testing.assert_close(edit(field, sidenet, source), image, **TIGHT)
    plain = edit(field, sidenet, source, Control(fade=0.0))
    assert (plain - image).abs().max() > 1e-3, "the case must need its residuals"


def check_mask(kind: str) -> None:
    """Where the mask is 0 the image comes back bit by bit; where it is 1 it changes."""
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask[..., :2] = 1
    out, image = edited(kind, mask=mask), source_path(kind).image
    assert torch.equal(out[..., 2:], image[..., 2:]), "outside"
    assert (out - image)[..., :2].abs().mean() > 0.05, "inside"


def check_eta() -> None:
    """eta = 1 follows the source wherever its window is; eta between, in between; outside the window nothing."""
    image, free = source_path("inversion").image, edited("inversion")
    torch.testing.assert_close(edited("inversion", Control(1.0)), image, **TIGHT)
    torch.testing.assert_close(edited("inversion", Control(1.0, (0.98, 1.0))), free, **TIGHT)
    torch.testing.assert_close(edited("inversion", Control(1.0, (0.0, 0.01))), image, **TIGHT)
    distances = [(edited("inversion", Control(eta, (0.3, 1.0))) - image).abs().mean() for eta in (0.0, 0.5, 1.0)]
    assert distances[0] > distances[1] > distances[2] > 0


def check_flowedit_order() -> None:
    """Editing on the straight path solves dz/dt = v_target(z + x_t - x_0, t) - v_source(x_t, t) at order 2."""
    image, z = noise(2, 2, 4, 4), noise(2, 2, 4, 4, seed=1)
    cond, _ = labels(2)
    own, other = (model_field(class_velocity, (cond + shift) % 3) for shift in (0, 1))

    def difference(x: Tensor, t: Tensor, count: int) -> Tensor:
        line = torch.lerp(image, z, float(t[0]))
        return (other(x + line - image, t[0])[0] - own(line, t[0])[0])[None]

    exact = run_baseline("rk4", Field(difference), image, time_grid(200, dtype=torch.float64))

    def run(intervals: int) -> float:
        times = uneven_grid(intervals)
        out = edit(other, None, straight_trajectory(own, None, image, z, times))
        return (out - exact).square().mean().sqrt().item()

    measured = observed_order([run(80), run(160)])[-1]
    assert abs(measured - 2) <= TOLERANCE, f"order {measured:.2f} instead of 2"


def check_fade() -> None:
    """Residuals fade with the distance from the source path: near it they act as without fading, far from it not."""
    for fade, like in ((1e9, None), (1e-9, 0.0)):
        torch.testing.assert_close(
            edited("inversion", Control(fade=fade)), edited("inversion", Control(fade=like)), rtol=1e-6, atol=1e-6
        )
    share = Control(fade=2.0).residual_weight(torch.ones(1, 2, 4, 4).cumsum(-1) - 1)
    expected = 1 - torch.tensor([0.5, 5 / 3, 14 / 3, 6.5]).sqrt() / 2
    torch.testing.assert_close(share, expected.clamp_min(0).expand(1, 1, 4, 4))
