"""Texts that users write: prompts and settings."""

from __future__ import annotations

import codecs
from pathlib import Path

from ..bas_core.files import CheckpointError

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_user_text(path: Path | str) -> str:
    """A text that a user wrote, as other programs save it: in UTF-8 with or without byte-order marks, line ends as they
    come; the marks are dropped and lines end in a newline.

    Raises:
        OSError: it cannot be read.
        CheckpointError: it is in another encoding, or no text; the message says which and what to do.
    """
    raw = Path(path).read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if raw.startswith(mark)), "")
    if not encoding and b"\0" in raw:
        encoding = "UTF-16 without its mark, or no text at all: it holds zero bytes"
    if encoding:
        raise CheckpointError(f"{path} is {encoding}. Save it as UTF-8.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise CheckpointError(
            f"{path} is not UTF-8: line {line} holds the byte 0x{raw[error.start]:02x}. Save it as UTF-8."
        ) from error
    # Marks stand within a text too, where files were put together.
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
