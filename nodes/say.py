"""Warnings that people see: in the log, and on the node."""

from __future__ import annotations

import logging


def warn(message: str, node_id: str | None = None) -> None:
    """Log a warning and, where a node is running in a server, write it on the node."""
    logging.warning(f"BA-solver: {message}")
    if node_id is None:
        return
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(f"Note: {message}", node_id)
