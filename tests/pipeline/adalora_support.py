"""What the tests of AdaLoRA share: a recipe of ten short steps on two layers."""

from __future__ import annotations

from pathlib import Path

from training_support import random_rows, write_rows

RECIPE = """
name: allocated
seed: 5
base: {{model: {base}, quantization: none, dtype: float32}}
adapter:
  {{method: adalora, rank: 4, alpha: 16, adalora: {{interval: 2, warm_up: 0.2, final: 0.3}}, dropout: {{rate: 0.5}}}}
data:
  train: [{{path: {folder}/train.jsonl, prompt: "{{{{ instruction }}}} {{{{ input }}}}\\nAnswer:"}}]
  max_length: 48
training:
  {{max_steps: 10, per_device_train_batch_size: 2, learning_rate: 1.0e-2, optim: adamw_torch, logging_steps: 1,
   gradient_checkpointing: false, report_to: [], save_strategy: "no"}}
"""
LAYERS = 14  # two decoder layers, seven linear modules each
STEPS, WARM_UP, FINAL, INITIAL, RANK = 10, 2, 3, 6, 4


def write_recipe(folder: Path, base: Path) -> Path:
    """The recipe's file, its rows beside it."""
    write_rows(folder / "train.jsonl", random_rows(60, seed=1))
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base, folder=folder))
    return folder / "recipe.yaml"
