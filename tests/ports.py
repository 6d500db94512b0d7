"""Ports for launchers that want one named: suites that run side by side must not share it."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path

PORTS = range(10000, 20000)
"""Below those that Linux hands out by itself, and those that jobs of SLURM meet at (20000 to 31999)."""


def free_port() -> str:
    """A TCP port that nobody listens on now, given to no other test of this machine before all others were."""
    with open(Path(tempfile.gettempdir()) / f"lora-dropout-test-ports-{os.getuid()}", "a+") as last_one:
        fcntl.flock(last_one, fcntl.LOCK_EX)
        last_one.seek(0)
        number = int(last_one.read() or 0)
        while True:
            number = (number + 1) % len(PORTS)
            with socket.socket() as listener:
                try:
                    listener.bind(("", PORTS[number]))
                except OSError:
                    continue
            last_one.truncate(0)
            last_one.write(str(number))
            return str(PORTS[number])
