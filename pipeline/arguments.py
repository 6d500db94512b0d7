"""From the recipe to trl's ``SFTConfig``."""

from __future__ import annotations

from pathlib import Path

import torch
from trl import SFTConfig

from pipeline.distributed import deepspeed_config, zero_stage
from pipeline.recipe import Recipe
from pipeline.recipe.training import effective_training


def sft_config(recipe: Recipe, folder: Path) -> SFTConfig:
    """The trainer's arguments. Build them before loading the base: under ZeRO-3 they decide how it is loaded.

    Args:
        recipe: whose ``training`` section was checked against ``SFTConfig`` when it was read.
        folder: of the run; checkpoints go to ``checkpoints/`` in it.
    """
    return SFTConfig(
        **{**effective_training(recipe), **_checkpointing(recipe)},
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


def _checkpointing(recipe: Recipe) -> dict[str, object]:
    """Under ZeRO-3, the reentrant kind of activation checkpointing.

    Its first pass records nothing, so that the 4-bit weights gathered for it can go; the other kind keeps them alive in
    bitsandbytes' ``MatMul4Bit`` until backward, the whole base at the peak of a step. trl means to force it (trl#2514),
    but sets ``gradient_checkpointing_kwargs``, which transformers 5.23 reads before that: delete this when
    tests/pipeline/test_zero3_memory.py passes without it.
    """
    if zero_stage(recipe) != 3:
        return {}
    given = recipe.training.get("activation_checkpointing_kwargs", recipe.training.get("gradient_checkpointing_kwargs"))
    return {"activation_checkpointing_kwargs": {**(given or {}), "use_reentrant": True}}
