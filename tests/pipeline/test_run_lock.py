"""Two runs never train into one folder; a killed one leaves no lock behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.run.lock import lock_file, only_run, was_killed

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.run.lock import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path, repository: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains into ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_with_the_first_ones_host_and_process(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    said = rf"process {holder.pid} on {os.uname().nodename} is training into this folder"
    with pytest.raises(UserError, match=said), only_run(tmp_path / "run", patience=0.3):
        pass
    with only_run(tmp_path / "other", patience=0):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    with only_run(tmp_path / "run", patience=5):
        assert f"process {os.getpid()} on " in lock_file(tmp_path / "run").read_text()
    assert not lock_file(tmp_path / "run").exists()


def test_other_ranks_do_not_lock(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with only_run(tmp_path / "run", patience=0):
        assert f"process {holder.pid} " in lock_file(tmp_path / "run").read_text()


def test_a_killed_run_is_known_at_once(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Not one that lives, nor one on another machine, nor one that has ended well, nor one that never was."""
    run = tmp_path / "run"
    assert not was_killed(run)
    holder.kill()
    holder.wait()
    assert was_killed(run)
    lock_file(run).write_text(f"process {holder.pid} on other-{os.uname().nodename}")  # its lock may be seen only there
    assert not was_killed(run)
    with only_run(run):
        assert not was_killed(run)
    assert not was_killed(run) and not was_killed(tmp_path / "never")
