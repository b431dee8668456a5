"""Messages that people see, in ComfyUI's log and on the node that runs."""

from __future__ import annotations

import logging

from comfy_execution.utils import get_executing_context

# What was warned of on nodes of the prompt that runs: (prompt, node, message).
_warned: set[tuple[str, str, str]] = set()


def log(message: str) -> None:
    """Log a message."""
    logging.info(f"BA-solver: {message}")


def warn(message: str) -> None:
    """Log a warning, and show it on the node; once, though a node may sample many tiles."""
    running = get_executing_context()
    if running is not None:
        key = (running.prompt_id, running.node_id, message)
        if key in _warned:
            return
        _warned.difference_update([other for other in _warned if other[0] != running.prompt_id])
        _warned.add(key)
    logging.warning(f"BA-solver: {message}")
    _show_on_node(f"Note: {message}")


def inform(message: str) -> None:
    """Log a message, and show it on the node."""
    log(message)
    _show_on_node(message)


def _show_on_node(text: str) -> None:
    running = get_executing_context()
    if running is None:  # outside a server's queue
        return
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, running.node_id)
