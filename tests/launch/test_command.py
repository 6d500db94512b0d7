"""What commands say of errors that nobody in them has caught."""

from __future__ import annotations

import errno
import sys
import threading

import pytest

from launch.command import told_errors


@pytest.mark.parametrize(
    ("error", "first_line", "lines"),
    [
        (OSError(errno.ENOSPC, "No space left"), "warning: thread writer cannot write any more: No space left", 1),
        (OSError(errno.ENOENT, "No such file"), "Exception in thread writer:", None),
        (ValueError("with hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"), "Exception in thread writer:", None),
        (SystemExit(3), None, 0),
    ],
)
def test_errors_of_threads(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    first_line: str | None,
    lines: int | None,
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # both put back when this ends
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)

    def fail() -> None:
        raise error

    with told_errors():
        thread = threading.Thread(target=fail, name="writer")
        thread.start()
        thread.join()
    said = capsys.readouterr().err.splitlines()
    assert said[:1] == ([first_line] if first_line else [])
    if lines is None:
        assert said[1].startswith("Traceback") and said[-1].startswith(f"{type(error).__name__}: ")
        assert "hf_abcdef" not in "\n".join(said)
    else:
        assert len(said) == lines
