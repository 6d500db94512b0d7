"""From the recipe to trl's ``SFTConfig``."""

from __future__ import annotations

from pathlib import Path

import torch
from trl import SFTConfig

from pipeline.distributed import deepspeed_config
from pipeline.recipe import Recipe
from pipeline.recipe.training import effective_training


def sft_config(recipe: Recipe, folder: Path) -> SFTConfig:
    """The trainer's arguments. Build them before loading the base: under ZeRO-3 they decide how it is loaded.

    Args:
        recipe: whose ``training`` section was checked against ``SFTConfig`` when it was read.
        folder: of the run; checkpoints go to ``checkpoints/`` in it.
    """
    return SFTConfig(
        **effective_training(recipe),
        run_name=recipe.name,
        output_dir=str(folder / "checkpoints"),
        seed=recipe.seed,
        data_seed=recipe.seed,
        max_length=recipe.data.max_length,
        bf16=recipe.base.dtype == "bfloat16",
        fp16=recipe.base.dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        deepspeed=deepspeed_config(recipe),
    )
