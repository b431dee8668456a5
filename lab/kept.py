"""Results that are kept, so that a long measurement goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bas_core.files import write_text


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
