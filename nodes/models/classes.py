"""Names of the classes that SiTs draw, as one searchable list."""

from __future__ import annotations

from pathlib import Path

DEMO_CLASSES = ("disc", "ring", "square", "triangle", "star", "cross", "heart", "crescent", "hourglass", "arrow")
IMAGENET_FILE = Path(__file__).with_name("imagenet_classes.txt")


def _entries(set_name: str, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    return {f"{set_name} {index}: {name}": (index, len(names)) for index, name in enumerate(names)}


# Entry of the list -> (class index, number of classes in its set).
CLASSES: dict[str, tuple[int, int]] = {
    **_entries("demo", DEMO_CLASSES),
    **_entries("ImageNet", tuple(IMAGENET_FILE.read_text(encoding="utf-8").splitlines())),
}


# The entry for one image of each class.
ALL = "all classes, one a picture"


def class_indices(entry: str, index: int, known: int) -> list[int]:
    """The classes of the images of a batch, in turn: one for all of them, or every class of the model.

    Raises:
        ValueError: see `class_index`.
    """
    return list(range(known)) if entry == ALL and index < 0 else [class_index(entry, index, known)]


def class_index(entry: str, index: int, known: int) -> int:
    """The class to draw: `index` if it is not negative, else the list's entry.

    Args:
        entry: a key of CLASSES.
        index: a class number, or -1.
        known: the number of the model's classes.

    Raises:
        ValueError: there is no such class, or it belongs to another set than the model's.
    """
    if index >= 0:
        if index >= known:
            raise ValueError(f"This model has the classes 0 to {known - 1}; index is {index}.")
        return index
    if entry not in CLASSES:
        raise ValueError(f"There is no class {entry!r}. Choose one from the list.")
    listed, size = CLASSES[entry]
    if size != known:
        raise ValueError(
            f"{entry!r} is one of {size} classes, and this model has {known}. Choose a class of its own set "
            f"({'demo' if known == len(DEMO_CLASSES) else 'ImageNet'} …), or set index, under the advanced inputs."
        )
    return listed
