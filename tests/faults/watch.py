"""What is seen of a running attempt from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faults.runs import Attempt


@dataclass
class Watch:
    """What is seen of a running attempt from outside, in the folder that it writes."""

    folder: Path
    stale: set[str] = field(default_factory=set)
    writes: int = 0
    finished: int = 0
    writing: str | None = None
    history: int = 0
    times: dict[str, list[float]] = field(default_factory=lambda: {"write": [], "step": []})
    _since: float = 0.0
    _size: int = 0
    _next: float = 0.0

    def __post_init__(self) -> None:
        self.stale = self._parts()
        self._size = self._history_bytes()

    def _parts(self) -> set[str]:
        parent = self.folder / "checkpoints"
        return {path.name for path in parent.glob(".checkpoint-*.part")} if parent.exists() else set()

    def _history_bytes(self) -> int:
        file = self.folder / "history.jsonl"
        return file.stat().st_size if file.exists() else 0

    def look(self) -> None:
        """Update the counts of writes begun and ended, and of steps logged."""
        now = time.monotonic()
        parts = self._parts()
        self.stale &= parts
        new = parts - self.stale
        if self.writing is None and new:
            (self.writing,), self._since = new, now
            self.writes += 1
        elif self.writing is not None and self.writing not in new:
            self.writing = None
            self.finished += 1
            self.times["write"].append(now - self._since)
        if now > self._next:  # the history is cut back at a resume, so a step is a file that has grown
            size, self._next = self._history_bytes(), now + 0.01
            if size > self._size:
                self.history += 1
                self.times["step"].append(now)
            self._size = size


def wait_for(attempt: Attempt, watch: Watch, reached: Callable[[Watch], bool]) -> bool:
    """Whether it came to that; False where the command ended first."""
    deadline = time.monotonic() + 900
    while attempt.process.poll() is None:
        watch.look()
        if reached(watch):
            return True
        if time.monotonic() > deadline:
            attempt.end()
            raise TimeoutError(f"nothing happens: {attempt.log}")
        time.sleep(0.001)
    return False
