"""From the recipe to trl's ``SFTConfig``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from pipeline.distributed import deepspeed_config
from pipeline.recipe import Recipe

# Where the recipe says nothing and trl's default is not what a small-data QLoRA run wants.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,  # trl's 2e-5 is for full fine-tuning; QLoRA section 4 uses 2e-4 up to 13B
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "report_to": ["tensorboard"],
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_nan_inf_filter": False,  # True hides NaN losses behind the last good one
}

DEFAULTS_WITH_VALIDATION: dict[str, Any] = {"eval_strategy": "epoch"}


def sft_config(recipe: Recipe, folder: Path) -> SFTConfig:
    """The trainer's arguments. Build them before loading the base: under ZeRO-3 they decide how it is loaded.

    Args:
        recipe: whose ``training`` section was checked against ``SFTConfig`` when it was read.
        folder: of the run; checkpoints go to ``checkpoints/`` in it.
    """
    validated = DEFAULTS_WITH_VALIDATION if recipe.data.validation else {}
    return SFTConfig(
        **{"run_name": recipe.name, **DEFAULTS, **validated, **recipe.training},
        output_dir=str(folder / "checkpoints"),
        seed=recipe.seed,
        data_seed=recipe.seed,
        max_length=recipe.data.max_length,
        bf16=recipe.base.dtype == "bfloat16",
        fp16=recipe.base.dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        deepspeed=deepspeed_config(recipe),
    )
