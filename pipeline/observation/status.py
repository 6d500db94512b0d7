"""``status.json``: how a run is doing, for a person and for a queue script.

Rank 0 writes the file whole, aside and then in place of the last one, so that whoever reads it never sees half of it.
A run that is killed cannot say so: its status stays "running" and grows old, which :func:`sign_of_life` tells.

Nothing here imports torch: ``launch/status.py`` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pipeline.observation.rank_log import LOG, plain_json
from pipeline.process.exit_status import FINISHED, INTERRUPTED, STOPPED
from pipeline.process.rank import is_main, rank, world_size
from pipeline.redaction import redacted
from pipeline.supervision.pulse import Pulse

STATUS_FILE = "status.json"

State = Literal["running", "stopped", "finished", "failed"]

MISSED_BEATS, GRACE_SECONDS = 3, 5.0
"""A running process that has missed so many heartbeats, and this long for a slow file system, is taken for gone."""

PATIENCE = 5.0
"""Seconds that a writer waits for another thread's write. A watchdog must end a run whose main thread hangs in one."""


@dataclass
class Status:
    """The keys of ``status.json``. Times are UTC, ISO 8601, to the second."""

    state: State = "running"
    """`stopped`: by a signal, with a checkpoint; the same command goes on. `failed`: see `message`."""
    phase: str = "starting"
    """starting, tokenising, loading, training, measuring, saving, evaluating, ended."""
    step: int = 0
    """Optimizer steps done."""
    steps: int = 0
    """Of the whole run; 0 until it is known."""
    epoch: float | None = None
    loss: float | str | None = None
    """Of the last training line: nats per trained token. "nan" and "inf" are words, since JSON has no such number."""
    tokens_per_second: float | None = None
    """Of the last training line, over all ranks."""
    seconds_left: float | None = None
    """Of training, or in the evaluation of what is being computed, at the mean speed so far."""
    last_checkpoint: str | None = None
    """Relative to the run's folder."""
    task: str | None = None
    """In the evaluation: what is being computed."""
    share: float | None = None
    """Of it that is done, from 0 to 1."""
    host: str = ""
    """Of rank 0."""
    rank: int = 0
    pid: int = 0
    ranks: int = 1
    started: str = ""
    """This attempt."""
    updated: str = ""
    heartbeat_seconds: float = 10.0
    """At least as often the file is written while the run lives."""
    resumed_from: int | None = None
    """Step of the checkpoint from which this attempt went on."""
    attempts: int = 1
    """Starts of this run, this one included."""
    message: str | None = None
    """Why it stopped or failed."""
    exit_status: int | None = None
    """None while it runs."""


@dataclass
class Task:
    """What an evaluation is computing; its progress bar counts."""

    what: str
    total: int
    done: int
    before: int
    """Of those done, what was known from the start and took no time."""
    began: float
    """``time.monotonic()``."""

    @property
    def seconds_left(self) -> float | None:
        """At the mean speed so far; None before anything was computed."""
        computed = self.done - self.before
        return (self.total - self.done) * (time.monotonic() - self.began) / computed if computed else None


class RunStatus:
    """Writer of a run's ``status.json``. On ranks other than the first it writes nothing.

    The main thread changes ``now`` and calls :meth:`write`; :meth:`beat` is for the heartbeat's thread.
    """

    def __init__(
        self,
        folder: Path,
        heartbeat_seconds: float = 10.0,
        evaluates: bool = False,
        goes_on: bool = False,
        before: Status | None = None,
    ) -> None:
        """Start an attempt; those before are counted in the file that is there.

        Args:
            folder: of the run; it exists where rank 0 is.
            heartbeat_seconds: between two writes.
            evaluates: the run is trained, and what is known of that stays.
            goes_on: this process will evaluate when it has trained: the run is not finished until then.
            before: of the attempt before, where its file has been deleted; None: read it.
        """
        self.file = folder / STATUS_FILE
        self.task: Callable[[], Task | None] = lambda: None
        """Gives what an evaluation is computing."""
        self._pulse: Pulse | None = None
        self._goes_on = goes_on
        self._writes = is_main()
        self._lock = threading.Lock()
        self._warned = False
        before = before or (read_status(folder) if self._writes else None) or Status(attempts=0)
        trained = before if evaluates else Status(attempts=before.attempts + 1, last_checkpoint=before.last_checkpoint)
        self.now = replace(
            trained,
            state="running",
            phase="evaluating" if evaluates else "starting",
            seconds_left=None,
            host=socket.gethostname(),
            rank=rank(),
            pid=os.getpid(),
            ranks=world_size(),
            started=_now(),
            heartbeat_seconds=heartbeat_seconds,
            message=None,
            exit_status=None,
        )
        if self._writes and not evaluates:
            self._remove_leftovers()
        self.write()

    def beat(self, pulse: Pulse) -> None:
        """A sign of life: write, with what the main thread says it does or how it ended, now and from now on."""
        self._pulse = pulse
        self._follow_pulse()  # on all ranks: each has a log
        self.write()

    def end(self, exit_status: int, message: str = "") -> None:
        """The last word, where no pulse tells it; the first one stands."""
        self._note_end(exit_status, message)
        self.write()

    def write(self) -> None:
        """Replace the file. Where that fails (full disk, read-only) the run goes on, with one warning."""
        if not self._writes or not self._lock.acquire(timeout=PATIENCE):
            return
        try:
            self._follow_pulse()
            self._count_task()
            self.now.updated = _now()
            aside = self.file.with_name(f".{STATUS_FILE}.{self.now.pid}")
            aside.write_text(json.dumps(plain_json(asdict(self.now)), indent=2) + "\n")
            os.replace(aside, self.file)
        except OSError as error:
            self._warn(error)
        finally:
            self._lock.release()

    def _follow_pulse(self) -> None:
        """Phase, step and end as the main thread tells the heartbeat."""
        pulse, now = self._pulse, self.now
        if pulse is None:
            return
        now.phase, now.step, now.steps = pulse.phase, max(pulse.step, now.step), max(pulse.steps, now.steps)
        if pulse.exit_status == FINISHED and self._goes_on:
            now.phase, now.seconds_left = "evaluating", None
        elif pulse.exit_status is not None:
            self._note_end(pulse.exit_status, pulse.message)

    def _note_end(self, exit_status: int, message: str) -> None:
        now = self.now
        if now.state != "running":
            return
        now.state, now.phase, now.exit_status = state_of(exit_status), "ended", exit_status
        now.message, now.seconds_left = redacted(message) or None, None
        level = logging.ERROR if now.state == "failed" else logging.INFO
        LOG.log(level, now.state, extra={"exit_status": exit_status, "step": now.step, "text": now.message})

    def _count_task(self) -> None:
        """Progress of an evaluation."""
        task = self.task()
        self.now.task = task.what if task else None
        self.now.share = task.done / task.total if task and task.total else None
        if self.now.phase == "evaluating":
            self.now.seconds_left = task.seconds_left if task else None

    def _remove_leftovers(self) -> None:
        """What an attempt left that was killed while it wrote."""
        for aside in self.file.parent.glob(f".{STATUS_FILE}.*"):
            aside.unlink(missing_ok=True)

    def _warn(self, error: OSError) -> None:
        if self._warned:
            return
        self._warned = True
        reason = error.strerror or str(error)
        print(f"warning: {self.file} cannot be written ({reason}); the run goes on without it", file=sys.stderr)


def state_of(exit_status: int) -> State:
    """How a run ended, from the status that its command exits with (launch/command.py)."""
    if exit_status == FINISHED:
        return "finished"
    return "stopped" if exit_status in (STOPPED, INTERRUPTED) else "failed"


def read_status(folder: Path) -> Status | None:
    """Of the run in this folder; None where there is none, or nothing that can be read as one."""
    try:
        found = json.loads((folder / STATUS_FILE).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    known = {field.name for field in fields(Status)}  # of another version, more keys or fewer
    status = Status(**{key: value for key, value in found.items() if key in known})
    try:
        age_seconds(status)
    except (TypeError, ValueError):
        return None
    return status


def age_seconds(status: Status) -> float:
    """Since the last sign of life, by this machine's clock."""
    return max((datetime.now(UTC) - datetime.fromisoformat(status.updated)).total_seconds(), 0.0)


def sign_of_life(status: Status) -> bool:
    """Whether a run that says it runs has been heard of lately; a run that has ended need not be."""
    return status.state != "running" or age_seconds(status) <= MISSED_BEATS * status.heartbeat_seconds + GRACE_SECONDS


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
