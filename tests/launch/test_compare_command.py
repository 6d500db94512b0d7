"""launch/compare.py as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compare_runs import answered, write_run


def run(repository: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(repository / "launch" / "compare.py"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, right in (("a", [True, False] * 10), ("b", [True, True, True, False] * 5)):
        write_run(folder / "eval" / "outputs" / name, {"told": answered(right)}, name)
    return folder


def test_two_runs(repository: Path, runs: Path) -> None:
    done = run(repository, runs, "eval/outputs/a", "eval/outputs/b:deterministic", "--discordance", "0.3")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert (
        "b:deterministic minus a:deterministic, accuracy, % ↑" in said
        and "the last that ran" in said
        and "named" in said
    )
    assert "50.0 75.0 +25.0" in said and "30 % (stated)" in said
    (folder,) = (runs / "eval" / "outputs" / "comparisons").iterdir()
    assert folder.name.startswith("a-b-20") and f"written to eval/outputs/comparisons/{folder.name}" in done.stdout
    names = {file.name for file in folder.iterdir()}
    assert names == {"comparison.json", "comparison.md", "comparison.html", "plots"}


def test_refusals_end_with_status_2(repository: Path, runs: Path) -> None:
    done = run(repository, runs, "--method", "lora=eval/outputs/a", "--method", "drop=eval/outputs/b", "eval/outputs/a")
    assert done.returncode == 2 and "--method names its runs itself" in done.stderr and "Traceback" not in done.stderr
    done = run(repository, runs, "eval/outputs/a", "eval/outputs/nothing")
    assert done.returncode == 2 and "no results.json here" in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout


def test_help_names_every_option(repository: Path, runs: Path) -> None:
    done = run(repository, runs, "--help")
    assert done.returncode == 0
    for option in ("--method", "--mask-seeds", "--task", "--primary", "--discordance", "--pilot", "--output"):
        assert option in done.stdout
