"""The nodes Compare Solvers and Prompt Lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
from comfy_api.v0_0_2 import io, ui

from ..bas_core.files import read_user_text
from . import inputs
from .comparing.compare import compare, jobs_for, total_calls
from .comparing.show import best_lines, curves, sheet, table, write_csv
from .report import error_plot
from .sampling.guider import guider_for

SAMPLERS = "euler, heun, dpm_2, dpmpp_2m, uni_pc, ipndm"
SCHEDULERS = "simple, beta"
FOLDER = "ba_solver"


class CompareSolvers(io.ComfyNode):
    """Samplers beside each other on the user's own model and prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverCompare",
            display_name="Compare Solvers",
            category="BA-Solver",
            description="Draw the same noise by several samplers with the same number of model calls, and see how far "
            "each ends from the converged picture. BA-Solver takes part with the MODEL's SideNet, and without one.",
            search_aliases=["benchmark", "compare samplers", "sampler comparison", "XY plot", "NFE"],
            is_input_list=True,  # all prompts of a list at once
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model, with its SideNet if it has one (Apply SideNet)."),
                io.Conditioning.Input("positive", tooltip="One prompt, or several as a list (Prompt Lines)."),
                io.Latent.Input("latent_image", tooltip="An empty latent: its size, and how many pictures a prompt."),
                *_numbers(),
                *_rivals(),
                inputs.negative(),
                io.Vae.Input("vae", optional=True, tooltip="To see the pictures too."),
            ],
            outputs=[
                io.String.Output("table", tooltip="The samplers by their error, for each number of calls."),
                io.Image.Output("plot", tooltip="Error over the number of calls."),
                io.Image.Output("pictures", tooltip="The first prompt's, the nearest framed green, the farthest red."),
            ],
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        one = {name: values[0] for name, values in given.items() if values}
        model = one["model"]
        latent = inputs.empty_latent(model, one["latent_image"], "Compare Solvers")
        calls, reference = numbers(one["calls"]), one.get("reference_calls", 60)
        jobs = jobs_for(model, names(one["samplers"]), names(one["schedulers"]))
        bar = comfy.utils.ProgressBar(10 * total_calls(jobs, calls, reference, len(given["positive"])))
        found = [
            compare(
                guider_for(model, positive, one.get("negative"), one["cfg"]),
                latent,
                one["seed"] + number,
                jobs,
                calls,
                reference,
                lambda cost: bar.update(round(10 * cost)),
            )
            for number, positive in enumerate(given["positive"])
        ]
        text, plot = table(found), error_plot(curves(found))
        pictures, path = sheet(found[0], best_lines(found), one.get("vae")), csv_path()
        write_csv(path, found)
        text = f"{text}\n\nEvery run: {path}"
        shown = {**ui.PreviewText(text).as_dict(), **ui.PreviewImage(plot, cls=cls).as_dict()}
        return io.NodeOutput(text, plot, pictures, ui=shown)


def _numbers() -> list[Any]:
    return [
        inputs.cfg(),
        inputs.numbers_of_calls("Numbers of model calls, separated by commas."),
        io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Of the noise; the next prompt has the "
                     "next seed."),
        io.Int.Input(
            "reference_calls",
            default=60,
            min=20,
            max=1000,
            optional=True,
            advanced=True,
            tooltip="Model calls of the converged picture, and half as many again to learn how exact it is.",
        ),
    ]  # fmt: skip


def _rivals() -> list[Any]:
    return [
        io.String.Input(
            "samplers",
            default=SAMPLERS,
            tooltip="ComfyUI's samplers, by name, separated by commas. One that calls the model twice a step gets half "
            "the steps. Those that add noise on their way have no end to come near, and are left out.",
        ),
        io.String.Input(
            "schedulers",
            default=SCHEDULERS,
            tooltip="ComfyUI's schedulers, separated by commas. Each sampler is tried on all, and shown on its best.",
        ),
    ]


class PromptLines(io.ComfyNode):
    """A prompt a line, as a list of conditionings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverPromptLines",
            display_name="Prompt Lines",
            category="BA-Solver",
            description="A prompt a line, from a box or from a text file, as a list of conditionings.",
            search_aliases=["prompt list", "prompts from file", "batch prompts", "multiple prompts"],
            inputs=[
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.String.Input(
                    "text", multiline=True, default="", tooltip="A prompt a line; empty lines are skipped."
                ),
                io.String.Input(
                    "file",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="A text file in ComfyUI's input folder, such as prompts.txt; its lines come after the "
                    "box's.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", is_output_list=True, tooltip="One for each prompt."),
                io.String.Output("prompts", is_output_list=True, tooltip="The prompts themselves."),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, text: str, file: str = "") -> io.NodeOutput:
        lines = prompt_lines(text + ("\n" + read_user_text(input_file(file)) if file else ""))
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in lines]
        return io.NodeOutput(encoded, lines)

    @classmethod
    def fingerprint_inputs(cls, clip: Any, text: str, file: str = "") -> str:
        try:
            changed = input_file(file).stat().st_mtime_ns if file else 0
        except (OSError, ValueError):
            changed = -1
        return f"{text} {file} {changed}"


def prompt_lines(text: str) -> list[str]:
    """The lines of a text that say something.

    Raises:
        ValueError: there is none.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("There is no prompt. Write one a line into the box, or name a text file.")
    return lines


def input_file(name: str) -> Path:
    """A file in ComfyUI's input folder.

    Raises:
        ValueError: it is outside of it, or not there.
    """
    folder = Path(folder_paths.get_input_directory()).resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise ValueError(f"There is no file {name!r} in ComfyUI's input folder, {folder}.")
    return path


def names(text: str) -> list[str]:
    """'a, b' as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    """'5, 7' as numbers of calls, the least first.

    Raises:
        ValueError: something else than whole numbers from 1 to 1000.
    """
    parts = names(text)
    if not parts or not all(part.isdigit() and 1 <= int(part) <= 1000 for part in parts):
        raise ValueError(f"calls must be whole numbers from 1 to 1000 with commas between, such as 5, 7; got {text!r}.")
    return sorted({int(part) for part in parts})


def csv_path() -> Path:
    """A new file in ComfyUI's output folder."""
    folder = Path(folder_paths.get_output_directory()) / FOLDER
    taken = {path.name for path in folder.glob("compare_*.csv")} if folder.is_dir() else set()
    number = next(n for n in range(1, len(taken) + 2) if f"compare_{n:04d}.csv" not in taken)
    return folder / f"compare_{number:04d}.csv"
