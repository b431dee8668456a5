"""The nodes BA-Solver Sampler and BA-Solver Scheduler."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from comfy_api.v0_0_2 import io
from comfy_extras.nodes_custom_sampler import BasicScheduler, KSamplerSelect

from ..bas_core.quadrature import RULES
from . import inputs
from .sampling.sampler import METHODS, Options, sample_ba_solver
from .sampling.schedule import path_schedules, sigmas_for

AUTO = "auto"
SIDENET, MODEL_DEFAULT = SCHEDULES = ("sidenet", "model default")


class BASampler(io.ComfyNode):
    """A SAMPLER for SamplerCustom and SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverSampler",
            display_name="BA-Solver Sampler",
            category=KSamplerSelect.GET_SCHEMA().category,  # beside ComfyUI's own, whose menu has moved before
            description="The sampler for SamplerCustom and SamplerCustomAdvanced. Without a SideNet on the MODEL it "
            "samples by the multistep method.",
            search_aliases=["BA-solver", "bi-anchor", "few-step sampler", "fast sampler", "predictor-corrector"],
            inputs=[
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="bi_anchor: the SideNet predicts the velocities inside a step from the model calls at both "
                    "of its ends. single_anchor: it predicts them from the start of the step alone, which is a "
                    "baseline. multistep: no SideNet is needed. Every method makes one model call a step.",
                ),
                inputs.choice(
                    "quadrature",
                    [AUTO, *RULES],
                    AUTO,
                    "Where inside a step velocities are predicted, and how they are added up. auto uses the SideNet's "
                    "own rule with its own schedule, and otherwise lobatto4, or legendre3 for single_anchor. The "
                    "legendre rules leave out the ends of a step and work with single_anchor only.",
                ),
                inputs.share(
                    "start_percent",
                    0.0,
                    "CFG begins at this share of the sampling: 0 is the first step, 1 the end. Before it only the "
                    "positive prompt is evaluated. The paper samples SiT-XL/2 with CFG 1.5 from 0.3 on.",
                    **inputs.RARE,
                ),
                inputs.share(
                    "end_percent",
                    1.0,
                    "CFG ends at this share of the sampling: 0 is the first step, 1 the end. After it only the "
                    "positive prompt is evaluated.",
                    **inputs.RARE,
                ),
                io.Boolean.Input(
                    "follow_sigmas",
                    default=False,
                    **inputs.RARE,
                    tooltip="Call the model exactly at the SIGMAS. When this is off, the SIGMAS say from where to "
                    "where and in how many steps, and the SideNet's file says at which sigmas the model is called.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="The sampler, for SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        method: str,
        quadrature: str = AUTO,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        follow_sigmas: bool = False,
    ) -> io.NodeOutput:
        rule = None if quadrature == AUTO else quadrature
        options = Options(method, rule, start_percent, end_percent, follow_sigmas)
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_ba_solver, {"options": options}))


class BAScheduler(io.ComfyNode):
    """SIGMAS for a number of steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverScheduler",
            display_name="BA-Solver Scheduler",
            category=BasicScheduler.GET_SCHEMA().category,
            description="The sigmas for a number of steps, spread as in the SideNet's file, or as usual. The "
            "sampler 'ba_solver' works with any scheduler; this one is for other samplers, and a denoise below 1.",
            search_aliases=["sigmas", "time grid", "NFE", "few steps", "steps", "model calls"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The output of Apply SideNet, because the schedules are in the SideNet's file."
                ),
                inputs.steps(
                    7,
                    1,
                    "The number of steps, each of one model call. BA-solver is made for 5 to 10.",
                ),
                inputs.share(
                    "denoise",
                    1.0,
                    "1 starts from pure noise. Lower values start from a partly noised latent (image to image) "
                    "and spend all steps on what is left to denoise.",
                ),
                inputs.choice(
                    "schedule",
                    SCHEDULES,
                    SIDENET,
                    "sidenet: sigmas spread as in the nearest schedule of the SideNet's file. model default: the same "
                    "sigmas as the scheduler 'simple'.",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="The sigmas, for SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model: Any, steps: int, denoise: float = 1.0, schedule: str = SIDENET) -> io.NodeOutput:
        if denoise <= 0:
            return io.NodeOutput(torch.FloatTensor([]))  # for ComfyUI's samplers this means: leave the latent as it is
        sampling = model.get_model_object("model_sampling")
        schedules = path_schedules(model) if schedule == SIDENET else {}
        return io.NodeOutput(sigmas_for(sampling, steps, denoise, schedules))
