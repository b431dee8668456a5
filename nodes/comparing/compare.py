"""ComfyUI's samplers and BA-Solver from the same noise, each with the same number of model calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...training.baselines import run_baseline
from ...training.recording.repeatable import ASKED, Call, check_repeatable, remembering
from ..models.attach import applied_sidenet
from ..models.parameterization import SigmaSchedule, parameterization_of
from ..notify import warn
from ..sampling.callback_sampler import CallbackSampler, Prepared
from ..sampling.rewind import refuse_cache
from ..sampling.sampler import MULTISTEP, Options, open_solver, sample_ba_solver
from ..sampling.schedule import path_schedules, sigmas_for
from ..sampling.start import Latent, noised
from .call_counter import CallCounter, CountedSampler, Run, steps_for

Result = TypeVar("Result")

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


# A job, a number of model calls, and the sigmas with which it makes them.
Planned = tuple[Job, int, Tensor]


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
        return lambda steps: known(model, steps, model.load_device, sampler, scheduler, 1.0).sigmas

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
    guider: Any, latent: Latent, seed: int, jobs: Sequence[Job], calls: Sequence[int], reference: int,
    on_call: Callable[[float], Any],
) -> Comparison:  # fmt: skip
    """Sample every job from one noise, each in a sampling of ComfyUI's own, as KSampler would.

    Args:
        guider: from `guider_for`.
        latent: what the samplings start from beside the noise.
        seed: of the noise.
        jobs: from `jobs_for`.
        calls: numbers of model calls.
        reference: model calls of the converged solution.
        on_call: is given the NFE of each model call, 1 or 0.5.

    Raises:
        UsageError: the model does not answer the same question alike.
        ValueError: a cache is on the MODEL.
    """
    refuse_cache(guider.model_patcher, "Compare Solvers")
    model, noise = guider.model_patcher, latent.noise(seed)
    model_sampling = model.get_model_object("model_sampling")

    def sample(sampler: Any, sigmas: Tensor) -> Run:
        counted = CountedSampler(sampler, CallCounter(on_call=on_call))
        guider.sample(noise, latent.samples, counted, sigmas, latent.mask, disable_pbar=True, seed=seed)
        run = counted.run
        if run.end.shape != noise.shape:
            raise ValueError(f"Its picture has another size, {tuple(run.end.shape)}.")
        return run

    def converged(steps: int, checked: bool) -> Tensor:
        sigmas = comfy.samplers.calculate_sigmas(model_sampling, "simple", steps)
        return sample(CallbackSampler(lambda prepared: _converged(prepared, sigmas, checked)), sigmas).end

    planned: list[Planned] = []

    def plan(prepared: Prepared) -> Tensor:
        planned.extend(_plan(prepared, jobs, calls))
        return cast(Tensor, prepared.model.noise)

    truth, half = converged(reference, True), converged(max(1, reference // 2), False)
    guider.sample(
        noise, latent.samples, CallbackSampler(plan), torch.ones(2), latent.mask, disable_pbar=True, seed=seed
    )
    process, rows = model.model.process_latent_out, []
    for job, asked, sigmas in planned:
        run = _or_note(job, asked, partial(sample, job.sampler, sigmas))
        if run is not None:
            error, seconds = _distance(run.end, truth), run.seconds / len(noise)
            rows.append(Row(job.name, job.scheduler, asked, run.nfe, error, seconds, process(run.end)))
    return Comparison(rows, process(truth), _distance(truth, half))


def _converged(prepared: Prepared, sigmas: Tensor, checked: bool) -> Tensor:
    """The end of a fine multistep sampling; `checked`: whether the model answers the same question alike."""
    model = prepared.model
    guider, model_sampling = model.inner_model, model.inner_model.inner_model.model_sampling
    top = comfy.samplers.Sampler().max_denoise(guider, sigmas)
    start = noised(model_sampling, sigmas[0], model.noise, model.latent_image, top)
    schedule = SigmaSchedule.of(parameterization_of(model_sampling), sigmas)
    options, made = Options(MULTISTEP), list[Call]()
    with open_solver(model, prepared.extra_args, schedule, start, options, True, rewinds=True) as solver:
        field = remembering(solver.field, made) if checked else solver.field
        x = schedule.parameterization.to_flow(start, sigmas[0].to(start))
        end = run_baseline(REFERENCE, field, x, schedule.times)
        if checked:
            check_repeatable(field, made, x.device)
    state = schedule.parameterization.from_flow(end, sigmas[-1].to(end))
    end = model_sampling.inverse_noise_scaling(sigmas[-1], state)
    return end


def _plan(prepared: Prepared, jobs: Sequence[Job], calls: Sequence[int]) -> Iterator[Planned]:
    """The samplings to make: each job with each number of model calls."""
    guider, noise = prepared.model.inner_model, prepared.model.noise
    for asked, job in itertools.product(calls, jobs):

        def sigmas_of(steps: int, job: Job = job) -> Tensor:
            return job.sigmas_of(steps).to(noise.device)

        def steps(job: Job = job, asked: int = asked) -> int:
            return asked if job.fitted else steps_for(guider, job.sampler, sigmas_of, noise, asked)

        found = _or_note(job, asked, steps)
        if found is not None:
            yield job, asked, job.sigmas_of(found)


def _or_note(job: Job, asked: int, work: Callable[[], Result]) -> Result | None:
    """The result of some work; None for a sampler that has no end or fails, which is noted."""
    try:
        return work()
    except (comfy.model_management.InterruptProcessingException, torch.cuda.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        warn(f"{job.name} is left out at {asked} calls. {error}")
        return None


def _distance(x: Tensor, other: Tensor) -> float:
    return float((x - other).square().mean().sqrt())


def total_calls(jobs: Sequence[Job], calls: Sequence[int], reference: int, prompts: int) -> int:
    """About how often the model will be called."""
    return prompts * (reference + ASKED + reference // 2 + len(jobs) * sum(calls))
