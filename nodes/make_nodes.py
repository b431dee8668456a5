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

from ..training.efforts import EFFORTS, QUICK
from ..training.make import MakeSettings
from . import inputs
from .folders import SIDENETS
from .making.make import Told, check_name, in_words, make
from .models.attach import read_sidenet
from .report import error_curves, error_plot, report, training_curves
from .say import tell
from .sidenet_nodes import SideNetLink

BAR = 1000


class MakeSideNet(io.ComfyNode):
    """A SideNet for the very MODEL that is in the graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverMakeSideNet",
            display_name="Make SideNet",
            category="BA-Solver",
            description="Make a SideNet for the MODEL as it is in the graph, with its LoRAs and everything else on it. "
            "It is kept under its name, and found by Load SideNet. Stopped, or cut off, it goes on when run again.",
            search_aliases=["train SideNet", "calibrate", "speed up", "fewer steps", "few-step", "distill"],
            is_input_list=True,  # all prompts of a list at once
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that is to be sampled in fewer calls."),
                io.Conditioning.Input(
                    "positive", tooltip="One prompt, or better a dozen as a list (Prompt Lines): they take turns."
                ),
                io.Latent.Input("latent_image", tooltip="An empty latent: the size of the pictures or of the video."),
                *_wanted(),
                inputs.negative(),
                *_advanced(),
            ],
            outputs=[
                SideNetLink.Output("sidenet", display_name="SIDENET", tooltip="For Apply SideNet."),
                io.Image.Output("report", tooltip="Errors over the number of calls, ours and other samplers'."),
                io.String.Output("text", tooltip="What was made, how, and how good it is."),
            ],
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        one = {name: values[0] for name, values in given.items() if values}
        model = one["model"]
        latent = inputs.empty_latent(model, one["latent_image"], "Make SideNet")
        settings = settings_of(one)
        bar = comfy.utils.ProgressBar(BAR)
        where = Told(tell, lambda share: bar.update_absolute(round(BAR * share)), lambda history: preview(bar, history))
        try:
            chains = Path(one["folder"]) / settings.out.stem if one.get("folder") else None
            card = make(model, (given["positive"], one.get("negative")), latent, settings, where, chains)
        except Exception as error:
            words = in_words(error)
            if words is None:
                raise
            raise ValueError(words) from error
        bar.update_absolute(BAR)
        tell(summary(card.evaluation))
        sidenet = read_sidenet(settings.out, settings.out.name)
        plot = plots(settings.out, card.evaluation)
        text = report(settings.out.name, sidenet.network.config, card)
        shown = {**ui.PreviewText(text).as_dict(), **ui.PreviewImage(plot, cls=cls).as_dict()}
        return io.NodeOutput(sidenet, plot, text, ui=shown)


def preview(bar: Any, history: list[dict[str, float]]) -> None:
    """Show on the node how a training goes."""
    pixels = training_plot(history)[0]
    picture = Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
    bar.update_absolute(bar.current, preview=("JPEG", picture, max(picture.size)))


def training_plot(history: list[dict[str, float]]) -> Tensor:
    """An IMAGE of loss and held-out residual variance."""
    return error_plot(training_curves(history), "step", "loss, and residual variance left (1 = a straight line)")


def plots(path: Path, evaluation: dict[str, Any]) -> Tensor:
    """An IMAGE of the errors, and one of the training where there was one."""
    found = [error_plot(error_curves(evaluation))]
    log = path.with_suffix(".run") / "all_pairs_log.json"
    if log.exists():
        found.append(training_plot(json.loads(log.read_text(encoding="utf-8"))))
    return torch.cat(found)


def summary(evaluation: dict[str, Any]) -> str:
    """What has been gained, in a line for each number of calls."""
    curves = error_curves(evaluation)
    ours = curves.pop("BA-solver", {})
    lines = [
        f"{calls} calls: {error:.3g}, other samplers {min(curve[calls] for curve in curves.values()):.3g}"
        for calls, error in sorted(ours.items())
    ]
    return "Distance from the converged picture. " + "; ".join(lines)


def settings_of(one: dict[str, Any]) -> MakeSettings:
    """The trainer's settings of the node's inputs; what is 0 is left to the effort."""
    given = {"chains": "runs", "points": "points", "steps": "training_steps", "learning_rate": "learning_rate"}
    changed = {name: one[entry] for name, entry in given.items() if one.get(entry)}
    if one["effort"] == QUICK:
        changed.pop("steps", None)
    path = Path(folder_paths.get_output_directory()) / SIDENETS.key / f"{check_name(one['name'])}.safetensors"
    return MakeSettings(
        backbone="comfyui:model",
        out=path,
        guidance=(float(one["cfg"]),),
        nfe=one["calls"],
        effort=one["effort"],
        seed=one.get("recording_seed", 1),
        record_batch=one.get("batch", 4),
        more_guidance=more_scales(one.get("more_cfg", "")),
        **changed,
    )


def more_scales(text: str) -> tuple[float, ...]:
    """CFG scales of a text such as "4, 6".

    Raises:
        ValueError: something in it is no number.
    """
    try:
        return tuple(float(part) for part in text.replace(";", ",").split(",") if part.strip())
    except ValueError:
        raise ValueError(f"more_cfg must be numbers separated by commas, such as 4, 6; got {text!r}.") from None


def _wanted() -> list[Any]:
    return [
        inputs.cfg(),
        inputs.number_list(
            "calls", "For which numbers of model calls, separated by commas. BA-Solver Scheduler is asked for the same."
        ),
        io.Combo.Input(
            "effort",
            options=list(EFFORTS),
            default=QUICK,
            tooltip="quick: the times of the calls and how their results are weighed, without a network; about 1,500 "
            "model calls. standard: a network too, for when you keep a scheduler of ComfyUI's; about 20,000 model "
            "calls, and its training. "
            "thorough: tuned by gradients through the model as well; as much work again four times over.",
        ),
        io.String.Input("name", default="my_sidenet", tooltip="Of the file in output/sidenets."),
    ]


def _advanced() -> list[Any]:
    def number(name: str, default: int, most: int, tooltip: str) -> Any:
        return io.Int.Input(name, default=default, min=0, max=most, optional=True, advanced=True, tooltip=tooltip)

    return [
        # Not "seed": ComfyUI would change that after each run, and the next could not go on with the last.
        number("recording_seed", 1, 1_000_000, "Of the noises."),
        io.String.Input(
            "folder",
            default="",
            optional=True,
            advanced=True,
            tooltip="Where the recordings go, such as a disk with room; empty = beside the SideNet.",
        ),
        number("batch", 4, 256, "How many samples go through the model at once, as for a batch of pictures."),
        number("runs", 0, 100_000, "How many runs are recorded; 0 = what the effort says."),
        number("points", 0, 1000, "Model calls of a recorded run, 0 or at least 8; 0 = what the effort says."),
        number("training_steps", 0, 1_000_000, "Of the network; 0 = what the effort says. Unused by quick."),
        io.Float.Input(
            "learning_rate",
            default=0.003,
            min=1e-6,
            max=1.0,
            step=0.0001,
            optional=True,
            advanced=True,
            tooltip="Of the network. Unused by quick.",
        ),
        # Behind the others, for graphs keep the values of inputs by their order.
        io.String.Input(
            "more_cfg",
            default="",
            optional=True,
            advanced=True,
            tooltip="Other CFG scales to find times and weights for, separated by commas; a quick SideNet's work each. "
            "Those for one scale serve from half to one and a half times of it: cfg 2 and more_cfg 4 are good for 1 "
            "to 6.",
        ),
    ]
