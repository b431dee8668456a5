"""What an interrupted training leaves behind: its account, and results that are read again."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from ..bas_core.files import CheckpointError, read_head, write_text
from .processes import MAIN_PROCESS

Kind = TypeVar("Kind")


class Account(Counter[str]):
    """Model calls by stage, and seconds, kept in a file at every change: a process that is killed has used them too.

    Args:
        path: of the file; where an unfinished training lies beside it, the account goes on from it.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.start, self.earlier = path, time.perf_counter(), 0.0
        if path.exists() and any(path.parent.glob("*.pt")):
            content = read_object(path)
            try:
                self.earlier = float(content["seconds"])
                self.update({str(stage): int(calls) for stage, calls in content["nfe"].items()})
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise _damaged(path, error) from error

    def __setitem__(self, stage: str, calls: int) -> None:
        super().__setitem__(stage, calls)
        self.write()

    @property
    def seconds(self) -> float:
        """So far, with those of earlier processes."""
        return self.earlier + time.perf_counter() - self.start

    def write(self) -> None:
        """Keep it, as it is."""
        if MAIN_PROCESS:
            write_text(self.path, json.dumps({"seconds": round(self.seconds, 1), "nfe": dict(self)}))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of an unfinished training.

    Raises:
        CheckpointError: the file is damaged.
    """
    read_head(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds {type(content).__name__} instead of an object")
    return content


def rebuilt(kind: type[Kind], values: Any, path: Path) -> Kind:
    """A result of which a file holds the fields.

    Raises:
        CheckpointError: they are not its fields.
    """
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({why}). Delete the folder that it lies in, and train again.")
