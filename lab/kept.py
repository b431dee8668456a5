"""Results that are kept, so that a long measurement goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bas_core.files import write_text
from ..training.progress import say


def kept(path: Path, key: Any, work: Callable[[], Any]) -> Any:
    """What `work` returns, as JSON has it; from the file if it was written for the same key.

    Args:
        path: of the file.
        key: everything that the result depends on, as JSON has it.
        work: called without arguments where nothing is kept.
    """
    wanted = json.loads(json.dumps(key))
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["key"] == wanted:
            return known["result"]
    result = json.loads(json.dumps(work()))
    write_text(path, json.dumps({"key": wanted, "result": result}, indent=1))
    return result


def write_report(path: Path, result: Any, text: str) -> None:
    """Write a result as JSON and its tables as Markdown, to `path` with these suffixes, and say the tables."""
    write_text(path.with_suffix(".json"), json.dumps(result, indent=1))
    write_text(path.with_suffix(".md"), text.rstrip("\n") + "\n")
    say(text)
