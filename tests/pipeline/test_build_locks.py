"""torch's compiler lock: what a killed process left is removed, what a living one holds is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.process.build_locks import ABANDONED_SECONDS, clear_abandoned_build_locks

HOLDER = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_only_a_killed_process_s_lock_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    clear_abandoned_build_locks()
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    old = time.time() - ABANDONED_SECONDS + 1
    os.utime(lock, (old - 3600, old - 3600))
    clear_abandoned_build_locks()
    assert lock.exists() and capsys.readouterr().out == ""
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    old = time.time() - ABANDONED_SECONDS + 1
    os.utime(lock, (old, old))
    clear_abandoned_build_locks()
    assert not lock.exists()
    said = capsys.readouterr().out
    assert "nobody here holds it; waiting for 1 s" in said and f"removed {lock}" in said
