"""What a process is doing: told by its main thread, read by its heartbeat thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

Phase = Literal["starting", "tokenising", "loading", "training", "measuring", "saving", "evaluating", "ended"]


class Pulse:
    """The state of one process, and when its main thread last got on.

    Attributes:
        phase: what the main thread is at.
        step: optimizer steps done.
        steps: optimizer steps of the whole run; 0 until training begins.
        progressed: ``time.monotonic()`` of the last sign that the main thread gets on.
        message: how the run ended, in one or two sentences; "" while it runs.
        exit_status: as in :mod:`launch.command`; None while it runs.
    """

    def __init__(self) -> None:
        self.phase: Phase = "starting"
        self.step = 0
        self.steps = 0
        self.progressed = time.monotonic()
        self.message = ""
        self.exit_status: int | None = None

    def progress(self, phase: Phase | None = None, step: int | None = None, steps: int | None = None) -> None:
        """The main thread got on; what is None stays as it is."""
        if phase is not None:
            self.phase = phase
        if step is not None:
            self.step = step
        if steps is not None:
            self.steps = steps
        self.progressed = time.monotonic()

    def end(self, exit_status: int, message: str = "") -> None:
        """The run is over; the first end told stands."""
        if self.exit_status is None:
            self.message, self.exit_status = message, exit_status
            self.phase = "ended"


Beat = Callable[[Pulse], None]
"""Called by the heartbeat thread every ``supervision.heartbeat_seconds``, and once after the end (phase "ended")."""
