"""ComfyUI's samplers and ours from the same noise, each with the same number of model calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
from torch import Tensor

from ...training.baselines import run_baseline
from ..models.attach import applied_sidenet
from ..models.paths import SigmaSchedule, path_of
from ..sampling.sampler import Options, opened, sample_ba_solver
from ..sampling.schedule import sigmas_for
from ..say import warn
from .count import Count, counted, steps_for

OURS = "BA-Solver"
MULTISTEP = "BA-Solver, no SideNet"
LEARNED = "own"
REFERENCE = "adams_pec"


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        sampler, scheduler: which.
        asked, calls: model calls that were to be made, and that were.
        error: root-mean-square distance of its end from the converged one.
        seconds: a picture.
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
    """What came of one prompt.

    Attributes:
        rows: every run.
        reference: [B, C, *spatial] the converged end.
        own_error: how far it is from one of half the calls: no smaller error means anything.
    """

    rows: list[Row]
    reference: Tensor
    own_error: float


@dataclass(frozen=True)
class Job:
    """A sampler on a scheduler: its sigmas by steps, and whether steps are found by calls."""

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
        return lambda steps: known(model, steps, device, sampler, scheduler, 1.0).sigmas.cpu()

    jobs = [Job(n, s, comfy.samplers.sampler_object(n), grid(n, s)) for n in samplers for s in schedulers]
    multistep = comfy.samplers.KSAMPLER(sample_ba_solver, {"options": Options("multistep")})
    jobs += [Job(MULTISTEP, s, multistep, grid("euler", s)) for s in schedulers]
    sidenet = applied_sidenet(model)
    if sidenet is not None and sidenet.strength:
        sampling, analytic = model.get_model_object("model_sampling"), sidenet.has_data_mean
        schedules = sidenet.card.schedules_for(sidenet.card.cfg)
        jobs.append(
            Job(
                OURS,
                LEARNED,
                comfy.samplers.KSAMPLER(sample_ba_solver),
                lambda calls: sigmas_for(sampling, calls, 1.0, schedules, analytic),
                fitted=True,
            )
        )
    return jobs


class Comparing(comfy.samplers.Sampler):
    """A SAMPLER that runs all jobs, one after another, in one sampling of ComfyUI's.

    Args:
        jobs: from `jobs_for`.
        calls: numbers of model calls.
        reference: calls of the converged solution.
        told: sees the cost of each model call.
    """

    def __init__(self, jobs: Sequence[Job], calls: Sequence[int], reference: int, told: Callable[[float], Any]) -> None:
        self.jobs, self.calls, self.reference, self.told = jobs, calls, reference, told
        self.found: Comparison | None = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Called by ComfyUI's guiders; the arguments are theirs. Returns the converged end."""

        def converged(calls: int) -> Tensor:
            return self._converged(model_wrap, {**extra_args, "denoise_mask": denoise_mask}, noise, latent_image, calls)

        with counted(model_wrap, Count(told=self.told)):
            reference = converged(self.reference)
            own_error = _distance(reference, converged(max(1, self.reference // 2)))
        rows = []
        for calls in self.calls:
            for job in self.jobs:
                row = self._row(job, calls, model_wrap, extra_args, noise, latent_image, reference)
                rows += [row] if row else []
        self.found = Comparison(rows, reference.cpu(), own_error)
        return reference

    def _converged(
        self, guider: Any, extra_args: dict[str, Any], noise: Tensor, latent_image: Tensor, calls: int
    ) -> Tensor:
        sampling = guider.inner_model.model_sampling
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", calls)
        model = comfy.samplers.KSamplerX0Inpaint(guider, sigmas)
        model.latent_image, model.noise = latent_image, noise
        start = sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(guider, sigmas))
        schedule = SigmaSchedule.of(path_of(sampling), sigmas)
        with opened(model, extra_args, schedule, start, Options("multistep"), True) as on:
            x = schedule.path.to_flow(start, sigmas[0].to(start))
            end = run_baseline(REFERENCE, on.field, x, schedule.times)
        return sampling.inverse_noise_scaling(sigmas[-1], schedule.path.from_flow(end, sigmas[-1].to(end)))

    def _row(
        self,
        job: Job,
        calls: int,
        guider: Any,
        extra_args: dict[str, Any],
        noise: Tensor,
        latent_image: Tensor,
        reference: Tensor,
    ) -> Row | None:
        try:
            steps = calls if job.fitted else steps_for(guider, job.sampler, job.sigmas_of, noise, calls)[0]
        except ValueError as error:
            warn(f"{job.name} is left out at {calls} calls. {error}")
            return None
        count, began = Count(told=self.told), time.perf_counter()
        with counted(guider, count):
            end = job.sampler.sample(
                guider, job.sigmas_of(steps), dict(extra_args), None, noise, latent_image, None, True
            )
        seconds = (time.perf_counter() - began) / len(noise)
        return Row(job.name, job.scheduler, calls, count.calls, _distance(end, reference), seconds, end.cpu())


def _distance(x: Tensor, other: Tensor) -> float:
    return float((x - other).square().mean().sqrt())


def compare(
    guider: Any, latent: Tensor, seed: int, jobs: Sequence[Job], calls: Sequence[int], reference: int,
    told: Callable[[float], Any],
) -> Comparison:  # fmt: skip
    """Run every job from one noise.

    Args:
        guider: from `guider_for`.
        latent: [B, C, *spatial], empty.
        seed: of the noise.
        jobs, calls, reference, told: see `Comparing`.
    """
    sampler = Comparing(jobs, calls, reference, told)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", reference)
    guider.sample(comfy.sample.prepare_noise(latent, seed), latent, sampler, sigmas, disable_pbar=True, seed=seed)
    if sampler.found is None:
        raise RuntimeError("A node on the MODEL replaced the sampling, and nothing was compared.")
    found, process = sampler.found, guider.model_patcher.model.process_latent_out
    rows = [replace(row, end=process(row.end)) for row in found.rows]
    return Comparison(rows, process(found.reference), found.own_error)


def total_calls(jobs: Sequence[Job], calls: Sequence[int], reference: int, prompts: int) -> int:
    """How often the model will be called, about."""
    return prompts * (reference + reference // 2 + len(jobs) * sum(calls))
