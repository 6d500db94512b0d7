"""One training run in a folder at a time: a lock that ends with the process that holds it.

`<output>/.<name>.lock` lies beside the run's folder, so that deleting the run (`--overwrite`) does not delete a lock
that is held. The lock itself is the kernel's (flock), which drops it with the process, even at SIGKILL. Over NFS the
server keeps it, and where a whole machine dies NFS 4 drops it some 90 s later.

Some mounts keep a lock to the machine that took it and answer others that it is free: BeeGFS unless
``tuneUseGlobalFileLocks`` is set, ``localflock`` of Lustre, ``local_lock`` of NFS; some have no locks. So the holder
writes process and host into the file and touches it every few seconds, and whoever finds another machine's name there
listens for a while. Two who start at once are told apart before they write (:func:`check_held`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import UserError
from pipeline.process.rank import is_main

PATIENCE = 40.0
"""Seconds to wait for the holder: the ranks of a killed launcher may live for 30 s more."""

TOUCH_SECONDS, LOOK_SECONDS, SILENT_SECONDS = 5.0, 0.5, 30.0
"""Between two touches of the holder; between two looks of who listens; after which silence the holder is gone."""

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems answer that are mounted without locks, some Lustre and NFS."""

GONE = (errno.ENOENT, errno.ESTALE)
"""What is answered of a file that was deleted, by NFS also while it is read."""


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
        UserError: another process trains there; its host and number. The folder above it cannot be made, or written.
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
    try:
        _take(lock, file, folder, patience)
    except OSError as error:
        raise UserError(f"output: {file} cannot be written: {error.strerror}.\nChoose another output.") from error
    with suppress(OSError):  # the lock holds on a full disk, too
        file.write_text(_this_process())
    try:
        with _touched(file):
            yield
    finally:
        with suppress(OSError):  # a disk that takes no more is told by whoever met it first
            if _content(file) in ("", _this_process()):
                file.unlink()  # while it is held: a process that waits for this very file then makes it anew
        lock.release()


def check_held(folder: Path) -> None:
    """Refuse, on rank 0 and before it writes into the folder, where another machine took the lock at the same time.

    Raises:
        UserError: another process trains there; its host and number.
    """
    file = lock_file(folder)
    if _content(file) not in ("", _this_process()):
        raise _refusal(file, folder, "started at the same time")


def was_killed(folder: Path) -> bool:
    """Whether the process that last trained into a folder ended without a word: its lock is free, its file is there.

    False where that cannot be told: on file systems without locks, and of a process on another machine.
    """
    try:
        with lock_file(folder).open() as file:
            if not file.read().endswith(_here()):
                return False
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go when the file is closed
    except OSError:  # held; or no such file
        return False
    return True


def _this_process() -> str:
    return f"process {os.getpid()}{_here()}"


def _here() -> str:
    """How what a lock file holds ends on this machine."""
    return f" on {socket.gethostname()}"


@contextmanager
def _touched(file: Path) -> Iterator[None]:
    """Context in which the file's time goes on, however long a step takes; not that of a process that is suspended."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(TOUCH_SECONDS):
            with suppress(OSError):
                if _content(file) == _this_process():
                    os.utime(file)

    thread = threading.Thread(target=touch, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _take(lock: FileLock, file: Path, folder: Path, patience: float) -> None:
    """Take the lock. Where its last holder is one whose lock this machine may not see, listen for it first."""
    while True:
        locked = _acquired(lock, file, folder, patience)
        last = _content(file)
        if not last or (locked and last.endswith(_here())) or not _ends(file, folder, patience):
            return
        lock.release()  # it was of a file that its holder has deleted


def _ends(file: Path, folder: Path, patience: float) -> bool:
    """Listen to the last holder: True once it has ended and deleted its file; False where nothing is heard of it.

    Raises:
        UserError: it lives, and has not ended in time.
    """
    print(f"{folder}: {_holder(file)} trained there and did not say that it ended; listening for it", flush=True)
    began, silent, stamp = time.monotonic(), 0.0, _stamp(file)
    while stamp is not None and silent < SILENT_SECONDS:
        time.sleep(LOOK_SECONDS)
        before, stamp = stamp, _stamp(file)
        if stamp is None or stamp[0] != before[0]:
            return True
        silent = silent + LOOK_SECONDS if stamp == before else 0.0  # counted in answers: a file server may stall
        if silent == 0.0 and time.monotonic() - began > patience:
            raise _refusal(file, folder, f"has not ended within {patience:g} s")
    return stamp is None


def _stamp(file: Path) -> tuple[int, int] | None:
    """Number of the file and nanoseconds of its time; opened for it, since NFS asks its server then. None: no file."""
    try:
        with file.open() as opened:
            found = os.fstat(opened.fileno())
    except OSError as error:
        if error.errno in GONE:
            return None
        raise
    return found.st_ino, found.st_mtime_ns


def _acquired(lock: FileLock, file: Path, folder: Path, patience: float) -> bool:
    """Whether the lock is held now; False where the file system has no locks."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{folder}: {_holder(file)} is training there; waiting up to {patience:g} s for it to end", flush=True)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    else:
        return True
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise _refusal(file, folder, f"has not ended within {patience:g} s") from error
    return True


def _refusal(file: Path, folder: Path, reason: str) -> UserError:
    return UserError(
        f"{folder}: {_holder(file)} is training into this folder, and {reason}.\n"
        "Wait until it has ended, end it, or give this run another name (name=...) or place (output=...)."
    )


def _holder(file: Path) -> str:
    """Who wrote the lock file last."""
    return _content(file) or "another process"


def _content(file: Path) -> str:
    """Empty where the file has just been deleted."""
    try:
        return file.read_text()
    except OSError as error:
        if error.errno in GONE:
            return ""
        raise
