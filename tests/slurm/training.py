"""A tiny training for the tests of SLURM: what it is, and how far it is."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

RECIPE = """
name: tiny
seed: 3
output: {folder}/outputs
base: {{model: {base}, quantization: none, dtype: float32}}
adapter: {{rank: 4, alpha: 8, target_modules: [q_proj, v_proj],
           dropout: {{rate: 0.5, instances: 2, sampling: instance}}}}
data:
  train: [{{path: {folder}/rows.jsonl, prompt: "{{{{ instruction }}}}\\nAnswer:"}}]
  max_length: 32
training: {{max_steps: {steps}, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, logging_steps: 1,
           lr_scheduler_type: constant, gradient_checkpointing: false, save_strategy: steps, save_steps: 100000,
           optim: adamw_torch, report_to: []}}
distributed: {{zero: 2}}
eval: {{tasks: [{repository}/recipes/pocket/tasks/pocket_choice.yaml], limit: 2, systems: [ensemble],
       ensemble: {{instances: 2}}}}
"""


def write_recipe(folder: Path, repository: Path, steps: int) -> Path:
    """A recipe over random sums, on the pocket base."""
    draw = random.Random(0)
    pairs = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(30)]
    rows = [{"instruction": f"Add {a} and {b}.", "input": "", "output": str(a + b)} for a, b in pairs]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "recipe.yaml"
    base = repository / "recipes" / "pocket" / "base"
    file.write_text(RECIPE.format(folder=folder, base=base, repository=repository, steps=steps))
    return file


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of each line of a run's history, as written; an incomplete last line is left out."""
    file = run / "history.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [(record["step"], record["loss"]) for record in map(json.loads, lines) if "loss" in record]


def wait_for_step(run: Path, step: int, seconds: float = 400) -> int:
    """The run's last step, once that is at least this one."""
    deadline = time.monotonic() + seconds
    while True:
        done = losses(run)
        if done and done[-1][0] >= step:
            return done[-1][0]
        assert time.monotonic() < deadline, f"{run}: {done[-1:]}"
        time.sleep(0.2)


def differences(run: Path, reference: Path) -> list[str]:
    """Where a run's losses are not the reference's, bit for bit, over the steps of both; its own must have no gap."""
    expected = dict(losses(reference))
    own = losses(run)
    found = [f"step {step}: {loss!r}, not {expected[step]!r}" for step, loss in own if expected.get(step, loss) != loss]
    if [step for step, _ in own] != list(range(1, len(own) + 1)):
        found.append(f"steps {[step for step, _ in own]}")
    return found
