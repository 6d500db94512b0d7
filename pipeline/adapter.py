"""The peft adapter of a recipe: its configuration, and the modules it goes on."""

from __future__ import annotations

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.lora_dropout import folded_alpha
from pipeline.recipe import schema


def lora_config(adapter: schema.Adapter) -> LoraConfig:
    """peft's configuration: a plain LoRA, with eq. 2's factor folded into alpha where ``rescale`` is false."""
    dropout = adapter.dropout
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=folded_alpha(adapter.alpha, dropout.rate, dropout.rescale),  # type: ignore[arg-type]  # any float
        target_modules=adapter.target_modules,
        lora_dropout=adapter.input_dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )


def check_target_modules(model: PreTrainedModel, adapter: schema.Adapter) -> None:
    """Every listed name must match a linear layer; peft complains only when none of them does.

    Raises:
        UserError: names those that match nothing, and the names there are.
    """
    if adapter.target_modules == "all-linear":
        return
    head = model.get_output_embeddings()  # trl multiplies by its weight directly: an adapter on it would not be seen
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    missing = [
        target
        for target in adapter.target_modules
        if not any(name == target or name.endswith(f".{target}") for name in linear)
    ]
    if missing:
        available = sorted({name.rpartition(".")[2] for name in linear})
        raise UserError(
            f"adapter.target_modules: {', '.join(missing)} matches no linear layer of this model.\n"
            f"It has: {', '.join(available)}; or use target_modules: all-linear."
        )
