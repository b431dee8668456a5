"""The ComfyUI nodes: the only code that knows ComfyUI, and only once ComfyUI asks for it.

`models`, `sampling`, `editing`, `comparing` and `making` are what the nodes are made of, each of those before it;
`*_nodes` are the nodes; `folders` and `ksampler` are what is registered with ComfyUI at load.
"""

from __future__ import annotations

import logging
from typing import Any

OLDEST_COMFYUI = (0, 14, 0)


async def comfy_entrypoint() -> Any:
    """The extension that ComfyUI registers. ComfyUI logs a failure without its traceback, so it is logged here."""
    try:
        return _extension()
    except Exception:
        logging.exception("BA-solver could not be loaded.")
        raise


def _extension() -> Any:
    _check_version()
    from comfy_api.v0_0_2 import ComfyExtension, io

    class BASolverExtension(ComfyExtension):
        async def on_load(self) -> None:
            from . import folders, ksampler

            folders.register()
            ksampler.register()

        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            from .compare_nodes import CompareSolvers, PromptLines
            from .edit_nodes import BAEdit, BAInvert
            from .make_nodes import MakeSideNet
            from .sampling_nodes import BASampler, BAScheduler
            from .sidenet_nodes import ApplySideNet, LoadSideNet, SideNetInfo
            from .sit_nodes import ClassLabel, LoadSiT

            return [
                LoadSideNet,
                ApplySideNet,
                BASampler,
                BAScheduler,
                LoadSiT,
                ClassLabel,
                SideNetInfo,
                BAInvert,
                BAEdit,
                CompareSolvers,
                PromptLines,
                MakeSideNet,
            ]

    return BASolverExtension()


def _check_version() -> None:
    from comfyui_version import __version__

    parts = tuple(int(part) for part in __version__.split(".")[:3] if part.isdecimal())
    if parts < OLDEST_COMFYUI:
        oldest = ".".join(map(str, OLDEST_COMFYUI))
        raise RuntimeError(f"BA-solver needs ComfyUI {oldest} or newer; this is {__version__}. Update ComfyUI.")
