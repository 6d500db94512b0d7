"""``ranks/rank-<r>.jsonl``: what happened on a rank, one JSON object per line, attempt after attempt.

    LOG.info("checkpoint written", extra={"step": 40, "bytes": 1_204_212, "seconds": 0.31})
    {"time": "2026-11-22T18:40:00.123+00:00", "rank": 0, "level": "info", "event": "checkpoint written", "step": 40 ...

It is Python's own ``logging``: whoever has ``logging.getLogger("lora_dropout")`` writes into it, ``extra`` are the
fields. Warnings of transformers and DeepSpeed are in it too. Before a run's folder exists nothing is kept.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.process.rank import rank, world_size
from pipeline.redaction import redacted
from pipeline.supervision.ranks import RANKS_FOLDER

LOG = logging.getLogger("lora_dropout")
LOG.setLevel(logging.INFO)
LOG.propagate = False  # the screen has its own words
LOG.addHandler(logging.NullHandler())  # without it warnings would go to the screen before the file is open

LIBRARIES = ("transformers", "DeepSpeed")
"""Loggers with handlers of their own, so that another one takes nothing from the screen."""

_OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime"}


def rank_log_file(folder: Path, of_rank: int) -> Path:
    """Of the run in this folder."""
    return folder / RANKS_FOLDER / f"rank-{of_rank}.jsonl"


class JsonLines(logging.Formatter):
    """A record as one line: time, rank, level, event, its ``extra`` fields, and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """JSON; what is not JSON is written as its text."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "rank": rank(),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if record.name != LOG.name:
            line["logger"] = record.name
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        fields = {key: value for key, value in vars(record).items() if key not in _OF_EVERY_RECORD}
        told = json.dumps(plain_json({**line, **fields, **line}), default=str)  # the line's own keys stand, and first
        return redacted(told)


class RankLogHandler(logging.FileHandler):
    """Appends whole lines; a write that fails is told once and never ends the run."""

    def __init__(self, file: Path) -> None:
        """Args: file: it is made, or continued on a new line where a killed attempt left half of one."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._warned = False
        super().__init__(file, encoding="utf-8")
        self.setFormatter(JsonLines())
        if _ends_within_a_line(file) and self.stream is not None:
            self.stream.write("\n")

    def handleError(self, record: logging.LogRecord) -> None:
        """Instead of logging's own, which prints a traceback for every record."""
        if self._warned:
            return
        self._warned = True
        reason = sys.exc_info()[1]
        print(f"warning: {self.baseFilename} cannot be written ({reason}); the run goes on", file=sys.stderr)


@contextmanager
def rank_log(folder: Path) -> Iterator[None]:
    """Context in which this rank's log is kept; an exception that leaves it is in the log.

    Args:
        folder: of the run; it exists.
    """
    try:
        handler = RankLogHandler(rank_log_file(folder, rank()))
    except OSError as error:
        print(f"warning: {rank_log_file(folder, rank())}: {error.strerror}; the run goes on", file=sys.stderr)
        yield
        return
    loggers = [LOG, *(logging.getLogger(name) for name in LIBRARIES)]
    libraries = _OnlyWarningsOfLibraries()
    handler.addFilter(libraries)
    for logger in loggers:
        logger.addHandler(handler)
    LOG.info("process", extra={"host": socket.gethostname(), "pid": os.getpid(), "ranks": world_size()})
    try:
        yield
    except Exception as error:
        LOG.error("error", exc_info=True, extra={"kind": type(error).__name__, "text": str(error)})
        raise
    finally:
        LOG.info("process ends", extra={"pid": os.getpid()})
        for logger in loggers:
            logger.removeHandler(handler)
        with suppress(OSError):  # what could not be written has been told
            handler.close()


class _OnlyWarningsOfLibraries(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.name == LOG.name or record.levelno >= logging.WARNING


def _ends_within_a_line(file: Path) -> bool:
    with file.open("rb") as content:
        if content.seek(0, os.SEEK_END) == 0:
            return False
        content.seek(-1, os.SEEK_END)
        return content.read(1) != b"\n"


def plain_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """With the numbers that JSON does not have as words: "nan", "inf", "-inf"."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def read_rank_log(file: Path) -> list[dict[str, Any]]:
    """All lines, oldest first; what a killed process left unfinished is skipped."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
