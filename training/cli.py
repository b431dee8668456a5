"""The command line: `ba-solver COMMAND`, also `python -m ba_solver.training`."""

from __future__ import annotations

import importlib
import io
import sys
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command: what it does, and where its settings and its work are.

    Attributes:
        help: one line.
        module: of this package, imported only when the command is called.
        settings: name of the dataclass in it.
        run: name of the function in it that takes the settings.
        lower: the flag to lower when the GPU's memory is too small.
        needs: modules to look for before the work starts, because they are imported late.
    """

    help: str
    module: str
    settings: str
    run: str
    lower: str = "--batch"
    needs: tuple[str, ...] = ()


COMMANDS = {
    "make": Command(
        "record and train in a row: a SideNet for your model",
        "make",
        "MakeSettings",
        "run_make",
        needs=("matplotlib",),
    ),
    "record": Command(
        "record sampling trajectories of a model",
        "recording.record",
        "RecordSettings",
        "run_record",
        "--record-batch, or use --offload",
    ),
    "train": Command(
        "train a SideNet from recorded trajectories", "train", "TrainSettings", "run_train", needs=("matplotlib",)
    ),
    "evaluate": Command(
        "measure a SideNet beside other solvers",
        "measuring.evaluate",
        "EvaluateSettings",
        "run_evaluate",
        "--noise-batch",
        ("matplotlib",),
    ),
    "sample": Command("draw images, with a SideNet or with any other solver", "sample", "SampleSettings", "run_sample"),
    "compare": Command(
        "drawn images beside exact ones of other noises, as distributions",
        "compare",
        "CompareSettings",
        "run_compare",
        "--count",
    ),
    "convert": Command("an official SideNet (.pt) to safetensors", "sidenet_files", "ConvertSettings", "run_convert"),
    "info": Command("a SideNet file's purpose, training and quality", "sidenet_files", "InfoSettings", "run_info"),
    "demo": Command(
        "sample the shipped model with BA-solver and its rivals: a table and two pictures",
        "demo.show",
        "DemoSettings",
        "run_demo",
        "--nfe",
        ("diffusers", "matplotlib", "torchdiffeq"),
    ),
}

USAGE = "\n".join(
    [
        "ba-solver COMMAND [options]\n",
        *(f"  {name:<10}{command.help}" for name, command in COMMANDS.items()),
        "\nba-solver COMMAND --help shows a command's options; --config FILE.toml reads them from a file.",
    ]
)

# What a missing module is part of; everything else comes with torch.
EXTRAS = {
    "tyro": "train",
    "tqdm": "train",
    "matplotlib": "train",
    "accelerate": "train",
    "tensorboard": "train",
    "tomli": "train",
    "torchdiffeq": "bench",
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "sentencepiece": "diffusers",
    "PIL": "diffusers",
}
DEMO_EXTRAS = dict.fromkeys(EXTRAS, "bench")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 = it failed, 2 = wrong usage, 130 = interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks must not end the work
            stream.reconfigure(errors="backslashreplace")
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name not in COMMANDS:
        print(f"Unknown command {name!r}.\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return run(name, COMMANDS[name], rest)
    except ModuleNotFoundError as error:
        extras = DEMO_EXTRAS if name == "demo" else EXTRAS
        module = (error.name or str(error)).partition(".")[0]
        if module not in extras:
            raise
        print(
            f"{module} is not installed. Install the extra: pip install 'ba-solver[{extras[module]}]'", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("Interrupted; nothing half-written is left, and the same command continues.", file=sys.stderr)
        return 130


def run(name: str, command: Command, rest: list[str]) -> int:
    """Read a command's settings and do its work; failures become a sentence and an exit status."""
    # Imported here, so that a missing extra gives a sentence and not a traceback.
    from torch import OutOfMemoryError

    from .presets import PRESETS
    from .settings import UsageError, read_settings

    program = f"ba-solver {name}"
    for needed in command.needs:
        importlib.import_module(needed)
    module: Any = importlib.import_module(f".{command.module}", __package__)
    try:
        settings = read_settings(getattr(module, command.settings), rest, program, PRESETS if name == "make" else ())
        getattr(module, command.run)(settings)
    except UsageError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except OutOfMemoryError as error:
        print(f"{program}: the GPU's memory is too small ({str(error).splitlines()[0]}) Lower {command.lower}, "
              "or see docs/training.md, section Memory.", file=sys.stderr)  # fmt: skip
        return 1
    except (OSError, ValueError, ArithmeticError) as error:
        print(f"{program} failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
