"""Progress bars and messages, all alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], what: str, **options: Any) -> tqdm[T]:
    """A tqdm bar over `items` that names what is being done."""
    return tqdm(items, desc=what, dynamic_ncols=True, mininterval=0.5, smoothing=0.05, **options)


def say(text: str) -> None:
    """A line for the user, above any progress bar."""
    tqdm.write(text, file=sys.stdout)
