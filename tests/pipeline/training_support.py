"""What tests that train share: random rows, and the launch of many configurations at once."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("training_worker.py")


def random_rows(count: int, seed: int, longest: int = 6) -> list[dict[str, str]]:
    """Instruction rows of random words; the answer repeats the question's words in another order."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> list[str]:
        return ["".join(draw.choices(string.ascii_lowercase, k=3)) for _ in range(draw.randint(least, most))]

    rows = []
    for _ in range(count):
        asked = words(1, longest)
        rows.append({"instruction": " ".join(asked), "input": " ".join(words(0, 2)), "output": " ".join(sorted(asked))})
    return rows


def write_rows(file: Path, rows: list[dict[str, str]]) -> Path:
    """JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run_worker(jobs: list[dict[str, Any]], folder: Path, ranks: int) -> None:
    """Train the jobs, in one process or under torchrun; their files lie in the folder afterwards."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    process = subprocess.run(
        [*launcher, str(WORKER), str(folder / "jobs.json"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, f"{process.stdout[-9000:]}\n{process.stderr[-9000:]}"
