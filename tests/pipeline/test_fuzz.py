"""The fuzzer on a few cases, always the same: tests/faults/fuzz.py looks for new ones, at length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# cases in about ten seconds together
CASES = {"recipes": 120, "prompts": 150, "data": 40, "adapters": 25, "results": 15, "runs": 60, "checkpoints": 60}


def test_spoilt_files_end_in_messages(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    command = [
        sys.executable,
        str(repository / "tests" / "faults" / "fuzz.py"),
        "--seed=5",
        "--counts",
        str(tmp_path / "cases.json"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    print(ended.stdout)
    lines = {line.split()[0]: line.split() for line in ended.stdout.splitlines()[2:]}
    assert {name: int(line[1]) for name, line in lines.items()} == CASES
    assert all(int(line[3]) > 0 for line in lines.values())  # each target has refused something
