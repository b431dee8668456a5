"""The ComfyUI nodes: the only code that imports ComfyUI, and not before ComfyUI loads the pack.

The nodes are in `*_nodes`, built on `models`, `sampling`, `editing`, `comparing` and `making`; `folders` and `ksampler`
register the pack's folders and its sampler. Start reading at `sampling/sampler.py`.
"""

from __future__ import annotations

import logging
from typing import Any

OLDEST_COMFYUI = (0, 14, 0)


async def comfy_entrypoint() -> Any:
    """The extension that ComfyUI registers. A failure is logged here, since ComfyUI logs it without the traceback."""
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
            from .edit_nodes import BAEdit, BAInvert, BAReconstruct
            from .make_nodes import MakeSideNet
            from .sampling_nodes import BASampler, BAScheduler
            from .sidenet_nodes import ApplySideNet, SideNetInfo
            from .sit_nodes import ClassLabel, LoadSiT

            return [
                ApplySideNet,
                BASampler,
                BAScheduler,
                LoadSiT,
                ClassLabel,
                SideNetInfo,
                BAInvert,
                BAEdit,
                BAReconstruct,
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
