"""Two ranks, one of which fails, dies, hangs or is signalled: how both end, how soon, and what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.supervision.pulse import Pulse
from pipeline.supervision.ranks import Ranks, clear_ranks

WORKER = Path(__file__).with_name("supervision_worker.py")
SCENARIOS = ("bug", "bad_input", "same_bug", "killed", "hung", "terminated", "interrupted", "twice")
SECONDS = 20.0
"""Within which both have ended; measured 0.1 to 4, on a machine with other work."""


class End(NamedTuple):
    """Of a scenario, rank by rank."""

    folder: Path
    statuses: list[int]
    seconds: list[float]
    said: list[str]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    """All scenarios, run at once."""
    root = tmp_path_factory.mktemp("ends")
    process = subprocess.run(
        [sys.executable, str(WORKER), str(root), *SCENARIOS],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    found = {}
    for name in SCENARIOS:
        ended = json.loads((root / f"{name}.json").read_text())
        said = [(root / name / f"{rank}.txt").read_text() for rank in (0, 1)]
        statuses, seconds = zip(*(ended[str(rank)] for rank in (0, 1)), strict=True)
        found[name] = End(root / name, list(statuses), list(seconds), said)
    return found


@pytest.mark.parametrize(
    ("name", "statuses"),
    [
        ("bug", [1, 1]),
        ("bad_input", [2, 2]),
        ("same_bug", [1, 1]),
        ("killed", [1, -9]),
        ("hung", [70, 70]),
        ("terminated", [75, 75]),
        ("interrupted", [130, 130]),
        ("twice", [75, 75]),
    ],
)
def test_both_ranks_end_soon_with_the_documented_status(ends: dict[str, End], name: str, statuses: list[int]) -> None:
    end = ends[name]
    assert end.statuses == statuses, end.said
    assert max(end.seconds) < SECONDS
    told = [json.loads((end.folder / "ranks" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for rank, status in enumerate(statuses):
        assert told[rank]["exit_status"] == (None if status == -9 else status)  # what is killed cannot say so
        assert told[rank]["rank"] == rank and (told[rank]["phase"] == "ended") == (status != -9)


def test_the_traceback_is_that_of_the_rank_that_failed_first(ends: dict[str, End]) -> None:
    waiting, failed = ends["bug"].said
    assert failed.startswith("process 1 failed:\nTraceback") and "ValueError: row 7 has no tokens" in failed
    assert waiting.strip() == "rank 0: ends, since rank 1 failed: ValueError: row 7 has no tokens"
    ranks = ends["bug"].folder / "ranks"
    assert "row 7 has no tokens" in (ranks / "rank-1.failed").read_text()
    assert "Traceback" in (ranks / "rank-0.failed").read_text()  # the collective's, for who wants it
    assert json.loads((ranks / "failed.json").read_text())["rank"] == 1


def test_a_mistake_of_one_rank_is_said_in_full(ends: dict[str, End]) -> None:
    waiting, failed = ends["bad_input"].said
    assert failed == "error: (process 1) disk full\nDelete something.\n"
    assert waiting.strip() == "rank 0: ends, since rank 1 failed: disk full"


def test_a_bug_on_all_ranks_has_one_traceback(ends: dict[str, End]) -> None:
    assert sum("Traceback" in said for said in ends["same_bug"].said) == 1


def test_a_killed_rank_is_named(ends: dict[str, End]) -> None:
    said = ends["killed"].said[0]
    assert "rank 0: ends, since rank 1 (process " in said and "was killed (SIGKILL)" in said and "memory" in said
    assert "Traceback" not in said


def test_the_watchdog_names_ranks_and_calls(ends: dict[str, End]) -> None:
    said = "".join(ends["hung"].said)
    assert "hung: no progress for" in said
    assert said.count("torch.distributed.distributed_c10d.all_reduce") >= 1
    assert "called from tests/pipeline/supervision_worker.py" in said
    assert "in __main__.hung" in said  # where rank 1 sleeps


@pytest.mark.parametrize(("name", "cause"), [("terminated", "a signal to another rank"), ("interrupted", "Ctrl-C")])
def test_a_signal_to_one_rank_stops_both_at_the_same_step(ends: dict[str, End], name: str, cause: str) -> None:
    saved = [int((ends[name].folder / f"saved-{rank}").read_text()) for rank in (0, 1)]
    assert saved[0] == saved[1]
    assert ends[name].said[0].splitlines()[-1] == f"stopped by {cause} at step {saved[0]}"
    assert not ends[name].said[1]


def test_a_second_signal_ends_blocked_ranks_at_once(ends: dict[str, End]) -> None:
    """The second comes 4 s after the first; main threads never see either."""
    assert "once more, after 3 s, stops at once" in ends["twice"].said[0]
    assert "stopped at once, by a second SIGTERM" in ends["twice"].said[0]
    assert max(ends["twice"].seconds) < SECONDS


@pytest.mark.parametrize(
    ("told", "named"),
    [({}, True), ({"exit_status": 0}, False), ({"pid_namespace": "pid:[1]"}, False), ({"host": "elsewhere"}, False)],
)
def test_a_rank_that_its_launcher_reaped_before_the_first_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], named: bool
) -> None:
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    clear_ranks(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    monkeypatch.setenv("RANK", "1")
    Ranks(tmp_path).write(Pulse(), "")
    file = tmp_path / "ranks" / "rank-1.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pid": process.pid, **told}))
    monkeypatch.setenv("RANK", "0")
    lost = Ranks(tmp_path).lost()
    assert (lost is not None) == named
    if lost is not None:
        assert lost.rank == 1 and lost.words.startswith(f"(process {process.pid}) was killed (SIGKILL)")
