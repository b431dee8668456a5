"""The node Make SideNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from comfy_api.v0_0_2 import io, ui
from PIL import Image
from torch import Tensor

from ..training.make import MakeSettings
from ..training.presets import PRESETS, preset_values
from . import inputs
from .folders import SIDENETS
from .making.make import ProgressReporter, check_name, error_message, make
from .models.attach import read_sidenet
from .notify import inform
from .report import error_curves, error_plot, report, training_curves
from .sidenet_nodes import SideNetLink

BAR = 1000


class MakeSideNet(io.ComfyNode):
    """A SideNet for the MODEL in the graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverMakeSideNet",
            display_name="Make SideNet",
            category="BA-Solver",
            description="Make a SideNet for the MODEL as it is in the graph, with its LoRAs and everything else on it. "
            "It is saved under its name, where Apply SideNet lists it. Interrupted work is resumed on the next run.",
            search_aliases=["train SideNet", "calibrate", "speed up", "fewer steps", "few-step", "distill"],
            is_input_list=True,  # all prompts of a list at once
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that is to be sampled in fewer steps."),
                io.Conditioning.Input(
                    "positive", tooltip="One prompt, or better a dozen as a list (Prompt Lines), used in turn."
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the size of the images or the video. A latent with an image and a mask "
                    "is used as in KSampler.",
                ),
                *_basic(),
                inputs.negative(),
                io.Model.Input(
                    "earlier_model",
                    optional=True,
                    tooltip="The model that samples the path before start_percent, such as Wan 2.2's high-noise model "
                    "where the SideNet is for the low-noise one. Without it the model itself does.",
                ),
                *_advanced(),
            ],
            outputs=[
                SideNetLink.Output("sidenet", display_name="SIDENET", tooltip="For Apply SideNet."),
                io.Image.Output("report", tooltip="Errors of BA-Solver and other samplers by number of model calls."),
                io.String.Output("text", tooltip="How the SideNet was made, and how good it is."),
            ],
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        one = {name: values[0] for name, values in given.items() if values}
        model = one["model"]
        latent = inputs.latent_of(model, one["latent_image"], "Make SideNet")
        settings = settings_of(one)
        bar = comfy.utils.ProgressBar(BAR)
        reporter = ProgressReporter(
            inform,
            lambda share: bar.update_absolute(round(BAR * share)),
            lambda history: preview(bar, history),
        )
        try:
            cache = Path(one["cache_dir"]) / settings.out.stem if one.get("cache_dir") else None
            prompts = given["positive"], one.get("negative")
            percents = one.get("start_percent", 0.0), one.get("end_percent", 1.0)
            card = make(model, prompts, latent, settings, reporter, cache, percents, one.get("earlier_model"))
        except Exception as error:
            message = error_message(error)
            if message is None:
                raise
            raise ValueError(message) from error
        bar.update_absolute(BAR)
        inform(summary(card.evaluation))
        sidenet = read_sidenet(settings.out, settings.out.name)
        plot = plots(settings.out, card.evaluation)
        text = report(settings.out.name, sidenet.network.config, card)
        shown = {**ui.PreviewText(text).as_dict(), **ui.PreviewImage(plot, cls=cls).as_dict()}
        return io.NodeOutput(sidenet, plot, text, ui=shown)


def preview(bar: Any, history: list[dict[str, float]]) -> None:
    """Plot a training on the node while it runs."""
    pixels = training_plot(history)[0]
    picture = Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
    bar.update_absolute(bar.current, preview=("JPEG", picture, max(picture.size)))


def training_plot(history: list[dict[str, float]]) -> Tensor:
    """An IMAGE of loss and validation error."""
    return error_plot(training_curves(history), "step", "loss, and fraction of variance unexplained")


def plots(path: Path, evaluation: dict[str, Any]) -> Tensor:
    """An IMAGE of the errors, and one of the training if a network was trained."""
    found = [error_plot(error_curves(evaluation))]
    log = path.with_suffix(".run") / "all_pairs_log.json"
    if log.exists():
        found.append(training_plot(json.loads(log.read_text(encoding="utf-8"))))
    return torch.cat(found)


def summary(evaluation: dict[str, Any]) -> str:
    """The errors beside the best other sampler's, by number of model calls."""
    curves = error_curves(evaluation)
    ours = curves.pop("BA-solver", {})
    lines = [
        f"{calls} model calls: {error:.3g}, other samplers {min(curve[calls] for curve in curves.values()):.3g}"
        for calls, error in sorted(ours.items())
    ]
    return "Distance from the converged image. " + "; ".join(lines)


def settings_of(one: dict[str, Any]) -> MakeSettings:
    """The trainer's settings from the node's inputs; inputs that are 0 are left to the preset."""
    fields = {
        "trajectories": "trajectories",
        "points": "steps_per_trajectory",
        "steps": "training_steps",
        "learning_rate": "learning_rate",
    }
    changed = {field: one[name] for field, name in fields.items() if one.get(name)}
    if one["preset"] == "quick":
        changed.pop("steps", None)
    folder = Path(folder_paths.get_output_directory()) / SIDENETS.key
    own = {
        "guidance": (float(one["cfg"]),),
        "nfe": one["steps"],
        "preset": one["preset"],
        "seed": one.get("recording_seed", 1),
        "record_batch": one.get("batch_size", 0),
        "extra_guidance": cfg_scales(one.get("extra_cfg", "")),
        **changed,
        # Prefixes are for what becomes of noise.
        **({"prefixes": 0} if one.get("start_percent") else {}),
    }
    out = folder / f"{check_name(one['output_name'])}.safetensors"
    return MakeSettings(backbone="comfyui:model", out=out, **{**preset_values(one["preset"], one["steps"]), **own})


def cfg_scales(text: str) -> tuple[float, ...]:
    """The CFG scales in a text such as "4, 6".

    Raises:
        ValueError: a part of it is no number.
    """
    try:
        return tuple(float(part) for part in text.replace(";", ",").split(",") if part.strip())
    except ValueError:
        raise ValueError(f"extra_cfg must be numbers separated by commas, such as 4, 6; got {text!r}.") from None


def _basic() -> list[Any]:
    return [
        inputs.sampling_cfg(),
        io.String.Input(
            "steps",
            default="4, 5, 6, 7, 8, 9, 10, 12",
            tooltip="The numbers of steps that the SideNet is made for, separated by commas. A step is one model call. "
            "What is learned for one number helps the others.",
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default="quick",
            tooltip="quick finds schedules (times and coefficients) without a network, in some 1,500 model calls, or "
            "300 to 400 for one number of steps. full also trains a network, which they ask, and which helps with "
            "other numbers of steps and with ComfyUI's schedulers; it needs about 5,000 model calls and the training.",
        ),
        io.String.Input(
            "output_name",
            default="my_sidenet",
            tooltip="The name of the SideNet's file, in the folder output/sidenets.",
        ),
    ]


def _advanced() -> list[Any]:
    def number(name: str, default: int, most: int, tooltip: str) -> Any:
        return io.Int.Input(name, default=default, min=0, max=most, optional=True, advanced=True, tooltip=tooltip)

    def text(name: str, tooltip: str) -> Any:
        return io.String.Input(name, default="", optional=True, advanced=True, tooltip=tooltip)

    return [
        # Not "seed": ComfyUI would change that after each run, and interrupted work could not be resumed.
        number("recording_seed", 1, 1_000_000, "The seed of the noise that trajectories are recorded from."),
        text("cache_dir", "The folder for the recordings, if the disk with the SideNet has no room for them."),
        number("batch_size", 0, 256, "How many samples go through the model at once. 0 is 4, or 1 of videos."),
        number("trajectories", 0, 100_000, "How many trajectories are recorded. 0 leaves it to the preset."),
        number("steps_per_trajectory", 0, 1000, "Model calls of a recorded trajectory, at least 8. 0 leaves it to the "
               "preset."),
        number("training_steps", 0, 1_000_000, "Training steps of the network. 0 leaves it to the preset; quick trains "
               "no network."),
        io.Float.Input(
            "learning_rate",
            default=0.003,
            min=1e-6,
            max=1.0,
            step=0.0001,
            optional=True,
            advanced=True,
            tooltip="The learning rate of the network. quick trains no network.",
        ),
        text(
            "extra_cfg",
            "Other CFG scales to find schedules for, separated by commas. Each costs as much as a quick SideNet, and "
            "serves from half to one and a half times its scale: cfg 2 with extra_cfg 4 serves 1 to 6.",
        ),
        inputs.share(
            "start_percent",
            0.0,
            "The SideNet is for the sampling from this share of it on: 0 is the first step. Models that share a "
            "sampling, such as Wan 2.2's two, have a SideNet each.",
            **inputs.RARE,
        ),
        inputs.share(
            "end_percent",
            1.0,
            "The SideNet is for the sampling up to this share of it: 1 is the last step. With the scheduler 'simple', "
            "step 4 of 8 is at 0.5.",
            **inputs.RARE,
        ),
    ]  # fmt: skip
