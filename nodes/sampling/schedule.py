"""Which schedule a sampling follows, and sigmas for a number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ...bas_core.grids import grid_between
from ...bas_core.schedule import Schedule, describe_schedule
from ...bas_core.selection import select_part, select_schedule, spread
from ..models.attach import LoadedSideNet, applied_sidenet
from ..models.parameterization import SigmaSchedule, flow_time, parameterization_of

# Schedulers start a little below the model's largest sigma, and end a little above 0, by rounding or by design.
WHOLE_FROM, WHOLE_UNTIL = 0.98, 1e-4
# Schedulers have no sigma just where a SideNet's part of the path starts or ends. So near, as a share of its length,
# its schedules are moved to where the sampling does.
NEAR = 0.1


@dataclass(frozen=True)
class Circumstances:
    """What a sampling allows a schedule to do.

    Attributes:
        no_analytic_step: why the first step cannot be analytic; empty = it can.
        conditional_only: whether model calls may leave out the negative.
        full_cfg: whether CFG applies to the whole path, as it does in fitting.
    """

    no_analytic_step: str = ""
    conditional_only: bool = True
    full_cfg: bool = True


@dataclass(frozen=True)
class Place:
    """Where a sampling lies in the part of the path that a SideNet is for, which for most is the whole.

    Attributes:
        inside: whether it does not leave the part.
        fills: whether it goes from the part's start to its end.
        first, last: flow times of these.
    """

    inside: bool
    fills: bool
    first: float
    last: float

    def of(self, t: float) -> float:
        """A flow time as the part's schedules count it: 1 at its start and 0 at its end."""
        return min(1.0, max(0.0, (t - self.last) / (self.first - self.last)))


def place_of(part: tuple[float, float], start: float, end: float, highest: float) -> Place:
    """The place of a sampling from one flow time to another.

    Args:
        part: see `SideNetCard`.
        start, end: flow times.
        highest: the flow time at which the model's sampling starts.
    """
    first, last = (highest * share for share in part)
    near = NEAR * (first - last)
    at_start = start >= WHOLE_FROM * highest if part[0] == 1 else abs(start - first) <= near
    at_end = end <= WHOLE_UNTIL if part[1] == 0 else abs(end - last) <= near
    inside = (part[0] == 1 or start <= first + near) and end >= last - near
    return Place(inside, at_start and at_end, first, last)


def schedule_for(
    sidenet: LoadedSideNet | None, given: SigmaSchedule, highest: float, cfg: float | None, circumstances: Circumstances
) -> tuple[Schedule, str]:
    """The schedule of a sampling from the first to the last of the given sigmas, in at most as many model calls as
    these have steps; and a sentence on it for the log.

    Args:
        sidenet: None = multistep, on the given sigmas.
        given: the scheduler's sigmas.
        highest: the flow time at which the model's sampling starts.
        cfg: see `known_guidance`.
        circumstances: what may be done.
    """
    times, steps = given.times, len(given.times) - 1
    if sidenet is None:
        return Schedule(times.tolist()), "the scheduler's times"
    schedules = sidenet.card.own_schedules if cfg is None else sidenet.card.schedules_for(cfg)
    if not schedules:
        return Schedule(times.tolist()), "the scheduler's times (the SideNet's file holds no schedules)"
    start, end = float(times[0]), float(times[-1])
    place = place_of(sidenet.card.part, start, end, highest)
    if not place.fills:
        share = select_part(schedules, place.of(start), place.of(end), steps)
        inner = grid_between(torch.tensor(share.times[1:-1]), place.first, place.last).tolist()
        return Schedule([start, *inner, end]), "part of the path, on its share of the fitted times"
    if not circumstances.full_cfg:
        return Schedule(spread(schedules, steps).tolist()).scaled(start, end), "the fitted times (CFG in a range)"
    analytic = not circumstances.no_analytic_step and sidenet.has_data_mean and start == 1
    found = select_schedule(schedules, steps, analytic=analytic, conditional_only=circumstances.conditional_only)
    text = f"the fitted schedule of {describe_schedule(found)}" if found.fitted else "plain steps on the fitted times"
    if circumstances.no_analytic_step and any(schedule.analytic_first_step for schedule in schedules.values()):
        text += f"; a model call for the first step, because {circumstances.no_analytic_step}"
    if not sidenet.card.whole_path:
        text += f", over {sidenet.card.describe_part()}"
    return found.scaled(start, end if place.last else 0.0), text


def path_schedules(model: Any) -> Mapping[int, Schedule]:
    """The schedules for the whole path, by number of model calls, of the SideNet on a MODEL; none without such."""
    sidenet = applied_sidenet(model)
    return sidenet.card.own_schedules if sidenet is not None and sidenet.card.whole_path else {}


def sigmas_for(model_sampling: Any, steps: int, denoise: float, schedules: Mapping[int, Schedule]) -> Tensor:
    """The last `steps` + 1 sigmas of a schedule long enough to start at the noise level that `denoise` asks for.

    Args:
        model_sampling: the MODEL's.
        steps: model calls.
        denoise: in (0, 1]; the whole schedule has steps / denoise steps, as in ComfyUI's own schedulers.
        schedules: the SideNet's, by number of model calls; without any, the sigmas are those of *simple*.

    Raises:
        ValueError: the MODEL is neither a flow nor a diffusion model.
    """
    total = max(steps, int(steps / denoise))
    if not schedules:
        whole = comfy.samplers.calculate_sigmas(model_sampling, "simple", total)
    else:
        whole = _sigmas_of(model_sampling, spread(schedules, total))
    return whole[-(steps + 1) :].cpu()


def _sigmas_of(model_sampling: Any, times: Tensor) -> Tensor:
    """Sigmas of flow times, shrunk for diffusion models, which start below t = 1, at their largest sigma."""
    parameterization = parameterization_of(model_sampling)
    shrink = min(1.0, flow_time(model_sampling, model_sampling.sigma_max) / float(times[0]))
    return parameterization.sigmas(times.double() * shrink).clamp(max=float(model_sampling.sigma_max)).float()
