"""In which call a process's main thread is: for its heartbeat, and for who looks why a run hangs."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

REPOSITORY = Path(__file__).resolve().parents[2]
COLLECTIVES = ("torch.distributed", "deepspeed.comm")
"""Packages whose functions wait for other ranks."""


def current_call() -> str:
    """Of the main thread: "torch.distributed.all_reduce, called from pipeline/trainer.py:120 (training_step)".

    Outside of collectives the innermost function is named.
    """
    frames = list(_main_frames())
    if not frames:
        return "unknown"
    named = next((frame for frame in frames if _is_collective(frame)), frames[0])
    called = next((_place(frame) for frame in frames if _is_ours(frame) and frame is not named), None)
    name = f"{_module(named)}.{named.f_code.co_name}, line {named.f_lineno}"
    return f"{name}, called from {called}" if called else name


def main_stack() -> str:
    """The main thread's stack as in a traceback, outermost call first."""
    frame = sys._current_frames().get(_main_ident())
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


def _main_ident() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident


def _main_frames() -> Iterator[FrameType]:
    """Innermost first. ``sys._current_frames`` is documented, for debugging deadlocks."""
    frame = sys._current_frames().get(_main_ident())
    while frame is not None:
        if not _module(frame).startswith("pipeline.supervision"):  # which asks
            yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "?"))


def _is_collective(frame: FrameType) -> bool:
    """Not what wraps one, to log it."""
    return _module(frame).startswith(COLLECTIVES) and frame.f_code.co_name not in ("wrapper", "log_wrapper")


def _is_ours(frame: FrameType) -> bool:
    file = Path(frame.f_code.co_filename)
    return file.is_relative_to(REPOSITORY) and "site-packages" not in file.parts


def _place(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename).relative_to(REPOSITORY)
    return f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"
