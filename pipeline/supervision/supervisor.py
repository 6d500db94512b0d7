"""Watches over one training run: see :func:`supervised`."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from accelerate import PartialState

from pipeline.errors import UserError
from pipeline.process.exit_status import BAD_INPUT, FAILED, FINISHED, HUNG
from pipeline.process.rank import rank, world_size
from pipeline.recipe import schema
from pipeline.redaction import redacted
from pipeline.supervision.ending import with_patience, write_error
from pipeline.supervision.pulse import Beat, Phase, Pulse
from pipeline.supervision.ranks import Failure, Ranks, clear_ranks, first_on_node, is_of_collective, speaks_first
from pipeline.supervision.watch import Interrupted, LostRank, Watch, watching
from pipeline.supervision.whereabouts import current_call, main_stack

LOOK_SECONDS = 1.0
"""Between two looks at the other ranks."""

OWN_WORDS_SECONDS = 3.0
"""What the main thread has, once another rank has failed, to meet the closed connection and end by itself."""

TELLING_SECONDS = 5.0
"""How long a rank whose collective broke waits to learn which rank failed: a shared file system may lag."""

WATCHED: tuple[Phase, ...] = ("training", "measuring", "saving")
"""In which the watchdog expects progress; loading a large base may take any time."""

MOST_LISTED = 32
"""Ranks that the watchdog lists."""


class Supervisor:
    """What runs beside training on every rank.

    Attributes:
        pulse: the main thread tells it what it does.
        watch: signals and launchers.
        ranks: the other ranks.
    """

    def __init__(self, folder: Path, settings: schema.Supervision, beats: Sequence[Beat], watch: Watch) -> None:
        self.folder, self.settings, self.watch = folder, settings, watch
        self.pulse = Pulse()
        self.ranks = Ranks(folder)
        self._beats = list(beats)
        self._ended = threading.Event()
        self._warned = False
        self._beating = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """The first sign of life, and the thread."""
        self.beat()
        self.watch.checks.append(self._check_hang)
        self.watch.farewells.append(self.end)
        self._thread.start()

    def end(self, status: int, message: str) -> None:
        """The last sign of life."""
        self.pulse.end(status, message)
        self._ended.set()
        self.beat()

    def close(self) -> None:
        """Leave the watch as it was."""
        self._ended.set()
        self.watch.checks.remove(self._check_hang)
        self.watch.farewells.remove(self.end)
        self._thread.join(timeout=5)

    def beat(self) -> None:
        """Write this rank's file and call the beats. Where a disk is full the run goes on, with one warning."""
        if not self._beating.acquire(timeout=5):  # the other thread hangs in a file system
            return
        try:
            self.ranks.write(self.pulse, current_call())
            for beat in self._beats:
                beat(self.pulse)
        except OSError as error:
            if not self._warned:
                self._warned = True
                write_error(f"warning: {speaks_first()}no sign of life can be written: {error}; the run goes on\n")
        finally:
            self._beating.release()

    def first_failure(self, patience: float) -> Failure | None:
        """The rank that failed first, once this one has met the end of a collective.

        Args:
            patience: seconds to wait for word of it.
        """
        deadline = time.monotonic() + patience
        while True:
            failure = self.ranks.first_failure() or self.ranks.lost()
            if failure is not None or time.monotonic() > deadline:
                return failure
            time.sleep(0.2)

    def _run(self) -> None:
        """The heartbeat's thread."""
        written = time.monotonic()
        while not self._ended.wait(min(LOOK_SECONDS, self.settings.heartbeat_seconds)):
            if time.monotonic() - written >= self.settings.heartbeat_seconds:
                written = time.monotonic()
                self.beat()
            if world_size() > 1:
                self._look_at_others()

    def _look_at_others(self) -> None:
        failure = self.ranks.first_failure()
        if failure is None:
            lost = self.ranks.lost()
            if lost is None or self._agreed(lost):
                return
            failure = self.ranks.fail(lost)
        if self._ended.wait(OWN_WORDS_SECONDS):
            return
        self.watch.end(failure.status, lost_words(failure), speaks=True)

    def _agreed(self, lost: Failure) -> bool:
        """Whether a rank has only ended sooner than this one, by the same signal."""
        return self.watch.stop is not None and lost.status == self.watch.stop.status

    def _check_hang(self) -> None:
        """The watchdog; in the watch's thread, which does not depend on disks."""
        idle = time.monotonic() - self.pulse.progressed
        if self.pulse.phase in WATCHED and idle > 60 * self.settings.hang_minutes:
            self._hang(idle)

    def _hang(self, idle: float) -> NoReturn:
        """Say which ranks are where, and end."""
        call = current_call()
        words = f"made no progress for {idle:.0f} s: {self.pulse.phase}, step {self.pulse.step}, in {call}"
        failure = Failure(rank(), HUNG, words)
        first: list[Failure] = []
        others: list[str] = []

        def tell() -> None:
            first.append(self.ranks.fail(failure, f"{speaks_first()}{words}\n\n{main_stack()}"))
            others.extend(self._whereabouts())

        with_patience(tell, 5.0)  # a disk may be what hangs
        if first and first[0] != failure:
            self.watch.end(first[0].status, lost_words(first[0]), speaks=True)
        listed = "".join(f"\n  {line}" for line in others)
        self.watch.end(
            HUNG,
            f"hung: no progress for {idle:.0f} s (supervision.hang_minutes: {self.settings.hang_minutes:g})\n"
            f"  rank {rank()}: {self.pulse.phase}, step {self.pulse.step}, in {call}{listed}\n"
            "The rank that is in no collective, or at an earlier step, is the one the others wait for. "
            f"The stack is in {self.ranks.folder}; the same command goes on from the newest checkpoint.",
            speaks=True,
        )

    def _whereabouts(self) -> Iterator[str]:
        """One line for each other rank, from its last sign of life."""
        for other in range(min(world_size(), MOST_LISTED)):
            told = self.ranks.told(other)
            if other != rank() and told is not None:
                age = time.time() - told["time"]
                yield (
                    f"rank {other} on {told['host']}, {age:.0f} s ago: {told['phase']}, step {told['step']}, "
                    f"for {told['idle_seconds']:.0f} s in {told['call']}"
                )


def lost_words(failure: Failure) -> str:
    """The one line of a rank that ends because of another one."""
    if failure.rank == rank():  # another rank has seen it first
        return f"rank {rank()} {failure.words}"
    return f"rank {rank()}: ends, since rank {failure.rank} {failure.words}"


@contextmanager
def supervised(folder: Path, settings: schema.Supervision, beats: Sequence[Beat] = ()) -> Iterator[Supervisor]:
    """Context in which a run is watched over; every rank enters it together.

    Args:
        folder: of the run; it exists where rank 0 is.
        settings: the recipe's.
        beats: called every ``heartbeat_seconds`` by a thread, and at the end; an ``OSError`` of theirs is told once.

    Raises:
        LostRank: in place of this rank's own exception, where another rank failed first.
        Interrupted: a signal.
    """
    if first_on_node():
        clear_ranks(folder)
    PartialState().wait_for_everyone()
    with watching() as watch:
        supervisor = Supervisor(folder, settings, beats, watch)
        supervisor.start()
        try:
            yield supervisor
        except Interrupted as error:
            supervisor.end(error.status, str(error))
            raise
        except UserError as error:
            _fail(supervisor, error, BAD_INPUT, str(error))
            raise
        except Exception as error:
            _fail(supervisor, error, FAILED, f"{type(error).__name__}: {error}")
            raise
        else:
            supervisor.end(FINISHED, "")
        finally:
            supervisor.close()


def _fail(supervisor: Supervisor, error: Exception, status: int, message: str) -> None:
    """Tell the other ranks; if one of them failed before, say that instead.

    Raises:
        LostRank: another rank failed first.
    """
    supervisor.watch.unwinding()
    message = redacted(message)
    first_line = message.splitlines()[0]
    words = f"failed: {first_line}"
    if world_size() > 1:
        lost = supervisor.first_failure(TELLING_SECONDS if is_of_collective(error) else 0.0)
        stack = redacted(traceback.format_exc() if status == FAILED else message)
        first = supervisor.ranks.fail(lost or Failure(rank(), status, words), stack)
        if first.rank != rank():
            told = lost_words(first)
            supervisor.end(first.status, told)
            raise LostRank(first.status, told) from error
    supervisor.watch.failed_first = True
    supervisor.end(status, message)
