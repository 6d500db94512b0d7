"""Signals, and the launcher's life: what may end this process from outside.

Python runs signal handlers on the main thread alone, and only between two of its instructions: never while it is
blocked in a collective. So a thread of its own reads what ``signal.set_wakeup_fd`` writes, and can end the process.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, NoReturn

import psutil

from pipeline.process.exit_status import INTERRUPTED, STOPPED, TERMINATED
from pipeline.process.rank import ended_by_srun, is_main
from pipeline.supervision.ending import leave, with_patience, write_error
from pipeline.supervision.launcher import in_words, is_gone, launchers, orphaned

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

REPEATED_SECONDS = 3.0
"""A second signal within this time is a launcher passing on the first, as torchrun does after the terminal has: it does
not count."""

LAUNCHERS_PATIENCE = 25.0
"""Seconds from a signal to the end at the latest: deepspeed, torchrun and SLURM kill after 30."""

SAVING_PATIENCE = 120.0
"""Seconds from a signal to the end at the latest, where the step's end was reached and a checkpoint is being saved."""

UNWINDING_SECONDS = 5.0
"""What the main thread has to end by itself outside of training, where nothing is saved."""

AFTER_THE_STEP = "after this step, with a checkpoint"

TICK = 0.5
"""Seconds between two looks at the launchers: each reads a few lines of /proc."""


class Interrupted(BaseException):
    """A signal has ended the command; not an ``Exception``, so that no library takes it for one of its own errors.

    Attributes:
        status: to exit with.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class LostRank(BaseException):
    """Another rank failed first; not an ``Exception``, since nothing can be done about it here.

    Attributes:
        status: to exit with.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Stop:
    """Why this process is to stop."""

    cause: str
    """In words, after "stopped by"."""
    status: int
    """To exit with."""
    at: float
    """``time.monotonic()`` of its arrival."""
    patience: float = LAUNCHERS_PATIENCE
    """Seconds to the end of the step."""
    final: bool = False
    """Nothing extends the patience: the launcher is gone."""


class Watch:
    """Of one process; see :func:`watching`.

    Outside :meth:`deferring` a signal raises :class:`Interrupted` in the main thread. Inside, it is noted in ``stop``,
    which the training loop reads at each step's end.

    Attributes:
        stop: the reason to stop, once there is one.
        kept: what is kept if the process stops now; a clause after "stopped by SIGTERM".
        newest: where a run that trains would go on, in words.
        checks: called by the thread twice a second.
        farewells: called with exit status and message before the thread ends the process; they get 3 s.
    """

    def __init__(self) -> None:
        self.stop: Stop | None = None
        self.kept = "before training began; nothing is lost, the same command starts again"
        self.newest = "the same command goes on from the newest checkpoint"
        self.checks: list[Callable[[], None]] = []
        self.farewells: list[Callable[[int, str], None]] = []
        self.failed_first = False
        """Whether this rank's failure was the run's first: it is said in full, whichever rank it is."""
        self.slowest_step = 0.0
        """Seconds, validation included; a scheduler's early warning (SIGUSR1) waits for twice as long."""
        self._deferred = False
        self._deferred_until = 0.0
        self._saving, self._stopping = False, AFTER_THE_STEP
        self._raised = False
        self._seen: dict[int, float] = {}
        self._launchers = launchers()
        self._orphaned = orphaned()
        self._ending = threading.Lock()

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Context in which a signal waits for the end of the step."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred, self._deferred_until = False, time.monotonic()
            self._saving, self._stopping = False, AFTER_THE_STEP

    @contextmanager
    def keeping(self, kept: str) -> Iterator[None]:
        """Context in which a stop is said with these words."""
        before, self.kept = self.kept, kept
        try:
            yield
        finally:
            self.kept = before

    def agreed(self, status: int) -> None:
        """The end of the step is reached, all ranks stop, and a checkpoint is being written."""
        if self.stop is None:  # the signal went to another rank
            self.stop = Stop("a signal to another rank", status, time.monotonic())
        else:
            self.stop = replace(self.stop, status=status)
        self._saving = True

    def writing(self) -> None:
        """Training is done and its results are being written: they get a checkpoint's patience."""
        self._saving, self._stopping = True, "when the adapter is written"

    def unwinding(self) -> None:
        """The process is about to end by itself, with words of its own: signals raise nothing any more."""
        self._raised = True

    def interrupted(self) -> Interrupted:
        """What to raise for the stop that has come."""
        assert self.stop is not None
        return Interrupted(self.stop.status, f"stopped by {self.stop.cause} {self.kept}")

    def end(self, status: int, message: str, speaks: bool | None = None) -> NoReturn:
        """End the process now, from any thread, whatever the main thread is blocked in.

        Args:
            status: to exit with.
            message: for the screen and for the farewells.
            speaks: whether the message goes to the screen; None, on rank 0 only.
        """
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is at it
        if is_main() if speaks is None else speaks:
            write_error(f"\n{message}\n")  # on a line of its own, after a progress bar's
        with_patience(lambda: [farewell(status, message) for farewell in self.farewells], 3.0)
        leave(status)

    def run(self, signals: int) -> None:
        """The thread: read the signals' numbers from a file descriptor until it is closed at the other end."""
        while True:
            ready, _, _ = select.select([signals], [], [], TICK)
            if ready:
                numbers = os.read(signals, 64)
                if not numbers:
                    return
                for number in numbers:
                    self._arrived(number)
            self._look()
            for check in self.checks:
                check()

    def handler(self, number: int, frame: FrameType | None) -> None:
        """Of all three signals, on the main thread."""
        self._note(number)
        if not self._deferred and not self._raised:
            self._raised = True
            raise self.interrupted()

    def _note(self, number: int) -> None:
        """Keep the first signal; SIGTERM after SIGUSR1 is in more of a hurry, Ctrl-C has a status of its own."""
        now = time.monotonic()
        self._seen.setdefault(number, now)
        if self.stop is None:
            patience = LAUNCHERS_PATIENCE
            if number == signal.SIGUSR1:
                patience = max(patience, 2 * self.slowest_step)
            self.stop = Stop(_named(number), self._status(number), now, patience)
            if self._deferred and is_main():
                once_more = f"once more, after {REPEATED_SECONDS:.0f} s, stops at once"
                write_error(f"\n{_named(number)}: stopping {self._stopping}; {once_more}\n")
        elif number != signal.SIGUSR1 and self.stop.patience > LAUNCHERS_PATIENCE:
            self.stop = Stop(_named(number), self.stop.status, now)

    def _status(self, number: int) -> int:
        """To exit with, at this first signal."""
        if number == signal.SIGINT:
            return INTERRUPTED
        return TERMINATED if number == signal.SIGTERM and not self._deferred and ended_by_srun() else STOPPED

    def _arrived(self, number: int) -> None:
        """A signal, in the thread: the first is the main thread's business, the second ends."""
        if number not in SIGNALS:
            return
        again = time.monotonic() - self._seen.get(number, time.monotonic()) > REPEATED_SECONDS
        impatient = number == signal.SIGINT and self.stop is not None and _age(self.stop) > REPEATED_SECONDS
        self._note(number)
        assert self.stop is not None
        if again or impatient:
            self.end(self.stop.status, f"stopped at once, by a second {_named(number)}; {self._newest()}")

    def _look(self) -> None:
        """See whether the launchers live, and end the process where its time is over."""
        if self.stop is None or not self.stop.final:
            gone = next((process for process in self._launchers if is_gone(process)), None)
            if gone is not None or self._orphaned:
                self.stop = self._without_launcher(gone)
        if self.stop is None:
            return
        if self._deferred:
            patience = SAVING_PATIENCE if self._saving and not self.stop.final else self.stop.patience
            if _age(self.stop) > patience:
                late = "what was being saved was not whole" if self._saving else "the end of the step was not reached"
                self.end(
                    self.stop.status, f"stopped by {self.stop.cause}: {late} within {patience:.0f} s; {self._newest()}"
                )
        elif self.stop.final or time.monotonic() - max(self.stop.at, self._deferred_until) > UNWINDING_SECONDS:
            self.end(self.stop.status, str(self.interrupted()))

    def _without_launcher(self, gone: psutil.Process | None) -> Stop:
        """The stop for a launcher that is gone, which leaves a stop that has begun no more time than it had."""
        if self.stop is not None:
            return replace(self.stop, patience=min(self.stop.patience, LAUNCHERS_PATIENCE), final=True)
        which = "its launcher" if gone is None else in_words(gone)
        return Stop(f"the end of {which}", STOPPED, time.monotonic(), final=True)

    def _newest(self) -> str:
        return self.newest if self._deferred else self.kept


_active: Watch | None = None


def _forget_in_child() -> None:
    """A forked child (a worker that tokenises or loads data) is ended by plain SIGTERM, and tells its parent nothing.

    It would write the signal's number into the pipe that its parent reads.
    """
    global _active
    if _active is None:
        return
    _active = None
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def watching() -> Iterator[Watch]:
    """Context in which signals and launchers are watched; inside another one, that one.

    Signals belong to the process, so the watch does: a module's variable. Where python's main thread is another one
    (a server that calls us from a thread), signals are left alone and launchers watched.
    """
    global _active
    if _active is not None:
        yield _active
        return
    watch = _active = Watch()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    main = threading.current_thread() is threading.main_thread()
    previous: dict[signal.Signals, Any] = {}
    previous_descriptor = -1
    thread = threading.Thread(target=watch.run, args=(reader,), name="watch", daemon=True)
    thread.start()
    try:
        if main:
            previous_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            previous = {number: signal.signal(number, watch.handler) for number in SIGNALS}
        yield watch
    finally:
        _active = None
        if main:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_descriptor)
        os.close(writer)  # the thread reads its end
        thread.join(timeout=5)
        os.close(reader)


def _named(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _age(stop: Stop) -> float:
    return time.monotonic() - stop.at
