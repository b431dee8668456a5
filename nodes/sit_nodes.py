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
                    "sit_name",
                    options=SITS.names(),
                    default=DEMO,
                    tooltip="A .safetensors or .pt file in models/sit, or the demo that comes with this pack. No code "
                    "in a .pt file is run.",
                ),
                inputs.choice(
                    "convention",
                    [AUTO, *CONVENTIONS],
                    AUTO,
                    "Whether time 1 is noise or data in a public file. auto assumes data_at_one, as the original SiT "
                    "has it, if the file predicts sigma too, and otherwise noise_at_one, as REPA has it. Change this "
                    "if images are pure noise.",
                ),
                inputs.choice(
                    "weight_dtype",
                    DTYPES,
                    "float32",
                    "The precision that the model is kept and computed in. bfloat16 needs half the memory.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The SiT, for KSampler, LoRA loaders and all other nodes.")],
        )

    @classmethod
    def execute(cls, sit_name: str, convention: str = AUTO, weight_dtype: str = "float32") -> io.NodeOutput:
        model = read_sit(SITS.path(sit_name), None if convention == AUTO else convention, DTYPES[weight_dtype])
        return io.NodeOutput(model)

    @classmethod
    def fingerprint_inputs(cls, sit_name: str, **rest: Any) -> str:
        return f"{SITS.fingerprint(sit_name)} {sorted(rest.items())}"


class ClassLabel(io.ComfyNode):
    """A class of a SiT as CONDITIONING, with the null class as its negative."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverClassLabel",
            display_name="Class Label (BA-Solver)",
            category="BA-Solver/SiT",
            description="Choose the class that a SiT draws. The positive is the class, and the negative is the null "
            "class, which stands for no class at all.",
            search_aliases=["ImageNet class", "class index", "SiT prompt", "null class"],
            inputs=[
                io.Model.Input("model", tooltip="The SiT, from Load SiT. It determines how many classes there are."),
                io.Combo.Input(
                    "class_name",
                    options=[*CLASSES, ALL],
                    tooltip="Type to search. The 'demo' classes are the shipped demo's, and the 'ImageNet' classes are "
                    "those of public SiT and REPA models. The last entry gives each image of a batch the next class.",
                ),
                io.Int.Input(
                    "index",
                    default=-1,
                    min=-1,
                    max=1_000_000,
                    **inputs.RARE,
                    tooltip="The number of a class, for models with other classes than these. -1 uses class_name.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The class, as a positive prompt."),
                io.Conditioning.Output("negative", tooltip="The null class, as a negative prompt."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, class_name: str, index: int = -1) -> io.NodeOutput:
        null_class = sit_config(model).num_classes
        chosen = class_indices(class_name, index, null_class)
        return io.NodeOutput(*(conditioning_of(torch.tensor(labels)) for labels in (chosen, [null_class])))
