"""Worker: bytes of the 4-bit base that rank 0 holds under ZeRO-3, with activation checkpointing and without.

usage: zero3_memory_worker.py RECIPE FOLDER

Started by a launcher; writes ``FOLDER/True.json`` and ``FOLDER/False.json``. DeepSpeed may keep one element gathered:
by default it keeps more than the whole pocket base.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from pipeline.process.environment import prepare_environment

prepare_environment()

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.integrations import unset_hf_deepspeed_config

from pipeline.arguments import sft_config
from pipeline.base import load_base, load_tokenizer
from pipeline.data import load_splits
from pipeline.recipe import load_recipe
from pipeline.trainer import LoraDropoutTrainer


class LiveWeights:
    """Storages of gathered 4-bit weights that are alive, looked at before and after every layer, forward and backward.

    A storage outlives its parameter's gathering where ``MatMul4Bit`` keeps it for backward.
    """

    def __init__(self, weights: list[torch.nn.Parameter]) -> None:
        self.weights = weights
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def look(self, *_: object) -> None:
        """Note what is gathered now, and count what is still alive."""
        for weight in self.weights:
            size = weight.ds_numel * weight.element_size()
            if weight.untyped_storage().nbytes() >= size:
                reference = StorageWeakRef(weight.untyped_storage())
                self.seen[reference.cdata] = (reference, size)
        self.seen = {key: entry for key, entry in self.seen.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.seen.values()))


def count(recipe_file: Path, folder: Path, checkpointing: bool) -> None:
    """Load, shard, take two steps, count."""
    recipe = load_recipe(recipe_file, [f"training.gradient_checkpointing={str(checkpointing).lower()}"])
    tokenizer = load_tokenizer(recipe.base)
    arguments = sft_config(recipe, folder / "run")
    limits = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
    arguments.hf_deepspeed_config.config["zero_optimization"].update(dict.fromkeys(limits, 1))
    # the pocket base's layers are below the size at which DeepSpeed shards at all; a 7B model's are far above
    arguments.hf_deepspeed_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    splits = load_splits(recipe, tokenizer)
    model = load_base(recipe.base)
    trainer = LoraDropoutTrainer(recipe, model, arguments, tokenizer, splits.train, None, [])
    weights = [module.weight for module in model.modules() if isinstance(module, Linear4bit)]
    whole = sum(weight.numel() * weight.element_size() for weight in weights)
    counted: dict[str, int] = {"whole": whole, "load_peak": whole}

    from transformers import TrainerCallback

    class Count(TrainerCallback):
        """Measure at rest before the first step, and within steps."""

        live: LiveWeights | None = None

        def on_step_begin(self, *_: object, **__: object) -> None:
            shards = sum(weight.ds_tensor.numel() * weight.ds_tensor.element_size() for weight in weights)
            counted["at_rest"] = shards + sum(weight.numel() * weight.element_size() for weight in weights)
            if self.live is None:
                self.live = LiveWeights(weights)
                for module in model.modules():
                    if isinstance(module, Linear4bit):
                        module.register_forward_pre_hook(self.live.look)  # DeepSpeed's own, before it, has gathered

        def on_train_end(self, *_: object, **__: object) -> None:
            assert self.live is not None
            counted["step_peak_gathered"] = self.live.peak

    trainer.add_callback(Count())
    trainer.train()
    if dist.get_rank() == 0:
        (folder / f"{checkpointing}.json").write_text(json.dumps(counted))
    unset_hf_deepspeed_config()


if __name__ == "__main__":
    for choice in (True, False):
        count(Path(sys.argv[1]), Path(sys.argv[2]), choice)
        gc.collect()
