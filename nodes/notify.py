"""Messages that people see, in ComfyUI's log and on the node that runs."""

from __future__ import annotations

import logging

from comfy_execution.utils import get_executing_context


def warn(message: str) -> None:
    """Log a warning, and show it on the node."""
    logging.warning(f"BA-solver: {message}")
    _show_on_node(f"Note: {message}")


def inform(message: str) -> None:
    """Log a message, and show it on the node."""
    logging.info(f"BA-solver: {message}")
    _show_on_node(message)


def _show_on_node(text: str) -> None:
    running = get_executing_context()
    if running is None:  # outside a server's queue
        return
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, running.node_id)
