"""The ``deepspeed`` command is killed while its ranks still import: they find themselves orphans all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = """
import os, subprocess, sys, time
if sys.argv[1] == "orphan":
    while os.getppid() == int(sys.argv[2]):
        time.sleep(0.05)
    if os.getppid() != 1:
        print("adopted by", os.getppid())
        sys.exit()
rank = "from pipeline.supervision.launcher import orphaned; print(orphaned(), flush=True)"
subprocess.run([sys.executable, "-c", rank], env={**os.environ, "RANK": "0", "WORLD_SIZE": "1", "CROSS_SIZE": "1"})
"""
COMMAND = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-u", "-m", "deepspeed.launcher.launch", sys.argv[1], str(os.getpid())])
if sys.argv[1] == "child":
    child.wait()
"""


@pytest.mark.parametrize("state", ["orphan", "child"])
def test_ranks_know_that_the_command_was_gone_before_they_looked(tmp_path: Path, repository: Path, state: str) -> None:
    """With a stand-in for ``deepspeed.launcher.launch``, which starts at once."""
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "launch.py").write_text(LAUNCH)
    command = [sys.executable, "-c", COMMAND, state]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{repository}"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=60)
    if done.stdout.startswith("adopted"):
        pytest.skip(f"orphans are {done.stdout.strip()}, a subreaper, not by process 1")
    assert done.stdout == f"{state == 'orphan'}\n"
