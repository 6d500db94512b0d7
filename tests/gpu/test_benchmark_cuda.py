"""launch/benchmark.py on a GPU. Unmeasured so far: no run of this file on a GPU is on record.

The real size takes minutes and is no test: the launch line is in launch/benchmark.py.
"""

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


def test_two_layers_of_llama2_7b(repository: Path, tmp_path: Path) -> None:
    record = tmp_path / "cost.json"
    arguments = ["--shape", "llama2-7b", "--layers", "2", "--tokens", "128", "--rounds", "3", "--json", str(record)]
    arguments += ["--variants", "lora-dropout,example,instance-4,instance-4-sequential"]
    command = [sys.executable, "launch/benchmark.py", *arguments]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(record.read_text())
    assert found["conditions"]["device"] == torch.cuda.get_device_name()
    # a decoder layer and the embedding in 16 bit are 0.9 GiB, quantised 0.6 GiB
    assert found["conditions"]["building_peak_bytes"] < 1.5 * found["conditions"]["base_bytes"]
    sizes = {row["name"]: row["peak_bytes"] for row in found["variants"]}
    assert sizes["instance-4-sequential"] < sizes["instance-4"]
    for row in found["variants"]:
        forward, both, step = (phase["median"] for phase in row["phases"].values())
        assert 0 < forward < both < step
