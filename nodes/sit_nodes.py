"""The nodes Load SiT and Class Label."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.v0_0_2 import io

from ..bas_core.sit import CONVENTIONS
from . import inputs
from .folders import DEMO, SITS
from .models.classes import ALL, CLASSES, class_indices
from .models.labels import conditioning_of
from .models.sit_model import read_sit, sit_config

AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LoadSiT(io.ComfyNode):
    """A SiT file as a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverLoadSiT",
            display_name="Load SiT",
            category="BA-Solver/SiT",
            description="Load a SiT, a class-conditional flow model, as a MODEL: the shipped demo (32x32 shapes, "
            "runs anywhere), or a public SiT or REPA checkpoint for ImageNet.",
            search_aliases=["SiT", "REPA", "class-conditional", "ImageNet model", "BA-Solver demo"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=SITS.names(),
                    default=DEMO,
                    tooltip="A file in models/sit (.safetensors, or .pt, which is read without running anything in "
                    "it), or the demo that comes with this pack.",
                ),
                inputs.choice(
                    "convention",
                    [AUTO, *CONVENTIONS],
                    AUTO,
                    "Which end of time is noise in a public file. Auto takes the original SiT's way "
                    "(data at one) where the file predicts sigma too, else REPA's (noise at one). Change it if "
                    "images are pure noise.",
                ),
                inputs.choice(
                    "weight_dtype",
                    DTYPES,
                    "float32",
                    "Precision of the weights and of the computation. bfloat16 needs half the memory.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The SiT; for KSampler, LoRA loaders and everything else that takes one.")
            ],
        )

    @classmethod
    def execute(cls, name: str, convention: str = AUTO, weight_dtype: str = "float32") -> io.NodeOutput:
        model = read_sit(SITS.path(name), None if convention == AUTO else convention, DTYPES[weight_dtype])
        return io.NodeOutput(model)

    @classmethod
    def fingerprint_inputs(cls, name: str, **rest: Any) -> str:
        return f"{SITS.fingerprint(name)} {sorted(rest.items())}"


class ClassLabel(io.ComfyNode):
    """A class of a SiT as CONDITIONING, with the null class as its negative."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverClassLabel",
            display_name="Class Label",
            category="BA-Solver/SiT",
            description="What a SiT is to draw. Positive is the class, negative the null class (no class at all), "
            "which guidance pushes away from.",
            search_aliases=["ImageNet class", "class index", "SiT prompt", "null class"],
            inputs=[
                io.Model.Input("model", tooltip="The SiT, from Load SiT; it says how many classes there are."),
                io.Combo.Input(
                    "class_name",
                    options=[*CLASSES, ALL],
                    tooltip="Type to search. 'demo' classes go with the shipped demo, 'ImageNet' classes with public "
                    "SiT and REPA models. The last entry gives each picture of a batch the next class.",
                ),
                io.Int.Input(
                    "index",
                    default=-1,
                    min=-1,
                    max=1_000_000,
                    optional=True,
                    advanced=True,
                    tooltip="A class by number, for models with other classes than these lists. -1 uses class_name.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The class."),
                io.Conditioning.Output("negative", tooltip="The null class."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, class_name: str, index: int = -1) -> io.NodeOutput:
        known = sit_config(model).num_classes
        chosen = class_indices(class_name, index, known)
        return io.NodeOutput(*(conditioning_of(torch.tensor(labels)) for labels in (chosen, [known])))
