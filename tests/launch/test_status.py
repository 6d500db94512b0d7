"""launch/status.py on runs in every state: its table, its JSON, and the exit status that a queue script reads."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.observation.show import duration
from pipeline.observation.status import RunStatus
from pipeline.supervision.pulse import Pulse


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Folders named after what their run is doing."""
    for name, exit_status, message in (
        ("running", None, ""),
        ("finished", 0, ""),
        ("stopped", 75, "stopped by SIGTERM at step 40"),
        ("failed", 2, "out of memory"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        status, pulse = RunStatus(folder), Pulse()
        status.now.loss, status.now.tokens_per_second = 1.23456, 5210.4
        status.now.last_checkpoint, status.now.seconds_left = "checkpoints/checkpoint-40", 3725.0
        pulse.progress("training", step=41, steps=200)
        if exit_status is not None:
            pulse.end(exit_status, message)
        status.beat(pulse)
    lost = tmp_path / "lost"
    lost.mkdir()
    RunStatus(lost)
    found = json.loads((lost / "status.json").read_text())
    found["updated"] = (datetime.now(UTC) - timedelta(hours=3)).isoformat(timespec="seconds")
    (lost / "status.json").write_text(json.dumps(found))
    ranks = tmp_path / "running" / "ranks"
    ranks.mkdir()
    for rank in range(2):  # as pipeline.supervision.ranks writes them; the second is left over from an attempt of two
        heartbeat = {"rank": rank, "host": "node-7", "pid": 123, "phase": "training", "step": 41, "time": time.time()}
        call = "torch.distributed.all_reduce"
        (ranks / f"rank-{rank}.json").write_text(json.dumps({**heartbeat, "call": call, "idle_seconds": 65.0}))
    return tmp_path


def told(repository: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", str(repository / "launch" / "status.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60)


def test_the_exit_status_is_that_of_the_run_that_needs_most(repository: Path, runs: Path) -> None:
    for names, expected in (
        (("finished",), 0),
        (("finished", "running"), 3),
        (("running", "stopped"), 75),
        (("lost", "finished"), 75),
        (("stopped", "failed"), 1),
        (("failed", "nothing-here"), 2),
    ):
        process = told(repository, *(runs / name for name in names))
        assert process.returncode == expected, (names, process.stdout)
    assert " torch" not in process.stderr and "transformers" not in process.stderr  # it answers at once


def test_the_table_says_how_runs_are_doing(repository: Path, runs: Path) -> None:
    process = told(repository, *(runs / name for name in ("running", "stopped", "failed", "lost")), "--ranks")
    lines = process.stdout.splitlines()
    (running,) = [line for line in lines if line.split()[:2] == ["running", "training"]]
    for cell in ("41/200", "1.2346", "5,210", "1 h 2 min", "40", " s ago"):
        assert cell in running
    assert "stopped: exit status 75: stopped by SIGTERM at step 40" in process.stdout
    assert "failed: exit status 2: out of memory" in process.stdout
    assert "lost: no sign of life since " in process.stdout and "goes on from the last checkpoint" in process.stdout
    (rank,) = [line for line in lines if "node-7" in line]
    assert rank.split()[:2] == ["running", "0"] and "1 min 5 s" in rank and "torch.distributed.all_reduce" in rank


def test_json_is_the_status_and_what_it_amounts_to(repository: Path, runs: Path) -> None:
    process = told(repository, runs / "lost", runs / "running", "--json", "--ranks")
    lost, running = json.loads(process.stdout)
    assert lost["state"] == "running" and lost["verdict"] == "lost" and lost["age_seconds"] > 10_000
    assert running["verdict"] == "running" and running["loss"] == 1.23456 and running["exit_status"] is None
    assert [found["pid"] for found in running["heartbeats"]] == [123, 123]
    process = told(repository, runs / "lost", "--json", "--watch")
    assert process.returncode == 2 and "leave one of them out" in process.stderr


def test_watching_ends_with_the_run(repository: Path, runs: Path) -> None:
    status, pulse = RunStatus(runs / "running"), Pulse()
    pulse.end(0)
    threading.Timer(1.0, status.beat, [pulse]).start()
    process = told(repository, runs / "running", "--watch", "--every", "0.2")
    assert process.returncode == 0 and "finished" in process.stdout


def test_durations_have_two_units() -> None:
    said = {0.4: "0 s", 59.7: "1 min 0 s", 725: "12 min 5 s", 12000: "3 h 20 min", 187_300: "2 d 4 h"}
    assert {seconds: duration(seconds) for seconds in said} == said


def test_folders_that_are_no_runs_do_not_count_among_runs(repository: Path, runs: Path) -> None:
    """``outputs/*`` has the logs of SLURM jobs, too; by itself such a folder is answered."""
    (runs / "slurm").mkdir()
    (runs / "slurm" / "job-1.log").touch()
    both = told(repository, runs / "finished", runs / "slurm")
    assert both.returncode == 0 and "slurm" not in both.stdout
    assert told(repository, runs / "slurm").returncode == 2
    assert told(repository, runs / "finished", runs / "not-there").returncode == 2


def test_watch_waits_for_a_run_that_is_to_begin(repository: Path, tmp_path: Path) -> None:
    script, run = str(repository / "launch" / "status.py"), tmp_path / "run"
    command = [sys.executable, script, str(run), "--watch", "--every", "0.2"]
    watching = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        watching.wait(timeout=4)
    run.mkdir()
    RunStatus(run).end(0)
    said, _ = watching.communicate(timeout=30)
    assert watching.returncode == 0 and "finished" in said
