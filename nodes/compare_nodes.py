"""The nodes Compare Solvers and Prompt Lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.v0_0_2 import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..training.text_files import read_user_text
from . import inputs
from .comparing.compare import Comparison, compare, jobs_for, total_calls
from .comparing.table import curves, picture_grid, table, write_csv
from .notify import log, warn
from .report import error_plot
from .sampling.guider import guider_for

SAMPLERS = "euler, heun, dpm_2, dpmpp_2m, uni_pc, ipndm"
SCHEDULERS = "simple, beta"
CSV_NAME = "ba_solver/compare"


class CompareSolvers(io.ComfyNode):
    """Samplers beside each other on the user's own model and prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverCompare",
            display_name="Compare Solvers (BA-Solver)",
            category="BA-Solver",
            description="Draw the same noise by several samplers with the same number of model calls, and measure how "
            "far each ends from the converged picture. BA-Solver takes part with the MODEL's SideNet and without it.",
            search_aliases=["benchmark", "compare samplers", "sampler comparison", "XY plot", "NFE"],
            is_input_list=True,  # all prompts of a list at once
            is_output_node=True,
            inputs=[
                inputs.model_with_sidenet(),
                io.Conditioning.Input("positive", tooltip="One prompt, or a list of prompts from Prompt Lines."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent. It sets the size, and the number of pictures for each prompt.",
                ),
                *_number_inputs(),
                *_sampler_inputs(),
                inputs.negative(),
                io.Vae.Input("vae", optional=True, tooltip="The VAE. It is only needed for the output pictures."),
            ],
            outputs=[
                io.String.Output("table", tooltip="The samplers by their error, for each number of model calls."),
                io.Image.Output("plot", tooltip="The error over the number of model calls."),
                io.Image.Output(
                    "pictures",
                    tooltip="The first prompt's pictures, a row for each number of model calls: the converged picture, "
                    "then the samplers in the order of the table. Needs the VAE.",
                ),
            ],
        )

    @classmethod
    def execute(cls, **listed: Any) -> io.NodeOutput:
        one = {name: values[0] for name, values in listed.items() if values}
        model, vae = one["model"], one.get("vae")
        latent = inputs.latent_of(model, one["latent_image"], "Compare Solvers")
        calls, reference = numbers(one["model_calls"]), one.get("reference_steps", 60)
        jobs = jobs_for(model, names(one["samplers"]), names(one["schedulers"]))
        bar = comfy.utils.ProgressBar(10 * total_calls(jobs, calls, reference, len(listed["positive"])))
        comparisons = [
            compare(
                guider_for(model, positive, one.get("negative"), one["cfg"]),
                latent,
                one["seed"] + number,
                jobs,
                calls,
                reference,
                lambda nfe: bar.update(round(10 * nfe)),
            )
            for number, positive in enumerate(listed["positive"])
        ]
        if not any(comparison.rows for comparison in comparisons):
            raise ValueError("Every sampler was left out, and nothing can be compared; the log says why.")
        plot = error_plot(curves(comparisons))
        text = f"{table(comparisons)}\n\n{written(comparisons)}"
        log(f"\n{text}")
        shown = {**ui.PreviewText(text).as_dict(), **ui.PreviewImage(plot, cls=cls).as_dict()}
        return io.NodeOutput(text, plot, pictures_or_none(comparisons, vae), ui=shown)


def written(comparisons: list[Comparison]) -> str:
    """Writes every sampling to a file, and says where it is, or why it is not there; the table is not lost with it."""
    try:
        path = csv_path()
        write_csv(path, comparisons)
    except OSError as error:
        warn(f"the file of every sampling cannot be written. {error}")
        return f"The file of every sampling could not be written: {error}"
    return f"Every sampling: {path}"


def pictures_or_none(comparisons: list[Comparison], vae: Any) -> Any:
    """The grid of pictures. Nothing behind the output runs without a VAE or where it fails; the rest does."""
    if vae is None:
        return ExecutionBlocker(None)
    try:
        return picture_grid(comparisons, vae)
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:  # whatever a VAE raises
        warn(f"the pictures cannot be shown. {error}")
        return ExecutionBlocker(None)


def _number_inputs() -> list[Any]:
    return [
        inputs.sampling_cfg(),
        io.String.Input("model_calls", default="5, 7, 10", tooltip="The numbers of model calls, separated by commas."),
        io.Int.Input(
            "seed",
            **inputs.SEEDS,
            tooltip="The seed of the first prompt's noise. Each further prompt has the next one.",
        ),
        io.Int.Input(
            "reference_steps",
            default=60,
            min=20,
            max=1000,
            **inputs.RARE,
            tooltip="The number of steps of the converged picture. Half as many again measure how exact it is.",
        ),
    ]


def _sampler_inputs() -> list[Any]:
    return [
        io.String.Input(
            "samplers",
            default=SAMPLERS,
            tooltip="The names of ComfyUI's samplers, separated by commas. A sampler that calls the model twice a step "
            "gets half the steps. Samplers that add noise in every step are left out, because they do not converge.",
        ),
        io.String.Input(
            "schedulers",
            default=SCHEDULERS,
            tooltip="The names of ComfyUI's schedulers, separated by commas. Each sampler is tried with all of them, "
            "and shown with its best.",
        ),
    ]


class PromptLines(io.ComfyNode):
    """Every line of a text as a prompt: a list of conditionings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BASolverPromptLines",
            display_name="Prompt Lines (BA-Solver)",
            category="BA-Solver",
            description="Encode every line of a text box or of a text file as a prompt: a list of conditionings.",
            search_aliases=["prompt list", "prompts from file", "batch prompts", "multiple prompts"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.String.Input(
                    "text", multiline=True, default="", tooltip="The prompts, one a line. Empty lines are skipped."
                ),
                io.String.Input(
                    "file",
                    default="",
                    **inputs.RARE,
                    tooltip="A text file in ComfyUI's input folder, such as prompts.txt. Its lines follow those of the "
                    "text box.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", is_output_list=True, tooltip="A conditioning for each prompt."),
                io.String.Output("prompts", is_output_list=True, tooltip="The prompts as text."),
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
    """The lines of a text without the empty ones.

    Raises:
        ValueError: all are empty.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("There is no prompt. Write one a line into the text box, or name a text file.")
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
    """'5, 7' as numbers of model calls, the least first.

    Raises:
        ValueError: a part is not a whole number from 1 to 1000.
    """
    parts = names(text)
    if not parts or not all(part.isdigit() and 1 <= int(part) <= 1000 for part in parts):
        raise ValueError(
            f"model_calls must be whole numbers from 1 to 1000 with commas between, such as 5, 7; got {text!r}."
        )
    return sorted({int(part) for part in parts})


def csv_path() -> Path:
    """A new file in ComfyUI's output folder, numbered as its images are."""
    folder, name, number, *_ = folder_paths.get_save_image_path(CSV_NAME, folder_paths.get_output_directory())
    return Path(folder) / f"{name}_{number:05}_.csv"
