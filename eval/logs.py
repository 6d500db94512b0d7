"""Loggers of libraries, where what they say is not for the user, and a progress bar like theirs."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from tqdm import tqdm

from pipeline.observation.status import Task

NOWHERE = open(os.devnull, "w")  # noqa: SIM115  for the life of the process


@contextmanager
def quiet(logger_name: str) -> Iterator[None]:
    """Let only errors of this logger, and of those below it, through."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class CountedBar(tqdm):
    """A progress bar whose count a status file can read, from another thread."""

    current: ClassVar[CountedBar | None] = None
    """The one that is on the screen."""
    system: ClassVar[str] = ""
    """What is evaluated, in words."""

    def __init__(self, total: int, done: int, what: str, disable: bool) -> None:
        """With the time left, as lm-eval draws its own; in a log file it counts unseen."""
        place = None if sys.stderr.isatty() else NOWHERE
        super().__init__(total=total, initial=done, desc=f"Computing {what}", disable=disable, file=place)
        self.what, self.began = what, time.monotonic()
        if not disable:
            CountedBar.current = self

    def close(self) -> None:
        """The task is done."""
        super().close()
        if CountedBar.current is self:
            CountedBar.current = None


def progress_bar(total: int, done: int, what: str, disable: bool) -> tqdm:
    """Of an evaluation, with the time left."""
    return CountedBar(total, done, what, disable)


def current_task() -> Task | None:
    """What an evaluation in this process is computing, if anything."""
    bar = CountedBar.current
    if bar is None:
        return None
    return Task(f"{CountedBar.system}, {bar.what}", int(bar.total), int(bar.n), int(bar.initial), bar.began)
