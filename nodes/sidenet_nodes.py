"""The nodes Apply SideNet and SideNet Info."""

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
from .sampling.sampler import check_before_loading

SideNetLink = io.Custom("SIDENET")
DTYPES = {"as stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sidenet_name() -> Any:
    return io.Combo.Input(
        "sidenet_name",
        options=SIDENETS.names(),
        default=DEMO,
        tooltip="A .safetensors file in models/sidenets or output/sidenets, where Make SideNet writes. The demo's "
        "SideNet comes with this pack.",
    )


def sidenet_link() -> Any:
    return SideNetLink.Input(
        "sidenet", optional=True, tooltip="A SideNet from Make SideNet. If it is connected, sidenet_name is not used."
    )


def fingerprint(sidenet_name: str | None) -> str:
    """Changes when the file does. ComfyUI gives None for what is connected."""
    return "" if sidenet_name is None else SIDENETS.fingerprint(sidenet_name)


class ApplySideNet(io.ComfyNode):
    """A SideNet on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverApplySideNet",
            display_name="Apply SideNet",
            category="BA-Solver",
            description="Load a SideNet and put it on a MODEL, for the sampler 'ba_solver' of KSampler and for "
            "BA-Solver Sampler. Other samplers do not use it. A SideNet belongs to one model: use the one made for "
            "yours. It may come before or after LoRA loaders.",
            search_aliases=["SideNet", "Load SideNet", "BA-solver", "speed up", "fewer steps", "attach SideNet"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the SideNet was made for."),
                sidenet_name(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How much of the network's prediction is used. 1 uses it as trained, and 0 uses the fitted "
                    "schedules alone. Less than 1 can help where a LoRA has changed the model much.",
                ),
                sidenet_link(),
                inputs.choice(
                    "weight_dtype", DTYPES, "as stored", "The precision that the SideNet is stored and computed in."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with its SideNet.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        sidenet_name: str = DEMO,
        strength: float = 1.0,
        sidenet: LoadedSideNet | None = None,
        weight_dtype: str = "as stored",
    ) -> io.NodeOutput:
        facts = compatibility.facts_of(model)
        if sidenet is None:
            sidenet = read_sidenet(SIDENETS.path(sidenet_name), sidenet_name, DTYPES[weight_dtype])
        reasons = compatibility.errors(sidenet, facts)
        if reasons:
            raise ValueError(
                f"This SideNet does not fit this MODEL: {' '.join(reasons)} Choose the SideNet made for it."
            )
        for doubt in compatibility.warnings(sidenet, facts):
            warn(doubt)
        applied = apply_sidenet(model, sidenet, strength)
        check_before_loading(applied)
        return io.NodeOutput(applied)

    @classmethod
    def fingerprint_inputs(cls, sidenet_name: str | None = None, sidenet: Any = None, **others: Any) -> str:
        return fingerprint(sidenet_name)


class SideNetInfo(io.ComfyNode):
    """The metadata of a SideNet's file, as text and as a plot."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverSideNetInfo",
            display_name="SideNet Info",
            category="BA-Solver",
            description="Show which model a SideNet is for, how it was made and how good it is: as text, and as a plot "
            "of its error over the number of model calls beside other samplers.",
            search_aliases=["SideNet metadata", "error plot", "model card"],
            inputs=[sidenet_name(), sidenet_link()],
            outputs=[
                io.String.Output("text", tooltip="The metadata in the SideNet's file."),
                io.Image.Output("plot", tooltip="The error over the number of model calls."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, sidenet_name: str = DEMO, sidenet: LoadedSideNet | None = None) -> io.NodeOutput:
        if sidenet is None:
            sidenet = read_sidenet(SIDENETS.path(sidenet_name), sidenet_name)
        text = report(sidenet.name, sidenet.network.config, sidenet.card)
        plot = error_plot(error_curves(sidenet.card.evaluation))
        preview = {**ui.PreviewText(text).as_dict(), **ui.PreviewImage(plot, cls=cls).as_dict()}
        return io.NodeOutput(text, plot, ui=preview)

    @classmethod
    def fingerprint_inputs(cls, sidenet_name: str | None = None, sidenet: Any = None) -> str:
        return fingerprint(sidenet_name)
