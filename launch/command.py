"""How every command ends.

    0  finished
    1  a bug, with a traceback; or another process of the run was killed
    2  bad input, or a run that cannot go on as it is (disk full, diverged): the message says what to change
   70  hung: no progress for supervision.hang_minutes, ended by the watchdog
   75  stopped by SIGTERM or SIGUSR1, or with its launcher
  130  stopped by Ctrl-C
  143  stopped by SIGTERM from srun before training, which sends it where one process has failed

After 70, 75 and 130 the same command goes on from the newest checkpoint. These are the statuses of each process;
what launchers make of them is said in pipeline/process/exit_status.py.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import NoReturn

import typer

from pipeline.errors import UserError
from pipeline.process.exit_status import BAD_INPUT, FAILED, INTERRUPTED
from pipeline.process.rank import is_main, launched, rank
from pipeline.redaction import redacted
from pipeline.run.whole_file import DISK_REFUSES
from pipeline.supervision.ending import leave
from pipeline.supervision.ranks import is_of_collective
from pipeline.supervision.watch import Interrupted, LostRank, Watch, watching

__all__ = ["BAD_INPUT", "INTERRUPTED", "run_command", "told_errors"]

STATUSES = (
    "Exit status: 0 finished; 1 a bug, or another process was killed; 2 bad input, or a run that cannot go on as "
    "it is; 70 hung; 75 stopped by SIGTERM or SIGUSR1 (143 by srun, before training); 130 stopped by Ctrl-C. "
    "After 70, 75 and 130 the same command goes on."
)

OTHERS_SECONDS = 5.0
"""How long a process other than the first waits for the launcher to end it, as it does where all found the same."""


def _print_error(message: str, in_full: bool) -> None:
    """On the screen; in one line from processes that mostly found the same as the first."""
    from rich.console import Console
    from rich.text import Text

    message = redacted(message)
    if not is_main():
        message = f"(process {rank()}) {message if in_full else message.splitlines()[0]}"
    Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(message))


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A bug's traceback as python prints it, without tokens that a message may hold."""
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


def _print_end_of_thread(end: threading.ExceptHookArgs) -> None:
    """A bug's traceback; of a disk that takes no more one line, as TensorBoard's thread hands its error on."""
    name = end.thread.name if end.thread is not None else "a thread"
    if isinstance(end.exc_value, OSError) and end.exc_value.errno in DISK_REFUSES:
        print(f"warning: thread {name} cannot write any more: {end.exc_value.strerror}", file=sys.stderr)
    elif end.exc_value is not None and end.exc_type is not SystemExit:
        sys.stderr.write(f"Exception in thread {name}:\n")
        _print_traceback(end.exc_type, end.exc_value, end.exc_traceback)


@contextmanager
def told_errors(watch: Watch | None = None) -> Iterator[None]:
    """Say bad input in words, and exit with its status.

    Args:
        watch: of a command whose processes end together; None, of any other.
    """
    sys.excepthook = _print_traceback
    threading.excepthook = _print_end_of_thread
    try:
        yield
    except UserError as error:
        if watch is not None:
            watch.unwinding()
        in_full = is_main() or watch is None or watch.failed_first
        _print_error(str(error), in_full)
        if watch is not None and not in_full and not _ended_by_launcher(watch):
            _print_error(str(error), in_full=True)  # this process alone found it
        _exit(BAD_INPUT)
    except Interrupted as error:
        if is_main():
            print(f"\n{error}", file=sys.stderr)
        _exit(error.status)
    except LostRank as error:
        assert watch is not None
        watch.end(error.status, str(error), speaks=True)
    except Exception as error:
        if not launched():
            raise
        if watch is not None:
            watch.unwinding()
            if is_of_collective(error) and _ended_by_launcher(watch):
                message = redacted(str(error)).partition("\n")[0]
                watch.end(
                    FAILED, f"process {rank()}: lost another process, which failed first ({message})", speaks=True
                )
        print(f"process {rank()} failed:", file=sys.stderr)
        _print_traceback(type(error), error, error.__traceback__)
        _exit(FAILED)


def _ended_by_launcher(watch: Watch) -> bool:
    """Wait for the launcher, which ends all processes once one has failed."""
    deadline = time.monotonic() + OTHERS_SECONDS
    while watch.stop is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return watch.stop is not None


def _exit(status: int) -> NoReturn:
    """Among others without python's clean-up, which may wait for a process that is gone."""
    if launched():
        leave(status)
    sys.exit(status)


def run_command(command: Callable[..., None], watched: bool = False) -> None:
    """Parse the command line, run, and exit with the status that tells what happened.

    Args:
        command: its options are the command line's.
        watched: whether it trains or evaluates: signals end it with words and its launcher's end ends it.
    """
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command(epilog=STATUSES if watched else None)(command)
    with watching() if watched else nullcontext() as watch, told_errors(watch):
        application()
