"""Progress bars and messages, all alike."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
# Of several processes (`accelerate launch`) one speaks; the variables are torch's convention.
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def progress(items: Iterable[T], what: str, **options: Any) -> tqdm[T]:
    """A tqdm bar over `items` that names what is being done."""
    return tqdm(
        items, desc=what, dynamic_ncols=True, mininterval=0.5, smoothing=0.05, disable=not MAIN_PROCESS, **options
    )


def say(text: str) -> None:
    """A line for the user, above any progress bar."""
    if MAIN_PROCESS:
        tqdm.write(text, file=sys.stdout)
