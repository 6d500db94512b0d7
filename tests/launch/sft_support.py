"""What tests share that start launch/sft.py as a user does."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from ports import free_port

SCRIPTS = Path(sys.executable).parent

RECIPE = """
name: tiny
seed: 3
output: {folder}/outputs
base: {{model: {base}, quantization: nf4, dtype: bfloat16}}
adapter: {{rank: 4, alpha: 8, dropout: {{rate: 0.5, instances: 2, sampling: instance}}}}
data:
  train: [{{path: {folder}/rows.jsonl, prompt: "{{{{ instruction }}}}\\nAnswer:"}}]
  validation: {{fraction: 0.2, probe_rows: 4}}
  max_length: 32
training: {{max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1, eval_strategy: steps, eval_steps: 2,
           gradient_checkpointing: false, save_strategy: "no", optim: adamw_torch}}
distributed: {{zero: 2}}
"""


def write_recipe(folder: Path, base: Path) -> Path:
    """A recipe for a tiny base and 30 random sums, and its data."""
    draw = random.Random(0)
    numbers = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(30)]
    rows = [{"instruction": f"Add {a} and {b}.", "input": "", "output": str(a + b)} for a, b in numbers]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, base=base))
    return path


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",  # deepspeed compiles with the ninja that lies there
    }


LAUNCHERS = {
    "python": [sys.executable],
    "deepspeed": [str(SCRIPTS / "deepspeed"), "--num_gpus", "2"],
    "torchrun": [str(SCRIPTS / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    "accelerate": [str(SCRIPTS / "accelerate"), "launch", "--cpu", "--num_processes", "1"],
}


def launched_by(launcher: str) -> list[str]:
    """The beginning of a command line; deepspeed's with a port that no other run has."""
    return [*LAUNCHERS[launcher], *(["--master_port", free_port()] if launcher == "deepspeed" else [])]
