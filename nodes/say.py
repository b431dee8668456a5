"""Warnings that people see: in the log, and on the node."""

from __future__ import annotations

import logging

from comfy_execution.utils import get_executing_context


def warn(message: str) -> None:
    """Log a warning and, where a server is running a node, write it on the node."""
    logging.warning(f"BA-solver: {message}")
    _on_node(f"Note: {message}")


def _on_node(text: str) -> None:
    running = get_executing_context()
    if running is None:
        return
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, running.node_id)


def tell(message: str) -> None:
    """Write on the node what it is doing, and what it has come to in the log."""
    logging.info(f"BA-solver: {message}")
    _on_node(message)
