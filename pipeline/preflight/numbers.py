"""A recipe's numbers, for the arithmetic of ``estimate.py``: sizes, batches and memory, without loading a weight."""

from __future__ import annotations

from typing import Literal

import transformers
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.adapter.config import check_target_modules, freeze_rank_numbers, lora_config
from pipeline.adapter.dropout import recipe_dropout
from pipeline.lora_dropout.masks import padded
from pipeline.preflight.estimate import PLAIN, Batch, ModelShape, Numerics, RankMemory, batch, rank_memory
from pipeline.preflight.storage import optimizer_bytes
from pipeline.recipe import Recipe
from pipeline.recipe.training import resolved_training

Execution = Literal["batched", "sequential"]

STAGES: tuple[int | None, ...] = (PLAIN, 0, 1, 2, 3)


def model_shape(config: transformers.PretrainedConfig, recipe: Recipe) -> ModelShape:
    """Sizes of base and adapter, from empty modules on torch's meta device: no weight is read.

    Raises:
        UserError: a target module that the model has not, or that has no masks; a rate for a module without adapter.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.base.trust_remote_code)
    model.tie_weights()  # init_empty_weights gives each module a parameter of its own
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    check_target_modules(model, recipe.adapter)
    adapted = get_peft_model(model, lora_config(recipe.adapter), low_cpu_mem_usage=True)
    freeze_rank_numbers(adapted)
    dropout = recipe_dropout(adapted, recipe)
    layers = dropout.layers if dropout else {}
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    text = config.get_text_config()
    return ModelShape(
        parameters=parameters,
        quantizable=sum(module.weight.numel() for module in linear),
        largest_linear=max((module.weight.numel() for module in linear), default=0),
        adapter_parameters=sum(parameter.numel() for parameter in trained),
        adapter_tensors=len(trained),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        linear_outputs=sum(module.out_features for module in linear) // text.num_hidden_layers,
        masked_features=sum(padded(features) for layer in layers.values() for features in layer.features()),
        shared_weight=next((name for name, layer in layers.items() if layer.one_group), None),
    )


def batch_of(recipe: Recipe, rows: int, processes: int, execution: Execution = "batched") -> Batch:
    """Batch arithmetic of the recipe over so many training rows."""
    training = resolved_training(recipe)
    return batch(
        rows=rows,
        micro_batch=training["per_device_train_batch_size"],
        accumulation=training["gradient_accumulation_steps"],
        processes=processes,
        epochs=training["num_train_epochs"],
        max_steps=training["max_steps"],
        instances=recipe.adapter.dropout.instances,
        batched=execution == "batched",
    )


def flat(recipe: Recipe) -> bool:
    """Whether a micro-batch is one row, in which examples lie one after another."""
    training = resolved_training(recipe)
    return bool(training["packing"] or training["padding_free"])


def masks_per_pass(recipe: Recipe, execution: Execution, mean_length: float) -> int:
    """About how many masks G one forward pass has.

    Args:
        recipe: the experiment.
        execution: how its instances run.
        mean_length: tokens per example, which says how many share a packed row.
    """
    training, dropout = resolved_training(recipe), recipe.adapter.dropout
    copies = dropout.instances if execution == "batched" else 1
    if dropout.sampling == "instance":
        return copies
    packed = max(int(recipe.data.max_length // mean_length), 1) if training["packing"] else 1
    return copies * training["per_device_train_batch_size"] * packed


def numerics_of(recipe: Recipe) -> Numerics:
    """How the recipe stores numbers."""
    training = resolved_training(recipe)
    return Numerics(
        quantization=recipe.base.quantization,
        dtype=recipe.base.dtype,
        double_quantization=recipe.base.double_quantization,
        checkpointing=training["activation_checkpointing"],
        eager_attention=recipe.base.attention == "eager",
        dense_mask=flat(recipe) and recipe.base.attention != "flash_attention_2",
        importance_bytes=8 if recipe.adapter.method == "adalora" else 0,
        moments_bytes=optimizer_bytes(training["optim"], training["optim_args"]),
    )


def memory_of(
    recipe: Recipe, shape: ModelShape, zero: int | None, processes: int, execution: Execution, mean_length: float
) -> RankMemory:
    """Bytes on each rank's device.

    Args:
        recipe: the experiment.
        shape: of base and adapter.
        zero: stage, or ``PLAIN``.
        processes: ranks.
        execution: how instances run.
        mean_length: tokens per example.
    """
    dropout, micro_batch = recipe.adapter.dropout, resolved_training(recipe)["per_device_train_batch_size"]
    copies = dropout.instances if execution == "batched" else 1
    together = micro_batch if flat(recipe) else 1  # in one row
    return rank_memory(
        shape,
        numerics_of(recipe),
        zero,
        1 if zero is PLAIN else processes,
        rows=copies * micro_batch // together,
        tokens=together * recipe.data.max_length,
        offload=recipe.distributed.offload,
        masks=masks_per_pass(recipe, execution, mean_length),
        balanced=dropout.instances if dropout.balanced else 0,
    )


def memory_by_stage(
    recipe: Recipe, shape: ModelShape, processes: int, execution: Execution, mean_length: float
) -> dict[int | None, RankMemory]:
    """Bytes per rank under plain python and under each ZeRO stage, all else as in the recipe."""
    return {stage: memory_of(recipe, shape, stage, processes, execution, mean_length) for stage in STAGES}
