"""What the solver needs of a SideNet, and how a step asks for velocities: all of a phase in one SideNet batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from .flow import per_sample
from .guidance import Field, NonFiniteError


class SideNetProtocol(Protocol):
    """What the solver needs of a SideNet; `sidenet.SideNet` is one. A wrapper has to have every member.

    Attributes:
        anchors: 1 (the paper) or 2; how many model calls a prediction is made from.
        cfg_input: whether it takes the CFG scale as an input.
        has_data_mean: whether it keeps the mean of the model's data, for an analytic first step.
    """

    @property
    def anchors(self) -> int: ...
    @property
    def cfg_input(self) -> bool: ...
    @property
    def has_data_mean(self) -> bool: ...

    def __call__(
        self,
        *,
        x: Tensor,
        v: Tensor,
        t: Tensor,
        h: Tensor,
        cond: Tensor | None,
        slope: Tensor | None,
        span: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        """The change of velocity from t to t - h; see `SideNet.forward`. `slope` and `span` are None for one anchor,
        `scale` without `cfg_input`."""
        ...

    def analytic_velocity(self, x: Tensor, t: float) -> Tensor:
        """The velocity at pure noise, straight to the data mean; asked for where `has_data_mean`."""
        ...


MEMBERS = ("anchors", "cfg_input", "has_data_mean", "analytic_velocity", "__call__")


def check_sidenet(sidenet: object) -> SideNetProtocol:
    """The same object, if it is a `SideNetProtocol`.

    Raises:
        TypeError: it lacks a member, as wrappers such as `DataParallel` do; the message names the member.
    """
    missing = [name for name in MEMBERS if not hasattr(sidenet, name)]
    if missing:
        raise TypeError(
            f"{type(sidenet).__name__} lacks {', '.join(missing)}, which the solver needs of a SideNet. A wrapper of a "
            "SideNet has to pass these on (prediction.SideNetProtocol)."
        )
    return cast(SideNetProtocol, sidenet)


class StraightLine:
    """The SideNet whose output is zero: velocities on the straight line through two anchors.

    With it the bi-anchor solver is the Adams-Bashforth 2 / trapezoid predictor-corrector, one model call a step.
    """

    anchors = 2
    cfg_input = False
    has_data_mean = False

    def __call__(self, *, h: Tensor, slope: Tensor | None, **_: Any) -> Tensor:
        """See `SideNetProtocol`."""
        line = cast(Tensor, slope)
        return line * per_sample(h, line)

    def analytic_velocity(self, x: Tensor, t: float) -> Tensor:
        """There is no data mean.

        Raises:
            ValueError: always.
        """
        raise ValueError("The multistep method keeps no data mean, so its first step is not analytic.")


class Anchor(NamedTuple):
    """A point of the trajectory where the model was called.

    Attributes:
        x: [B, C, *spatial] state.
        v: [K, B, C, *spatial] branches of the velocity there.
        t: its time.
    """

    x: Tensor
    v: Tensor
    t: float


class Query(NamedTuple):
    """A velocity to predict: at `time`, from the anchor `near`, with `far` as the second anchor if there is one."""

    near: Anchor
    far: Anchor | None
    time: float


def predict(
    sidenet: SideNetProtocol, queries: Sequence[Query], field: Field, branches: int, chunk: int | None = None
) -> Sequence[Tensor]:
    """Answer all queries of a phase in one SideNet batch.

    Args:
        sidenet: see `SideNetProtocol`.
        queries: M of them.
        field: for the branches' conditions and the CFG scale.
        branches: K, how many branches to predict.
        chunk: largest number of samples in one SideNet call; None = all M K B at once.

    Returns:
        M velocities [K, B, C, *spatial].

    Raises:
        NonFiniteError: the SideNet returned NaN or infinity.
    """
    if isinstance(sidenet, StraightLine):
        return [_on_line(query, branches) for query in queries]
    near = [q.near for q in queries]
    batch = near[0].x.shape[0]
    x = torch.cat([a.x for a in near for _ in range(branches)])
    v = torch.cat([a.v[:branches].flatten(0, 1) for a in near])

    def column(values: Sequence[float]) -> Tensor:
        return torch.cat([x.new_full((branches * batch,), value) for value in values])

    two = sidenet.anchors == 2
    inputs: dict[str, Tensor | None] = {
        "x": x,
        "v": v,
        "t": column([a.t for a in near]),
        "h": column([q.near.t - q.time for q in queries]),
        "cond": _conditions(field, branches, len(queries)),
        "slope": torch.cat([_slope(q, branches).flatten(0, 1) for q in queries]) if two else None,
        "span": column([q.near.t - q.far.t if q.far else 0.0 for q in queries]) if two else None,
        "scale": column([field.scale] * len(queries)) if sidenet.cfg_input else None,
    }
    size = chunk or len(x)
    changes = [
        sidenet(**{name: value if value is None else value[i : i + size] for name, value in inputs.items()})  # type: ignore[arg-type]
        for i in range(0, len(x), size)
    ]
    change = changes[0] if len(changes) == 1 else torch.cat(changes)
    field.finite.see(change, _sidenet_fault)
    return (v + change).unflatten(0, (len(queries), branches, batch)).unbind()


def _sidenet_fault(bad: int) -> NonFiniteError:
    return NonFiniteError(
        "The SideNet returned NaN or infinity. Run it in float32 or bfloat16, and check that it was made for this "
        "model."
    )


def _on_line(query: Query, branches: int) -> Tensor:
    """The velocity [K, B, C, *spatial] on the straight line through both anchors; without a second one, the first's."""
    near, far = query.near, query.far
    if far is None or near.t == far.t:
        return near.v[:branches]
    return torch.lerp(near.v[:branches], far.v[:branches], (query.time - near.t) / (far.t - near.t))


def _conditions(field: Field, branches: int, queries: int) -> Tensor | None:
    conditions = [c for c in field.conditions[:branches] if c is not None]
    return torch.cat(conditions * queries) if conditions else None


def _slope(query: Query, branches: int) -> Tensor:
    """(v_near - v_far) / (t_far - t_near): the change of v for a step h toward the data, per unit of h."""
    near, far = query.near, query.far
    if far is None or near.t == far.t:
        return torch.zeros_like(near.v[:branches])
    return (far.v[:branches] - near.v[:branches]) / (near.t - far.t)
