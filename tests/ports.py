"""Ports for launchers that want one named: suites that run side by side must not share it."""

from __future__ import annotations

import socket


def free_port() -> str:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
