"""The command line: `ba-solver COMMAND`, also `python -m ba_solver.training`."""

from __future__ import annotations

import sys

USAGE = """ba-solver COMMAND [options]

  demo    sample the shipped model with BA-solver and its rivals: a table and two pictures

ba-solver COMMAND --help shows a command's options."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 = it failed, 2 = wrong usage, 130 = interrupted."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command != "demo":
        print(f"Unknown command {command!r}.\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        # Imported here, so that a missing extra is a sentence and not a traceback.
        import diffusers
        import matplotlib
        import torchdiffeq
        import tyro

        from .demo.show import DemoSettings, UsageError, run_demo
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed. Install the extra: pip install 'ba-solver[bench]'", file=sys.stderr)
        return 1
    del diffusers, matplotlib, torchdiffeq
    try:
        run_demo(tyro.cli(DemoSettings, args=rest, prog="ba-solver demo"))
    except UsageError as error:
        print(f"ba-solver demo: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, ArithmeticError) as error:
        print(f"ba-solver demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; nothing half-written is left.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
