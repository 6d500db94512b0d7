"""The lock of torch's compiler, which a killed process leaves behind for ever.

DeepSpeed's operators are compiled, and at every later start looked at, under ``FileBaton`` (torch/utils/file_baton.py),
an empty file that others wait for without end: after a SIGKILL in that second, every run of this user hangs while it
starts. Seen in torch 2.13; delete when FileBaton tells a lock whose holder is gone.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

ABANDONED_SECONDS = 60.0
"""Age of a lock that nobody here holds from which it counts as left behind: on a shared home, the holder may be on
another machine, and a look at what is compiled already takes it a second or so."""


def extensions_folder() -> Path:
    """Where torch keeps what it has compiled."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")


def clear_abandoned_build_locks() -> None:
    """Wait for locks whose holder is unknown, and remove those that are abandoned; returns at once without any."""
    folder = extensions_folder()
    for lock in (*folder.glob("*/lock"), *folder.glob("*/*/lock")):
        told = False
        while (age := _age(lock)) is not None and not _held(lock):
            if age > ABANDONED_SECONDS:
                lock.unlink(missing_ok=True)
                print(f"warning: removed {lock}, which a killed process had left", flush=True)
                break
            if not told:
                print(f"{lock}: nobody here holds it; waiting for {ABANDONED_SECONDS - age:.0f} s", flush=True)
                told = True
            time.sleep(0.5)


def _age(lock: Path) -> float | None:
    """In seconds; None once it is gone."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None


def _held(lock: Path) -> bool:
    """Whether a process of this user, on this machine, has it open, as its holder does until it releases it."""
    import psutil  # not before there is a lock

    here = str(lock.resolve())
    for process in psutil.process_iter():
        try:
            if any(file.path == here for file in process.open_files()):
                return True
        except (psutil.Error, OSError):  # another user's, or just ended
            continue
    return False
