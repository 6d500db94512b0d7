"""How every command ends: 0 done, 2 bad input (said without a traceback), 130 interrupted (typer's)."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import typer

from pipeline.errors import UserError
from pipeline.processes import is_main, rank
from pipeline.redaction import redacted

BAD_INPUT = 2
INTERRUPTED = 130


def _print_error(message: str) -> None:
    """On the screen in full from the first process; one line from each other, which mostly found the same."""
    from rich.console import Console
    from rich.text import Text

    message = redacted(message).encode(errors="backslashreplace").decode()  # names of files need not be text
    if not is_main():
        message = f"(process {rank()}) {message.splitlines()[0]}"
    Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(message))


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A bug's traceback as python prints it, without tokens that a message may hold."""
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


@contextmanager
def told_errors() -> Iterator[None]:
    """Say bad input in words, and exit with its status."""
    sys.excepthook = _print_traceback
    try:
        yield
    except UserError as error:
        _print_error(str(error))
        sys.exit(BAD_INPUT)


def run_command(command: Callable[..., None]) -> None:
    """Parse the command line, run, and exit with the status that tells what happened."""
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command()(command)
    with told_errors():
        application()
