"""The nodes Load SideNet, Apply SideNet and SideNet Info."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.v0_0_2 import io, ui

from . import inputs
from .folders import DEMO, SIDENETS
from .models import compatibility
from .models.attach import LoadedSideNet, apply_sidenet, read_sidenet
from .notify import warn
from .report import error_curves, error_plot, report

SideNetLink = io.Custom("SIDENET")
DTYPES = {"as stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadSideNet(io.ComfyNode):
    """A SideNet file as a SIDENET."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverLoadSideNet",
            display_name="Load SideNet",
            category="BA-Solver",
            description="Load a SideNet, the small network that predicts how a model's velocity changes between its "
            "calls. It belongs to one model: use the one that was made for yours.",
            search_aliases=["SideNet", "BA-solver model", "side network"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=SIDENETS.names(),
                    default=DEMO,
                    tooltip="A .safetensors file in models/sidenets (or output/sidenets, where the trainer writes), "
                    "or the demo's, which comes with this pack.",
                ),
                inputs.choice(
                    "weight_dtype",
                    DTYPES,
                    "as stored",
                    "Precision of the SideNet's weights and of its computation.",
                ),
            ],
            outputs=[SideNetLink.Output("sidenet", display_name="SIDENET", tooltip="For Apply SideNet.")],
        )

    @classmethod
    def execute(cls, name: str, weight_dtype: str = "as stored") -> io.NodeOutput:
        return io.NodeOutput(read_sidenet(SIDENETS.path(name), name, DTYPES[weight_dtype]))

    @classmethod
    def fingerprint_inputs(cls, name: str, weight_dtype: str = "as stored") -> str:
        return f"{SIDENETS.fingerprint(name)} {weight_dtype}"


class ApplySideNet(io.ComfyNode):
    """A SideNet on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverApplySideNet",
            display_name="Apply SideNet",
            category="BA-Solver",
            description="Put a SideNet on a MODEL, for BA-Solver Sampler and for the sampler 'ba_solver' of KSampler. "
            "Other samplers do not see it. Before or after LoRA makes no difference.",
            search_aliases=["SideNet", "BA-solver", "speed up", "fewer steps", "attach SideNet"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the SideNet was made for."),
                SideNetLink.Input("sidenet", tooltip="From Load SideNet."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How much of the SideNet's prediction is used: 1 = as trained, 0 = none of it, which is "
                    "the multistep baseline. Less than 1 can help where a LoRA has changed the model much.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with its SideNet.")],
        )

    @classmethod
    def execute(cls, model: Any, sidenet: LoadedSideNet, strength: float = 1.0) -> io.NodeOutput:
        facts = compatibility.facts_of(model)
        reasons = compatibility.errors(sidenet, facts)
        if reasons:
            raise ValueError(
                f"This SideNet does not fit this MODEL: {' '.join(reasons)} Choose the SideNet made for it."
            )
        for doubt in compatibility.warnings(sidenet, facts):
            warn(doubt)
        return io.NodeOutput(apply_sidenet(model, sidenet, strength))


class SideNetInfo(io.ComfyNode):
    """What a SideNet's file says of itself, as text and as a plot."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverSideNetInfo",
            display_name="SideNet Info",
            category="BA-Solver",
            description="What a SideNet is for, how it was made and how good it is: as text, and as a plot of its "
            "error over the number of calls, beside other solvers' where its file holds them.",
            search_aliases=["SideNet metadata", "error plot", "model card"],
            inputs=[SideNetLink.Input("sidenet", tooltip="From Load SideNet.")],
            outputs=[
                io.String.Output("text", tooltip="What the file says of itself."),
                io.Image.Output("plot", tooltip="Endpoint error over the number of backbone calls."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, sidenet: LoadedSideNet) -> io.NodeOutput:
        text = report(sidenet.name, sidenet.network.config, sidenet.card)
        plot = error_plot(error_curves(sidenet.card.evaluation))
        preview = {**ui.PreviewText(text).as_dict(), **ui.PreviewImage(plot, cls=cls).as_dict()}
        return io.NodeOutput(text, plot, ui=preview)
