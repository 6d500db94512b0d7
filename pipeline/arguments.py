"""From the recipe to trl's ``SFTConfig``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from trl import SFTConfig

from pipeline.distributed import deepspeed_config, zero_stage
from pipeline.errors import UserError
from pipeline.process.rank import launched
from pipeline.recipe import Recipe
from pipeline.recipe.training import effective_training

LAID_OUT_HERE = ("packing", "packing_strategy", "padding_free")
"""Fields that the trainer carries out itself: trl's own way loses the dataset rows, by which masks are drawn."""


def sft_config(recipe: Recipe, folder: Path, accumulation: int | None = None) -> SFTConfig:
    """The trainer's arguments. Build them before loading the base: under ZeRO-3 they decide how it is loaded.

    Args:
        recipe: whose ``training`` section was checked against ``SFTConfig`` when it was read.
        folder: of the run; checkpoints go to ``checkpoints/`` in it.
        accumulation: micro-batches of one rank in an optimizer step, in place of the recipe's, for a run that goes on
            on another number of ranks.
    """
    given = {name: value for name, value in effective_training(recipe).items() if name not in LAID_OUT_HERE}
    if accumulation is not None:
        given["gradient_accumulation_steps"] = accumulation
    arguments = SFTConfig(
        **{**given, **_checkpointing(recipe)},
        run_name=recipe.name,
        output_dir=str(folder / "checkpoints"),
        seed=recipe.seed,
        data_seed=recipe.seed,
        max_length=recipe.data.max_length,
        # rows are ready; trl would copy them all once more, the main process first and the others at a barrier, whose
        # timeout is the process group's
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=recipe.base.dtype == "bfloat16",
        fp16=recipe.base.dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        deepspeed=deepspeed_config(recipe),
    )
    if not launched():
        # plain python is one process on one GPU; where several are visible transformers would wrap the model in
        # DataParallel, which trl refuses. Trainer sets the same field where a model is split over devices.
        arguments._n_gpu = min(1, torch.cuda.device_count())
    return arguments


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


def check_reporters(recipe: Recipe) -> None:
    """Refuse a tracker that is not installed before the base is loaded; transformers finds out after.

    Raises:
        UserError: names the package.
    """
    chosen = effective_training(recipe)["report_to"]
    for name in [chosen] if isinstance(chosen, str) else chosen or []:
        if name not in ("none", "all") and importlib.util.find_spec(name) is None:
            raise UserError(
                f"training.report_to: {name!r} is not installed in this environment.\n"
                f"Install it (`pip install {name}`; wandb comes with the extra `gpu`), or leave it out."
            )
