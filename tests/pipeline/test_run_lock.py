"""Two runs never train into one folder; a killed one leaves no lock behind."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.run import lock
from pipeline.run.lock import check_held, lock_file, only_run, was_killed

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


def test_a_killed_run_leaves_no_lock(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    holder.send_signal(signal.SIGKILL)
    with only_run(tmp_path / "run", patience=5):
        assert f"process {os.getpid()} on " in lock_file(tmp_path / "run").read_text()
    assert "listening" not in capsys.readouterr().out  # the lock of this machine says enough
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
    here = lock_file(run).read_text()
    lock_file(run).write_text(f"process {holder.pid} on other-{os.uname().nodename}")  # its lock may be seen only there
    assert not was_killed(run)
    lock_file(run).write_text(here)
    with only_run(run):
        assert not was_killed(run)
    assert not was_killed(run) and not was_killed(tmp_path / "never")


ELSEWHERE = """
import errno, fcntl, signal, socket, sys, time
from pathlib import Path

def flock(file, how):
    if sys.argv[2] == "none":
        raise OSError(errno.ENOSYS, "no locks here")

fcntl.flock = flock  # a lock that other machines do not see, or none
socket.gethostname = lambda: "elsewhere"
from pipeline.run import lock
lock.TOUCH_SECONDS = 0.1
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
with lock.only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["local", "none"])
def elsewhere(
    request: pytest.FixtureRequest, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[subprocess.Popen[str]]:
    """A process on another machine that trains into ``tmp_path / "run"``; locks are each machine's own, or missing."""
    if request.param == "none":

        def flock(file: int, how: int) -> None:
            raise OSError(errno.ENOSYS, "no locks here")

        monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.1)
    monkeypatch.setattr(lock, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 2.0)
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "run"), request.param]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n", process.communicate()[1]
    yield process
    process.kill()
    process.communicate()


def test_a_run_on_a_machine_whose_locks_are_not_seen_is_heard(
    tmp_path: Path, elsewhere: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = rf"process {elsewhere.pid} on elsewhere is training into this folder"
    with pytest.raises(UserError, match=said), only_run(tmp_path / "run", patience=0.5):
        pass
    assert f"process {elsewhere.pid} on elsewhere trained there and did not say" in capsys.readouterr().out
    assert f"process {elsewhere.pid} on elsewhere" in lock_file(tmp_path / "run").read_text()


def test_a_run_killed_elsewhere_is_not_heard(tmp_path: Path, elsewhere: subprocess.Popen[str]) -> None:
    elsewhere.kill()
    elsewhere.wait()
    with only_run(tmp_path / "run", patience=0.5):
        assert f"process {os.getpid()} on {os.uname().nodename}" in lock_file(tmp_path / "run").read_text()
    assert not lock_file(tmp_path / "run").exists()


def test_a_run_that_ends_elsewhere_is_waited_for(
    tmp_path: Path, elsewhere: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock is then taken of the file that there is, not of the deleted one."""
    threading.Timer(0.5, elsewhere.terminate).start()
    with only_run(tmp_path / "run", patience=20):
        assert elsewhere.wait() == 0  # as it ends by itself
        assert capsys.readouterr().out.count("listening for it") == 1
        said = f"process {os.getpid()} on "
        assert said in lock_file(tmp_path / "run").read_text()
        with pytest.raises(UserError, match=said), only_run(tmp_path / "run", patience=0.2):
            pass


def test_two_that_start_at_once_are_told_apart(tmp_path: Path) -> None:
    """Neither deletes, nor touches, the file of the other."""
    run, theirs = tmp_path / "run", "process 1 on elsewhere"
    with only_run(run):
        check_held(run)
        lock_file(run).write_text(theirs)
        with pytest.raises(UserError, match=f"{theirs} is training into this folder, and started at the same time"):
            check_held(run)
    assert lock_file(run).read_text() == theirs


def test_a_disk_that_takes_no_more_leaves_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(UserError, match="what went wrong"), only_run(tmp_path / "run"):
        monkeypatch.setattr(Path, "unlink", refuse)
        raise UserError("what went wrong")
    monkeypatch.undo()
    with only_run(tmp_path / "run", patience=0):  # it was let go
        pass
