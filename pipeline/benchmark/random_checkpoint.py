"""A checkpoint of an adapter of any size with random values, written as training writes one; no base in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from pipeline.adapter.config import lora_config
from pipeline.adapter.files import save_adapter, settings_of
from pipeline.base import DTYPES
from pipeline.checkpoint.files import write_checkpoint
from pipeline.checkpoint.random_state import random_state
from pipeline.checkpoint.training_state import OPTIMIZER_FILE, RANDOM_FILE
from pipeline.recipe import Recipe
from pipeline.run.tensor_file import write_tensors

STATES = ("master", "exp_avg", "exp_avg_sq")
"""What AdamW and a 16-bit engine keep of each parameter, in float32."""


class RandomState:
    """What rank 0 holds when a checkpoint is written."""

    def __init__(self, config: transformers.PretrainedConfig, recipe: Recipe, ranks: int, seed: int) -> None:
        """Draw it.

        Args:
            config: of the base, whose modules are made on torch's meta device.
            recipe: whose adapter and dtype it is.
            ranks: whose generators are saved.
            seed: of the values.
        """
        with init_empty_weights():
            base = AutoModelForCausalLM.from_config(config)
        self.model: PeftModel = get_peft_model(base, lora_config(recipe.adapter), low_cpu_mem_usage=True)
        self.recipe, self.ranks = recipe, ranks
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[recipe.base.dtype]
        drawn = {name: torch.rand(weight.shape, generator=generator).to(dtype) for name, weight in trained.items()}
        self.weights = get_peft_model_state_dict(self.model, state_dict=drawn, save_embedding_layers=False)
        self.states: dict[str, torch.Tensor] = {}
        for name, weight in trained.items():
            self.states |= {f"{what}.{name}": torch.rand(weight.shape, generator=generator) for what in STATES}
            self.states[f"step.{name}"] = torch.tensor(1.0)

    @property
    def parameters(self) -> int:
        """Trained ones."""
        return sum(weight.numel() for weight in self.weights.values())

    def write(self, folder: Path, step: int) -> Path:
        """Write the checkpoint of a step into ``folder``, synchronised; returns the checkpoint's own folder."""

        def write_files(part: Path) -> None:
            save_adapter(self.model, self.weights, settings_of(self.recipe.adapter, self.recipe.seed), part)
            write_tensors(part / OPTIMIZER_FILE, self.states)
            (part / RANDOM_FILE).write_text(json.dumps([random_state()] * self.ranks))

        return write_checkpoint(folder, step, write_files)


def folder_bytes(folder: Path) -> int:
    """Of its files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
