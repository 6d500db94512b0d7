"""AdaLoRA with loss scaling, which only a CUDA device has. Unmeasured so far: no run of this file is on record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_budget_is_met_and_the_loss_falls(tmp_path: Path, repository: Path, dtype: str, launcher: str) -> None:
    start = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "1"]
    command = [
        *([sys.executable] if launcher == "python" else start),
        "launch/sft.py",
        "recipes/pocket/pocket.yaml",
        f"output={tmp_path}",
        f"base.dtype={dtype}",
        "adapter.method=adalora",
        "adapter.rank=4",
        "training.max_steps=40",
        "training.eval_steps=20",
        "--no-eval",
    ]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    pattern = json.loads((tmp_path / "pocket" / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 4 * len(pattern)
    records = [json.loads(line) for line in (tmp_path / "pocket" / "history.jsonl").read_text().splitlines()]
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert losses[-1] < losses[0]
