"""status.json and the log of each rank: whole whenever they are read, and never the reason why a run ends."""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from waiting import wait_until

from eval.logs import CountedBar, current_task, progress_bar
from pipeline.errors import UserError
from pipeline.observation import status as module
from pipeline.observation.evaluation import observed_evaluation
from pipeline.observation.rank_log import (
    LOG,
    RankLogHandler,
    plain_json,
    rank_log,
    rank_log_file,
    read_rank_log,
)
from pipeline.observation.status import RunStatus, Status, Task, read_status, sign_of_life, state_of
from pipeline.supervision.pulse import Pulse


def test_whoever_reads_sees_a_whole_file(tmp_path: Path) -> None:
    status = RunStatus(tmp_path)
    stop = threading.Event()

    def write() -> None:
        for number in range(10**9):
            status.now.step, status.now.message = number, "x" * random.randint(0, 20_000)
            status.write()
            if stop.is_set():
                return

    threads = [threading.Thread(target=write) for _ in range(2)]  # as the main thread and the heartbeat
    for thread in threads:
        thread.start()
    read = [json.loads((tmp_path / "status.json").read_text()) for _ in range(300)]
    stop.set()
    for thread in threads:
        thread.join()
    assert all(found["state"] == "running" and found["pid"] == os.getpid() for found in read)
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_the_heartbeat_says_what_the_main_thread_does_and_how_it_ended(tmp_path: Path) -> None:
    pulse = Pulse()
    status = RunStatus(tmp_path, heartbeat_seconds=2.5)
    pulse.progress("training", step=3, steps=10)
    status.now.loss = float("nan")
    status.beat(pulse)
    found = json.loads((tmp_path / "status.json").read_text(), parse_constant=pytest.fail)  # no NaN: it is not JSON
    assert (found["phase"], found["step"], found["steps"], found["loss"]) == ("training", 3, 10, "nan")
    assert (found["state"], found["exit_status"], found["heartbeat_seconds"]) == ("running", None, 2.5)

    pulse.end(75, "stopped by SIGTERM")
    status.beat(pulse)
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["phase"], found["exit_status"]) == ("stopped", "ended", 75)
    assert found["message"] == "stopped by SIGTERM"
    assert [state_of(code) for code in (0, 1, 2, 70, 75, 130)] == [
        "finished",
        "failed",
        "failed",
        "failed",
        "stopped",
        "stopped",
    ]


def test_the_end_is_in_the_log_of_each_rank_and_secrets_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-to-be-seen-anywhere")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        with rank_log(tmp_path):
            status, pulse = RunStatus(tmp_path), Pulse()
            pulse.end(2, "401 for not-to-be-seen-anywhere")
            status.beat(pulse)
            status.beat(pulse)
    for rank in (0, 1):
        (failed,) = [line for line in read_rank_log(rank_log_file(tmp_path, rank)) if line["event"] == "failed"]
        assert (failed["level"], failed["exit_status"], failed["text"]) == ("error", 2, "401 for ***")
    assert not any(b"not-to-be-seen" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".status.json.4711").write_text("{")
    RunStatus(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_attempts_are_counted_and_an_evaluation_is_none(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        status = RunStatus(tmp_path)
        assert status.now.attempts == attempt
        status.now.step, status.now.loss, status.now.last_checkpoint = 40, 0.5, "checkpoints/checkpoint-40"
        status.write()
    evaluation = RunStatus(tmp_path, evaluates=True)
    evaluation.task = lambda: Task("log-likelihoods", total=8, done=5, before=1, began=time.monotonic() - 4.0)
    evaluation.write()
    found = read_status(tmp_path)
    assert found is not None
    assert (found.attempts, found.step, found.loss, found.phase) == (3, 40, 0.5, "evaluating")
    assert (found.task, found.share) == ("log-likelihoods", 0.625)
    assert found.seconds_left == pytest.approx(3.0, abs=0.5)  # 4 computed in 4 s, 3 to go
    (tmp_path / "status.json").unlink()  # with the folder of a run that had no checkpoint yet
    assert RunStatus(tmp_path, before=found).now.attempts == 4
    found.attempts = 3
    (tmp_path / "status.json").write_text(json.dumps(vars(found)))
    resumed = RunStatus(tmp_path)
    assert (resumed.now.attempts, resumed.now.step, resumed.now.last_checkpoint) == (4, 0, "checkpoints/checkpoint-40")


def test_ranks_other_than_the_first_write_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    RunStatus(tmp_path).write()
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    status = RunStatus(folder)
    (folder / "status.json").unlink()
    folder.rmdir()
    for _ in range(3):
        status.write()
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "No such file or directory" in said and "the run goes on" in said


def test_a_thread_that_hangs_in_a_write_does_not_hold_up_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    status = RunStatus(tmp_path)
    with status._lock:  # as a write to a file system that does not answer
        started = time.monotonic()
        status.write()
    assert time.monotonic() - started < 2.0


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"updated": 3}', '{"updated": "yesterday"}'])
def test_what_is_no_status_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None
    assert RunStatus(tmp_path).now.attempts == 1  # and is written anew
    assert read_status(tmp_path) is not None


def test_a_running_run_that_has_missed_its_heartbeats_is_taken_for_gone() -> None:
    def seen(seconds_ago: float, **status: object) -> bool:
        updated = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat(timespec="seconds")
        return sign_of_life(Status(updated=updated, heartbeat_seconds=10.0, **status))  # type: ignore[arg-type]

    assert seen(1) and seen(33) and not seen(37)
    assert seen(10**6, state="finished")


def test_an_evaluation_tells_how_far_it_is_and_how_it_ended(tmp_path: Path) -> None:
    def found() -> Status:
        status = read_status(tmp_path)
        assert status is not None
        return status

    RunStatus(tmp_path, goes_on=True).beat(ended(Pulse(), 0))
    assert (found().state, found().phase) == ("running", "evaluating")  # trained, but not finished
    with observed_evaluation(tmp_path, 0.05, current_task):
        CountedBar.system = "the adapter"
        with progress_bar(total=10, done=2, what="log-likelihoods", disable=False) as bar:
            bar.update(3)
            wait_until(lambda: (found().task, found().share) == ("the adapter, log-likelihoods", 0.5))
        wait_until(lambda: found().task is None)
    assert (found().state, found().exit_status, found().attempts) == ("finished", 0, 1)
    for error, exit_status in ((UserError("no such task"), 2), (ValueError("a bug"), 1)):
        with pytest.raises(type(error)), observed_evaluation(tmp_path, 10.0, current_task):
            raise error
        assert (found().state, found().exit_status) == ("failed", exit_status)
        assert str(error) in str(found().message)
    with observed_evaluation(None, 10.0, current_task):
        pass
    assert found().state == "failed"  # another adapter's evaluation is nothing to this run


def ended(pulse: Pulse, exit_status: int) -> Pulse:
    pulse.end(exit_status)
    return pulse


# The log of a rank ----------------------------------------------------------------------------------------------------


def test_a_log_has_a_line_for_each_event_over_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    file = rank_log_file(tmp_path, 3)
    with pytest.raises(ZeroDivisionError), rank_log(tmp_path):
        LOG.info("checkpoint written", extra={"step": 40, "bytes": 12, "path": Path("a"), "loss": float("inf")})
        LOG.warning("a line\nwith a break", extra={"rank": "not this one"})
        logging.getLogger("transformers.trainer").warning("of a library")
        logging.getLogger("transformers.trainer").info("not of interest")
        _ = 1 / 0
    LOG.warning("after the end: nowhere")
    with file.open("a") as content:
        content.write('{"time": "2026-')  # killed in the middle of a line
    with rank_log(tmp_path):
        LOG.info("again")

    lines = file.read_text().splitlines()
    first, checkpoint, warning, library, error, end, _broken, second, again, _ = lines
    assert json.loads(checkpoint) == {
        "time": json.loads(checkpoint)["time"],
        "rank": 3,
        "level": "info",
        "event": "checkpoint written",
        "step": 40,
        "bytes": 12,
        "path": "a",
        "loss": "inf",
    }
    assert {key: json.loads(first)[key] for key in ("event", "pid", "ranks")} == {
        "event": "process",
        "pid": os.getpid(),
        "ranks": 4,
    }
    assert json.loads(warning)["event"] == "a line\nwith a break" and json.loads(warning)["rank"] == 3
    assert json.loads(library)["logger"] == "transformers.trainer"
    assert "ZeroDivisionError: division by zero" in json.loads(error)["traceback"]
    assert json.loads(end)["event"] == "process ends"
    assert json.loads(second)["event"] == "process" and json.loads(again)["event"] == "again"
    assert [record["event"] for record in read_rank_log(file)][-3:] == ["process", "again", "process ends"]
    moment = datetime.fromisoformat(json.loads(again)["time"])
    assert abs((datetime.now(UTC) - moment).total_seconds()) < 60


def test_a_log_on_a_full_disk_warns_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler = RankLogHandler(Path("/dev/full"))  # takes nothing: "No space left on device"
    LOG.addHandler(handler)
    for step in range(3):
        LOG.info("step", extra={"step": step})
    LOG.removeHandler(handler)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "No space left on device" in said and "Traceback" not in said


def test_a_log_that_cannot_be_made_is_done_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ranks").write_text("a file where the folder should be")
    with rank_log(tmp_path):
        LOG.info("nowhere")
    assert "the run goes on" in capsys.readouterr().err


def test_numbers_that_json_has_not_are_words() -> None:
    values = {"a": float("nan"), "b": float("-inf"), "c": 1.5, "d": None, "e": "x"}
    assert plain_json(values) == {"a": "nan", "b": "-inf", "c": 1.5, "d": None, "e": "x"}
