"""The nodes BA-Solver Sampler and BA-Solver Scheduler."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from comfy_api.v0_0_2 import io

from ..bas_core.quadrature import RULES
from . import inputs
from .models.attach import applied_sidenet
from .sampling.sampler import METHODS, Options, sample_ba_solver
from .sampling.schedule import sigmas_for

AUTO = "auto"
GRIDS = ("auto", "model")


class BASampler(io.ComfyNode):
    """A SAMPLER for SamplerCustom and SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverSampler",
            display_name="BA-Solver Sampler",
            category="BA-Solver",
            description="The sampler for SamplerCustom and SamplerCustomAdvanced. The MODEL needs a SideNet (Apply "
            "SideNet), except with the method 'multistep'.",
            search_aliases=["BA-solver", "bi-anchor", "few-step sampler", "fast sampler", "predictor-corrector"],
            inputs=[
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="bi_anchor: the SideNet predicts the velocities between two backbone calls from both "
                    "ends. single_anchor: from the start alone; a baseline. multistep: no SideNet, the best that "
                    "two calls on a straight line give. Each costs one backbone call a step, or one fewer in all "
                    "(skip_first_call).",
                ),
                inputs.choice(
                    "quadrature",
                    [AUTO, *RULES],
                    AUTO,
                    "Where in each step velocities are predicted, and how they are added up. auto = the SideNet's own "
                    "rule on a grid of its own; else lobatto4 for bi_anchor and multistep, legendre3 for "
                    "single_anchor. The legendre rules do not hold both ends and go with single_anchor only.",
                ),
                inputs.fraction(
                    "start_percent",
                    0.0,
                    "CFG applies where the flow time t is above this. t = 1 is noise, t = 0 the image; for "
                    "diffusion models t = sigma / (1 + sigma).",
                ),
                inputs.fraction(
                    "end_percent",
                    1.0,
                    "CFG applies where the flow time t is at most this; above, the positive alone is "
                    "evaluated. The paper samples SiT-XL/2 with CFG 1.5 until 0.7.",
                ),
                io.Boolean.Input(
                    "skip_first_call",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="A SideNet that knows the mean of the model's images stands in for the first call, which "
                    "sees pure noise and says little else; where the first step is short, that call is saved. Turn "
                    "it off for noise that BA Invert made: it leads to one image, not to the mean.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        method: str,
        quadrature: str = AUTO,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        skip_first_call: bool = True,
    ) -> io.NodeOutput:
        rule = None if quadrature == AUTO else quadrature
        options = Options(method, rule, start_percent, end_percent, skip_first_call)
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_ba_solver, {"options": options}))


class BAScheduler(io.ComfyNode):
    """SIGMAS for a number of backbone calls."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverScheduler",
            display_name="BA-Solver Scheduler",
            category="BA-Solver",
            description="The sigmas for a number of backbone calls: the grid that the SideNet's file holds for it, "
            "or, where it holds none, the model's own.",
            search_aliases=["sigmas", "time grid", "NFE", "few steps", "steps"],
            inputs=[
                io.Model.Input("model", tooltip="With its SideNet, whose grid is used: connect Apply SideNet."),
                inputs.calls(
                    7,
                    "How much the model works: a call evaluates the positive and, with CFG, the negative; 5 "
                    "to 10 is what BA-solver is for. There are as many steps, one more where the SideNet saves the "
                    "first call, and with CFG another, for two calls leave the negative out.",
                ),
                inputs.fraction(
                    "denoise",
                    1.0,
                    "1 = from pure noise. Less starts from a partly noised latent (image to image) and "
                    "spends all calls on the part that is left.",
                    advanced=False,
                ),
                inputs.choice(
                    "grid",
                    GRIDS,
                    GRIDS[0],
                    "auto: the SideNet's learned grid, stretched to this number of calls where it holds "
                    "other numbers only. model: the model's own shift, as the scheduler 'simple' makes it.",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model: Any, calls: int, denoise: float = 1.0, grid: str = GRIDS[0]) -> io.NodeOutput:
        if denoise <= 0:
            return io.NodeOutput(torch.FloatTensor([]))  # ComfyUI's sign for: leave the latent as it is
        sidenet = applied_sidenet(model)
        sampling = model.get_model_object("model_sampling")
        if sidenet is None or sidenet.strength == 0 or grid != GRIDS[0]:
            return io.NodeOutput(sigmas_for(sampling, calls, denoise, {}))
        return io.NodeOutput(sigmas_for(sampling, calls, denoise, sidenet.card.runs, sidenet.knows_mean))
