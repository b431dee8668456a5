"""Progress bars and messages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from .processes import MAIN_PROCESS

T = TypeVar("T")


@dataclass(frozen=True)
class Listener:
    """Functions that receive progress and messages instead of the terminal.

    Attributes:
        say: `(message)`.
        step: `(name of the work, parts done, parts in all or 0)`, before each part; an exception from it ends the work.
        history: `(name of the training, numbers of all reports so far)`.
    """

    say: Callable[[str], None]
    step: Callable[[str, int, int], None]
    history: Callable[[str, list[dict[str, float]]], None]


_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send all progress and messages to a listener instead of the terminal."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Bar(tqdm):
    """A tqdm bar that calls the listeners."""

    what = ""

    def __iter__(self) -> Iterator[Any]:
        for done, item in enumerate(super().__iter__(), self.n):
            for listener in _listeners:
                listener.step(self.what, done, self.total or 0)
            yield item


def progress(items: Iterable[T], what: str, **options: Any) -> tqdm[T]:
    """A tqdm bar over `items`; `what` names the work."""
    silent = not MAIN_PROCESS or bool(_listeners)
    bar = Bar(items, desc=what, dynamic_ncols=True, mininterval=0.5, smoothing=0.05, disable=silent, **options)
    bar.what = what  # tqdm itself drops it where the bar is silent
    return bar


def say(text: str) -> None:
    """Print a line above any progress bar."""
    for listener in _listeners:
        listener.say(text)
    if MAIN_PROCESS and not _listeners:
        tqdm.write(text, file=sys.stdout)


def tell_history(what: str, history: list[dict[str, float]]) -> None:
    """Send a training's reports to the listeners."""
    for listener in _listeners:
        listener.history(what, history)
