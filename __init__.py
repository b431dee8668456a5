"""BA-solver: flow-matching models sampled in 5-10 backbone calls. See README.md; the solver is in `bas_core`."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """ComfyUI's way in; imported when it asks, so that the package works without ComfyUI."""
    from .nodes import comfy_entrypoint as entrypoint

    return await entrypoint()
