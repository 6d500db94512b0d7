"""Data tokenised once on each node: by the first process that comes, while the others wait for its files.

    $LORA_DROPOUT_CACHE, by default <cache of the library datasets>/lora-dropout-tokens
        <key>/rows/      the entry, see cache_entry.py; the key is a hash of all it depends on, see cache_key.py
        <key>/lock       held by the process that tokenises; its time is that of the last use
        <key>/problem    what the last such process found wrong with the data

No process group is needed, hence nothing times out, however long it takes: this comes before the group. The lock is the
kernel's, which drops it with the process that holds it: where that dies, another one does the work. Entries that have
not been used for 30 days are deleted when a new one is written; all may be deleted at any time when nothing trains.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from pipeline.data.cache_entry import DamagedEntry, read_entry, write_entry
from pipeline.data.cache_key import dependencies, key_of
from pipeline.data.splits import Splits, load_splits
from pipeline.errors import UserError
from pipeline.process.rank import is_main
from pipeline.recipe import Recipe
from pipeline.run.lock import NO_LOCKS

VARIABLE = "LORA_DROPOUT_CACHE"
ROWS, LOCK, PROBLEM = "rows", "lock", "problem"

PATIENCE = 60.0
"""Seconds between two words about waiting."""
HEAD_START = 10.0
"""Seconds that other processes hold a mistake in the data back: the first finds it too, and tells it in full."""
UNUSED = 30 * 24 * 3600.0
"""Seconds after which an entry that nobody used is deleted."""


def cache_folder() -> Path:
    """Where tokenised data is kept: what the environment says, or beside what the library datasets keeps."""
    given = os.environ.get(VARIABLE)
    return Path(given).expanduser() if given else Path(datasets.config.HF_DATASETS_CACHE) / "lora-dropout-tokens"


def cached_splits(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """:func:`pipeline.data.splits.load_splits`, done by one process for all that share the cache folder.

    Its rows are mapped into memory from files that are not to be written to: no ``map`` or ``filter`` on them.

    Raises:
        UserError: see :func:`pipeline.data.splits.load_splits`; the cache folder cannot be written.
    """
    try:
        return _cached(recipe, tokenizer)
    except UserError:
        if not is_main():
            time.sleep(HEAD_START)
        raise


def _cached(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Splits:
    depends_on = dependencies(recipe, tokenizer)
    place = cache_folder() / key_of(depends_on)
    splits = _kept(place)
    if splits is not None:
        return splits
    told_before = _stamp(place / PROBLEM)
    with _cache_errors():
        place.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(place):
            splits = _kept(place, tell=True)
            if splits is not None:
                return splits
            if _stamp(place / PROBLEM) not in (None, told_before):  # found while this process waited
                raise UserError((place / PROBLEM).read_text())
            _tokenise(recipe, tokenizer, depends_on, place)
            splits = _kept(place, tell=True)
    except _NoLocks:
        if is_main():
            print(
                f"warning: {place.parent} has no file locks: every process tokenises for itself. {_ADVICE}", flush=True
            )
        return load_splits(recipe, tokenizer)
    if splits is None:
        raise UserError(f"{place / ROWS}: cannot be read back as it was written. {_ADVICE}")
    _delete_unused()
    return splits


def _tokenise(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, depends_on: dict[str, Any], place: Path) -> None:
    """Do the work, and leave it, or what is wrong with the data, for the others."""
    print(f"tokenising the data on {socket.gethostname()}, for all processes that find it in {place}", flush=True)
    try:
        splits = load_splits(recipe, tokenizer)
        if dependencies(recipe, tokenizer) != depends_on:
            raise UserError("data: a source changed while it was read. Start again when nothing writes to it any more.")
    except UserError as error:
        with _cache_errors():
            (place / PROBLEM).write_text(str(error))
        raise
    with _cache_errors():
        write_entry(place / ROWS, splits, depends_on)
        (place / PROBLEM).unlink(missing_ok=True)


def _kept(place: Path, tell: bool = False) -> Splits | None:
    """What is there and whole.

    Args:
        place: folder of the entry.
        tell: say that it is damaged; the process that is about to replace it does.
    """
    try:
        splits = read_entry(place / ROWS)
    except DamagedEntry as damage:
        if tell:
            print(f"warning: {place / ROWS}: {damage}; the data is tokenised again", flush=True)
        return None
    if splits is not None:
        with suppress(OSError):  # a cache that may only be read serves as well
            os.utime(place / LOCK)
    return splits


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Context that one process at a time is in, on whatever nodes share the folder; waits for the others to be done.

    Raises:
        _NoLocks: it cannot be.
        UserError: the folder cannot be written.
    """
    lock = FileLock(place / LOCK, fallback_to_soft=False)  # a soft lock outlives the process that held it
    began = time.monotonic()
    while True:
        try:
            with _cache_errors():
                lock.acquire(timeout=PATIENCE, poll_interval=0.1)
            break
        except Timeout:
            if is_main():
                minutes = (time.monotonic() - began) / 60
                print(f"waiting for another process, which tokenises the data ({minutes:.0f} min)", flush=True)
    try:
        yield
    finally:
        lock.release()


class _NoLocks(Exception):
    """The file system has no locks."""


_ADVICE = f"Free space, or name another folder with the environment variable {VARIABLE}; it may be local to each node."


@contextmanager
def _cache_errors() -> Iterator[None]:
    """What the system says of the cache folder, in our words."""
    try:
        yield
    except Timeout:  # an OSError, too
        raise
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise _NoLocks from error
        raise UserError(
            f"{cache_folder()}: tokenised data cannot be kept there: {error.strerror}.\n{_ADVICE}"
        ) from error


def _stamp(file: Path) -> tuple[int, int] | None:
    """Changes whenever the file is written; None where there is none."""
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_mtime_ns, status.st_ino


def _delete_unused() -> None:
    """Delete entries that nobody has used for long, and that nobody holds."""
    for lock_file in cache_folder().glob(f"*/{LOCK}"):
        if time.time() - lock_file.stat().st_mtime < UNUSED:
            continue
        lock = FileLock(lock_file, fallback_to_soft=False)
        with suppress(OSError), lock.acquire(timeout=0):  # Timeout is one: held
            shutil.rmtree(lock_file.parent)
