"""Any model at all: `python:package.module:function`, a function that returns a `Backbone`. See docs/training.md."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from ..settings import UsageError
from .base import DIFFUSERS_ONLY, Backbone, BackboneChoice


def open_backbone(where: str, choice: BackboneChoice, device: torch.device) -> Backbone:
    """Call `function(device, dtype)` of a module that can be imported, from the current folder too.

    Raises:
        UsageError: there is no such module or function, or it returns something else.
    """
    choice.refuse_unused("python", *DIFFUSERS_ONLY)
    module_name, colon, name = where.partition(":")
    if not colon or not name:
        raise UsageError(f"A python backbone is named python:package.module:function; got python:{where}.")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise UsageError(
            f"There is no module {module_name} to import. Call ba-solver from the folder that holds it, or set "
            "PYTHONPATH."
        ) from error
    make = getattr(module, name, None)
    if not callable(make):
        raise UsageError(f"Module {module_name} has no function {name}.")
    backbone = make(device, choice.torch_dtype())
    if not isinstance(backbone, Backbone):
        raise UsageError(f"{where} must return a ba_solver.training.backbones.Backbone; got {type(backbone).__name__}.")
    return backbone
