"""ComfyUI's samplers and BA-Solver from the same noise, each with the same number of model calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...training.baselines import run_baseline
from ..models.attach import applied_sidenet
from ..models.parameterization import SigmaSchedule, parameterization_of
from ..notify import warn
from ..sampling.callback_sampler import CallbackSampler, Prepared
from ..sampling.sampler import MULTISTEP, Options, open_solver, sample_ba_solver
from ..sampling.schedule import path_schedules, sigmas_for
from .call_counter import CallCounter, counting, steps_for

OURS = "BA-Solver"
WITHOUT_SIDENET = "BA-Solver, no SideNet"
LEARNED = "own"
REFERENCE = "adams_pec"


@dataclass(frozen=True)
class Row:
    """One sampling.

    Attributes:
        sampler, scheduler: their names.
        asked, calls: model calls allowed, and made.
        error: root-mean-square distance of its end from the converged one.
        seconds: per picture.
        end: [B, C, *spatial], the model's latent, on the CPU.
    """

    sampler: str
    scheduler: str
    asked: int
    calls: float
    error: float
    seconds: float
    end: Tensor


@dataclass(frozen=True)
class Comparison:
    """The samplings of one prompt.

    Attributes:
        rows: one a sampling.
        reference: [B, C, *spatial] the converged end.
        own_error: its distance from one of half the calls; errors below it mean nothing.
    """

    rows: list[Row]
    reference: Tensor
    own_error: float


@dataclass(frozen=True)
class Job:
    """A sampler on a scheduler.

    Attributes:
        name, scheduler: their names.
        sampler: ComfyUI's SAMPLER.
        sigmas_of: its sigmas, by number of steps.
        fitted: its sigmas are by number of model calls instead.
    """

    name: str
    scheduler: str
    sampler: Any
    sigmas_of: Callable[[int], Tensor]
    fitted: bool = False


def jobs_for(model: Any, samplers: Sequence[str], schedulers: Sequence[str]) -> list[Job]:
    """Every sampler on every scheduler, the multistep method, and BA-Solver where the MODEL has a SideNet.

    Raises:
        ValueError: ComfyUI has no such sampler or scheduler; the message lists those that it has.
    """
    known = comfy.samplers.KSampler
    for what, asked, there in (("sampler", samplers, known.SAMPLERS), ("scheduler", schedulers, known.SCHEDULERS)):
        strange = [name for name in asked if name not in there]
        if strange or not asked:
            raise ValueError(f"ComfyUI has no {what} {(strange or [''])[0]!r}. It has: {', '.join(there)}.")
    if "ba_solver" in samplers:
        raise ValueError("BA-Solver is always compared. Leave 'ba_solver' out of the samplers.")

    def grid(sampler: str, scheduler: str) -> Callable[[int], Tensor]:
        device = comfy.model_management.get_torch_device()
        return lambda steps: known(model, steps, device, sampler, scheduler, 1.0).sigmas

    jobs = [Job(n, s, comfy.samplers.sampler_object(n), grid(n, s)) for n in samplers for s in schedulers]
    multistep = comfy.samplers.KSAMPLER(sample_ba_solver, {"options": Options(MULTISTEP)})
    jobs += [Job(WITHOUT_SIDENET, s, multistep, grid("euler", s)) for s in schedulers]
    sidenet = applied_sidenet(model)
    if sidenet is not None:
        sidenet.card.check_whole_path(sidenet.name)
        model_sampling, schedules = model.get_model_object("model_sampling"), path_schedules(model)
        jobs.append(
            Job(
                OURS,
                LEARNED,
                comfy.samplers.KSAMPLER(sample_ba_solver),
                lambda calls: sigmas_for(model_sampling, calls, 1.0, schedules),
                fitted=True,
            )
        )
    return jobs


def compare(
    guider: Any, latent: Tensor, seed: int, jobs: Sequence[Job], calls: Sequence[int], reference: int,
    on_call: Callable[[float], Any],
) -> Comparison:  # fmt: skip
    """Sample every job from one noise, all in one sampling of ComfyUI's.

    Args:
        guider: from `guider_for`.
        latent: [B, C, *spatial], empty.
        seed: of the noise.
        jobs: from `jobs_for`.
        calls: numbers of model calls.
        reference: model calls of the converged solution.
        on_call: is given the NFE of each model call, 1 or 0.5.
    """
    found: list[Comparison] = []

    def run(prepared: Prepared) -> Tensor:
        with counting(prepared.model.inner_model, CallCounter(on_call=on_call)):
            converged, half = (_converged(prepared, steps) for steps in (reference, max(1, reference // 2)))
        rows = [_row(job, n, prepared, converged, on_call) for n in calls for job in jobs]
        found.append(Comparison([row for row in rows if row], converged.cpu(), _distance(converged, half)))
        return converged

    model_sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, "simple", reference)
    noise = comfy.sample.prepare_noise(latent, seed)
    guider.sample(noise, latent, CallbackSampler(run), sigmas, disable_pbar=True, seed=seed)
    if not found:
        raise RuntimeError("A node on the MODEL replaced the sampling, and nothing was compared.")
    process = guider.model_patcher.model.process_latent_out
    rows = [replace(row, end=process(row.end)) for row in found[0].rows]
    return replace(found[0], rows=rows, reference=process(found[0].reference))


def _converged(prepared: Prepared, steps: int) -> Tensor:
    """The end of a fine multistep sampling."""
    model = prepared.model
    guider, noise = model.inner_model, model.noise
    model_sampling = guider.inner_model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, "simple", steps)
    top = comfy.samplers.Sampler().max_denoise(guider, sigmas)
    start = model_sampling.noise_scaling(sigmas[0], noise, model.latent_image, top)
    schedule = SigmaSchedule.of(parameterization_of(model_sampling), sigmas)
    with open_solver(model, prepared.extra_args, schedule, start, Options(MULTISTEP), True) as solver:
        x = schedule.parameterization.to_flow(start, sigmas[0].to(start))
        end = run_baseline(REFERENCE, solver.field, x, schedule.times)
    state = schedule.parameterization.from_flow(end, sigmas[-1].to(end))
    return model_sampling.inverse_noise_scaling(sigmas[-1], state)


def _row(job: Job, calls: int, prepared: Prepared, reference: Tensor, on_call: Callable[[float], Any]) -> Row | None:
    """A sampling; None for a sampler that has no end or fails, which is noted."""
    model, options = prepared.model, prepared.extra_args
    guider, noise = model.inner_model, model.noise
    extra_args = {key: value for key, value in options.items() if key != "denoise_mask"}  # the sampler adds its own
    counter = CallCounter(on_call=on_call)

    def sigmas_of(steps: int) -> Tensor:
        return job.sigmas_of(steps).to(noise.device)

    try:
        sigmas = sigmas_of(calls if job.fitted else steps_for(guider, job.sampler, sigmas_of, noise, calls))
        began = time.perf_counter()
        with counting(guider, counter):
            end = job.sampler.sample(guider, sigmas, extra_args, None, noise, model.latent_image, None, True)
        stored = end.cpu()  # waits for the device
        seconds = (time.perf_counter() - began) / len(noise)
    except (comfy.model_management.InterruptProcessingException, torch.cuda.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        warn(f"{job.name} is left out at {calls} calls. {error}")
        return None
    return Row(job.name, job.scheduler, calls, counter.nfe, _distance(end, reference), seconds, stored)


def _distance(x: Tensor, other: Tensor) -> float:
    return float((x - other).square().mean().sqrt())


def total_calls(jobs: Sequence[Job], calls: Sequence[int], reference: int, prompts: int) -> int:
    """About how often the model will be called."""
    return prompts * (reference + reference // 2 + len(jobs) * sum(calls))
