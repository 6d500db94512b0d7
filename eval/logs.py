"""Loggers of libraries, where what they say is not for the user, and a progress bar like theirs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


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


def progress_bar(total: int, done: int, what: str, disable: bool) -> tqdm:
    """With the time left, as lm-eval draws its own."""
    return tqdm(total=total, initial=done, desc=f"Computing {what}", disable=disable)
