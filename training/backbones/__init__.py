"""Backbones to record: a kind of model a file, and a line here."""

from __future__ import annotations

import importlib
from typing import Any

from ..settings import UsageError, check_device
from .base import CORE_MODES, Backbone, BackboneChoice

# kind -> module of this folder; it has `open_backbone(where, choice, device)`.
BACKBONES = {
    "sit": "sit",
    "diffusers": "diffusers",
    "python": "python",
}


def open_backbone(choice: BackboneChoice) -> Backbone:
    """The backbone that `--backbone kind:where` names.

    Raises:
        UsageError: an unknown kind, or settings that it has no use for.
        FileNotFoundError, CheckpointError: there is no such model, or it is damaged.
    """
    kind, colon, where = choice.backbone.partition(":")
    if kind not in BACKBONES or not colon or not where:
        shapes = ", ".join(f"{name}:…" for name in BACKBONES)
        raise UsageError(
            f"--backbone must be a kind, a colon and where the model is ({shapes}), such as "
            f"sit:weights/demo_sit.safetensors; got {choice.backbone!r}."
        )
    module: Any = importlib.import_module(f".{BACKBONES[kind]}", __package__)
    backbone: Backbone = module.open_backbone(where, choice, check_device(choice.device))
    return backbone


__all__ = ["BACKBONES", "CORE_MODES", "Backbone", "BackboneChoice", "open_backbone"]
