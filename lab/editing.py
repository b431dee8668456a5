"""What inversion and editing do to images whose truth is known: the demo's shapes, on the demo model.

    python -m ba_solver.lab.editing --out runs/editing            # about a quarter of an hour on one core
    python -m ba_solver.lab.editing --out runs/editing --search   # first search every solver's grids

Two tables. *Reconstruction*: an image is taken to noise and back with the same number of calls each way, by each
solver on its own best grid, and the noise is compared with a converged solution's. *Edits*: an image of one class is
regenerated as another. The same drawing with the other class is known, so that what should have stayed can be measured:
the ground, the shape's colour and its place.
Grids and settings are searched on other images than the reported ones; they are kept in `weights/demo_editing.json`.
Every finished seed is on disk: a run that is stopped loses only the one that it was at, and `--parts` runs the rest.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..bas_core.files import write_atomically, write_text
from ..training.demo.assets import WEIGHTS, Demo, load_demo
from .editing_data import REPORT_SEED, EditingSettings, drawn, noise_for
from .edits import EDITS, Task, edit_table, search_edits
from .round_trips import CASES, Case, reconstructions, search_round_trips
from .shapes import CLASS_NAMES

SETTINGS_FILE = WEIGHTS / "demo_editing.json"


def draw_page(path: Path, demo: Demo, calls: int, chosen: dict[str, tuple[float, float]], count: int = 10) -> None:
    """A page of edits: a column an image, a row a method, with the original and the truth above."""
    from matplotlib.figure import Figure

    source = torch.arange(count) % len(CLASS_NAMES)
    target = (source + 3) % len(CLASS_NAMES)
    before, after = drawn(REPORT_SEED + 77, source), drawn(REPORT_SEED + 77, target)
    rows = {"image": before.images, "drawn anew": after.images}
    for name, (label, method) in EDITS.items():
        start, cfg = chosen[name]
        task = Task(before, after, noise_for(before.images, 77), demo.field(source, 1.0), demo.field(target, cfg))
        with torch.inference_mode():
            rows[label] = method(demo, task, calls, start)
    figure = Figure(figsize=(1.9 + count, 1.05 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), count, squeeze=False)
    for line, (label, images) in zip(panels, rows.items(), strict=True):
        for index, panel in enumerate(line):
            picture = images[index].clamp(-1, 1).add(1).div(2).permute(1, 2, 0)
            panel.imshow(picture.numpy(), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for panel, a, b in zip(panels[0], source.tolist(), target.tolist(), strict=True):
        panel.set_title(f"{CLASS_NAMES[a]}\n→ {CLASS_NAMES[b]}", fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    deviation = statistics.pstdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def reconstruction_tables(rows: dict[str, dict[int, list[dict[str, float]]]], case: Case) -> list[str]:
    """One table of the returns, one of the noise."""
    lines = []
    for key, title, digits in (
        ("psnr", "Reconstruction, PSNR in dB", 1),
        ("noise", "Error of the noise, RMSE against a converged solution", 3),
    ):
        held = {label: by for label, by in rows.items() if key in next(iter(by.values()))[0]}
        calls = list(next(iter(held.values())))
        lines += [f"\n### {title}: {case.title}\n"]
        lines += ["| solver | " + " | ".join(f"{n} calls" for n in calls) + " |", "|---" * (len(calls) + 1) + "|"]
        for label, by_calls in held.items():
            cells = (spread([row[key] for row in by_calls[n]], digits) for n in calls)
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The tables as Markdown; those that there are."""
    lines = []
    for name, rows in result["reconstruction"].items():
        lines += reconstruction_tables(rows, CASES[name])
    for calls, by_name in result["edits"].items():
        lines += [f"\n### Edits, all 90 pairs of classes, {calls} calls in all\n"]
        lines += ["| method | start, CFG | target class | ground | colour | place, pixels |", "|---" * 6 + "|"]
        for name, rows in by_name.items():
            cells = [
                spread([100 * row["success"] for row in rows], 1) + " %",
                *(spread([row[key] for row in rows], 3) for key in ("ground", "colour")),
                spread([row["place"] for row in rows], 2),
            ]
            start, cfg = result["settings_found"]["edits"][calls][name]
            lines.append(f"| {EDITS[name][0]} | {start:g}, {cfg:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _by_calls(table: dict[str, Any]) -> dict[int, Any]:
    return {int(calls): value for calls, value in table.items()}


def load_found(path: Path) -> dict[str, Any]:
    """What `--search` wrote."""
    content = json.loads(path.read_text())
    grids = {case: {name: _by_calls(by) for name, by in table.items()} for case, table in content["grids"].items()}
    return {"grids": grids, "edits": _by_calls(content["edits"])}


def load_result(path: Path) -> dict[str, Any]:
    """What an earlier run left; nothing if there was none."""
    if not path.exists():
        return {"reconstruction": {}, "edits": {}}
    content = json.loads(path.read_text())
    cases = {
        case: {name: _by_calls(by) for name, by in rows.items()} for case, rows in content["reconstruction"].items()
    }
    return {"reconstruction": cases, "edits": _by_calls(content["edits"])}


class Benchmark:
    """What has been found so far, written down after every seed."""

    def __init__(self, settings: EditingSettings) -> None:
        self.settings = settings
        self.demo = load_demo(settings.device)
        self.found = load_found(SETTINGS_FILE) if SETTINGS_FILE.exists() else {"grids": {}, "edits": {}}
        self.result = load_result(settings.out / "editing.json")
        self.result["settings"] = {key: str(value) for key, value in asdict(settings).items()}
        self.result["settings_found"] = self.found

    def keep(self) -> None:
        """Write everything but the pictures."""
        if self.settings.search:
            write_text(SETTINGS_FILE, json.dumps(self.found, indent=1))
        write_text(self.settings.out / "editing.json", json.dumps(self.result, indent=1))
        write_text(self.settings.out / "editing.md", markdown(self.result))

    def measure_case(self, name: str) -> None:
        """Reconstructions of one of `CASES`."""
        if self.settings.search:
            self.found["grids"][name] = search_round_trips(self.settings, self.demo, CASES[name])
            self.keep()
        for rows in reconstructions(self.settings, self.demo, CASES[name], self.found["grids"][name]):
            self.result["reconstruction"][name] = rows
            self.keep()

    def measure_edits(self, calls: int) -> None:
        """Edits with a number of calls in all, and a page of them."""
        if self.settings.search:
            self.found["edits"][calls] = search_edits(self.demo, calls)
            self.keep()
        chosen = self.found["edits"][calls]
        draw_page(self.settings.out / f"edits_{calls}.png", self.demo, calls, chosen)
        for rows in edit_table(self.settings, self.demo, calls, chosen):
            self.result["edits"][calls] = rows
            self.keep()


def run_editing(settings: EditingSettings) -> dict[str, Any]:
    """Measure everything, and write it as JSON, Markdown and pages of pictures."""
    benchmark = Benchmark(settings)
    for part in settings.parts:
        if part == "edits":
            for calls in settings.edit_calls:
                benchmark.measure_edits(calls)
        else:
            benchmark.measure_case(part)
    print(markdown(benchmark.result))
    return benchmark.result


if __name__ == "__main__":
    import tyro

    run_editing(tyro.cli(EditingSettings))
