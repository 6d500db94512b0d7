"""One training run in a folder at a time: a lock that ends with the process that holds it.

`<output>/.<name>.lock` lies beside the run's folder, so that deleting the run (`--overwrite`) does not delete a lock
that is held. The lock itself is the kernel's (flock), which drops it with the process, even at SIGKILL: no lock is ever
stale. Over NFS the server keeps it. The file holds process and host, for messages and for :func:`was_killed`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import UserError
from pipeline.process.rank import is_main

PATIENCE = 40.0
"""Seconds to wait for the holder: the ranks of a killed launcher may live for 30 s more."""

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems answer that are mounted without locks, some Lustre and NFS."""


def lock_file(folder: Path) -> Path:
    """Of the run in this folder."""
    folder = folder.absolute()
    return folder.parent / f".{folder.name}.lock"


@contextmanager
def only_run(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Context in which no other run trains into the folder; rank 0 holds the lock for all of its run.

    Args:
        folder: the run's; need not exist.
        patience: seconds to wait for another process to end.

    Raises:
        UserError: another process trains there; its host and number. The folder above it cannot be made.
    """
    if not is_main():
        yield
        return
    file = lock_file(folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {file.parent} cannot be made: {error.strerror}.\nChoose another output.") from error
    lock = FileLock(file, fallback_to_soft=False)  # a soft lock is stale after SIGKILL
    if not _acquired(lock, file, folder, patience):
        print(f"warning: {file.parent} has no file locks: see to it that no second run trains into {folder}")
        yield
        return
    with suppress(OSError):  # the lock holds on a full disk, too
        file.write_text(f"process {os.getpid()}{_here()}")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: a process that waits for this very file then makes it anew
        lock.release()


def was_killed(folder: Path) -> bool:
    """Whether the process that last trained into a folder ended without a word: its lock is free, its file is there.

    False where that cannot be told: on file systems without locks, and of a process on another machine, whose lock is
    not seen from here where a mount keeps locks to itself (``local_lock`` of NFS, ``localflock`` of Lustre).
    """
    try:
        with lock_file(folder).open() as file:
            if not file.read().endswith(_here()):
                return False
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go when the file is closed
    except OSError:  # held; or no such file
        return False
    return True


def _here() -> str:
    """How what a lock file holds ends on this machine."""
    return f" on {socket.gethostname()}"


def _acquired(lock: FileLock, file: Path, folder: Path, patience: float) -> bool:
    """Whether the lock is held now; False where the file system has no locks."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{folder}: {_holder(file)} is training there; waiting up to {patience:g} s for it to end", flush=True)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise UserError(f"output: {file} cannot be written: {error.strerror}.\nChoose another output.") from error
    else:
        return True
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise UserError(
            f"{folder}: {_holder(file)} is training into this folder, and has not ended within {patience:g} s.\n"
            "Wait until it has, end it, or give this run another name (name=...) or place (output=...)."
        ) from error
    return True


def _holder(file: Path) -> str:
    """Who wrote the lock file last."""
    try:
        return file.read_text() or "another process"
    except FileNotFoundError:  # it has just ended
        return "another process"
