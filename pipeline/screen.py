"""What the measuring commands share: files to write are checked before the work, and progress is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from pipeline.errors import UserError

PICTURES = (".svg", ".png", ".pdf")
"""Formats of a plot, by suffix."""


def check_output_file(option: str, file: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Refuse a file that could not be written when the work is done.

    Args:
        option: that named it.
        file: None: nothing to check.
        suffixes: allowed ones; none: any.

    Raises:
        UserError: another suffix; a folder of this name; no folder, or no writable one, to put it in.
    """
    if file is None:
        return
    if suffixes and file.suffix not in suffixes:
        expected = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise UserError(f"{option}: found {file.name!r}, expected a name that ends in {expected}")
    if file.is_dir():
        raise UserError(f"{option}: {file} is a folder; expected the name of a file")
    if not file.parent.is_dir():
        raise UserError(f"{option}: the folder {file.parent} does not exist; create it, or name another")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{option}: {file} is not writable; name another file")


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Takes lines about progress: one that changes on a terminal, each on its own in a log.

    Args:
        console: for them, standard error.
    """
    if console.is_terminal:
        with console.status("starting") as status:
            yield status.update
    else:
        yield lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
