"""Bytes that ranks exchange in an optimizer step, by arithmetic. ``SCALE.md`` beside it says what follows.

Sizes are of whole tensors; what a rank sends and receives of them follows from the number of ranks N, for rings (NCCL,
gloo) and for anything else that sends no byte twice: (N-1)/N of what is gathered or scattered, twice that of what is
all-reduced. DeepSpeed communicates in the engine's dtype. Checked against counted bytes by
``launch/benchmark.py --level traffic``.
"""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.adapter.config import freeze_rank_numbers, lora_config
from pipeline.distributed import PERSISTENT_ELEMENTS, REUSE_ELEMENTS
from pipeline.preflight.estimate import DTYPE_BYTES
from pipeline.preflight.storage import RANDOM_BYTES
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class Stored:
    """A model's tensors as ZeRO sees them, in elements of the engine's dtype: four 4-bit weights are one of 16 bits."""

    width: int
    """Bytes of an element."""
    embedding: int
    head: int
    """0 where it is the embedding."""
    layers: tuple[int, ...]
    """All other tensors, frozen and trained."""
    trained: int
    """Of the adapter, together."""

    @property
    def whole(self) -> int:
        """Bytes of everything; of a quantised base without its constants, which are no parameters and stay put."""
        return (self.embedding + self.head + sum(self.layers)) * self.width


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors that are exchanged, each counted once."""

    gathered: int = 0
    scattered: int = 0
    all_reduced: int = 0

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends, and as many that it receives."""
        return (2 * self.all_reduced + self.scattered + self.gathered) * (ranks - 1) / ranks


def stored_tensors(config: transformers.PretrainedConfig, recipe: Recipe) -> Stored:
    """Of the recipe's base and adapter, from empty modules: no weight is read."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.base.trust_remote_code)
    model.tie_weights()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - {id(head)}
    adapted = get_peft_model(model, lora_config(recipe.adapter), low_cpu_mem_usage=True)
    freeze_rank_numbers(adapted)
    width = DTYPE_BYTES[recipe.base.dtype]
    packed = 2 * width if recipe.base.quantization == "nf4" else 1  # weights in an element
    layers = tuple(
        parameter.numel() // (packed if id(parameter) in linear else 1)
        for parameter in adapted.parameters()
        if parameter is not embedding and parameter is not head
    )
    return Stored(
        width=width,
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        layers=layers,
        trained=sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad),
    )


def step_traffic(stored: Stored, zero: int, accumulation: int, shrunk: int = 1) -> Traffic:
    """Of one optimizer step; a few dozen numbers besides, of counts, norms and the agreement to stop.

    ZeRO-0 and 1 reduce gradients once per step. ZeRO-2 does after every micro-batch, and by all-reduce: DeepSpeed
    (0.19, ``use_multi_rank_bucket_allreduce``) keeps its own part of the result. 1 and 2 gather the updated adapter.
    ZeRO-3 gathers weights for forward and again for backward, where recomputation and the gradient share a gathering;
    the embedding for forward only; small tensors once, after the step. It scatters gradients.

    Args:
        stored: the model.
        zero: stage.
        accumulation: micro-batches of one rank in a step.
        shrunk: divides DeepSpeed's limits, see :data:`pipeline.distributed.SHRUNK`.

    Returns:
        Under ZeRO-3 the most (counted: within 0.2 %); what DeepSpeed keeps from forward to backward is at most
        :func:`kept_bytes` less.
    """
    adapter = stored.trained * stored.width
    if zero == 0:
        return Traffic(all_reduced=adapter)
    if zero < 3:
        return Traffic(gathered=adapter, all_reduced=adapter * (accumulation if zero == 2 else 1))
    persistent = sum(size for size in stored.layers if size <= PERSISTENT_ELEMENTS // shrunk)
    cut = sum(stored.layers) - persistent
    pass_elements = stored.embedding + 2 * (stored.head or stored.embedding) + 2 * cut
    return Traffic(
        gathered=(accumulation * pass_elements + persistent) * stored.width,
        scattered=accumulation * adapter,
    )


def kept_bytes(stored: Stored, accumulation: int, shrunk: int = 1) -> int:
    """Most that ZeRO-3 need not gather in a step, since it is kept from forward to backward."""
    return accumulation * (REUSE_ELEMENTS // shrunk) * stored.width


def checkpoint_traffic(stored: Stored, zero: int, ranks: int, moments: int = 2) -> Traffic:
    """Of one checkpoint: float32 masters and moments are put together on every rank, of which one writes.

    DeepSpeed's accessors all-reduce them tensor by tensor under ZeRO 1 and 2, and gather them under ZeRO-3, as the
    weights are. All ranks exchange the state of their random generators.

    Args:
        stored: the model.
        zero: stage; without ZeRO every rank has them.
        ranks: that there are.
        moments: of the optimizer.
    """
    states, generators = (1 + moments) * 4 * stored.trained, ranks * RANDOM_BYTES
    if zero < 3:
        return Traffic(gathered=generators, all_reduced=states if zero else 0)
    return Traffic(gathered=states + stored.trained * stored.width + generators)
