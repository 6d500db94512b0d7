"""The end of a process at once, from any of its threads."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import psutil


def leave(status: int) -> NoReturn:
    """End the process without python's clean-up, in which destructors of process groups wait for ranks that are gone.

    Its children (workers that tokenise, or load data) go first: nobody else would end them.
    """
    with_patience(_flush, 1.0)  # another thread may hold the stream
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(status)


def with_patience(work: Callable[[], object], seconds: float) -> None:
    """Do it, but do not wait longer: a file system may hang."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()


def write_error(message: str) -> None:
    """To the screen, past the buffer, whose lock the main thread may hold."""
    with suppress(OSError):  # the terminal may be gone
        os.write(2, message.encode())
