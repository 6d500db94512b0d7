"""Floating point operations of a training step, by arithmetic, and what devices can do.

A weight that multiplies one token costs 2 FLOPs (a multiplication and an addition) in the forward pass, 2 for the
gradient of the layer's input and 2 for its own gradient (Kaplan et al., arXiv 2001.08361, section 2.1). The frozen base
has no gradients of its own. Attention scores and their product with the values cost 4 w T per token and layer in the
forward pass, for attention width w = heads x head width and T tokens in the row, and twice as much backward; like PaLM
(Chowdhery et al., arXiv 2204.02311, appendix B) we do not halve them for the causal mask. Per token of the data:

    model     = N (4 F + 6 A + 12 W T + 4 s H)
    hardware  = model + N (2 F + 2 A + 4 W T) [with activation checkpointing] + N 2 s H

F weights of the frozen layers, A of the adapter, W attention width summed over layers, H of the output head, s share of
tokens that are trained (trl's fused head computes no others, and their logits a second time in the backward pass),
N mask instances: the objective asks for each. MFU, as in PaLM, is model FLOPs over what the devices can do in the same
time; HFU is that of the hardware's. Padding, masks, norms, softmax, routing, unpacking of 4-bit weights and
the optimizer count in neither; every layer is taken to have full attention, and to be recomputed to its end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow.compute
import torch
import transformers
from accelerate import init_empty_weights
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.data.tokenise import IGNORED
from pipeline.recipe import Recipe
from pipeline.recipe.training import resolved_training

EXPERT_DIMENSIONS = 3
"""Of a parameter that holds the weights of all experts of a layer: experts, out, in, or experts, in, out."""


@dataclass(frozen=True)
class TokenWork:
    """What multiplies one token in a forward pass."""

    frozen: int
    """Weights F of the base's layers; of experts, those that a token meets."""
    head: int
    """Weights H of the output head."""
    attention: int
    """W: heads x head width, summed over layers."""
    adapter: int
    """Weights A."""


@dataclass(frozen=True)
class DataWork:
    """FLOPs per token of the data: forward and backward, of all mask instances."""

    model: float
    """What the objective takes."""
    hardware: float
    """What is computed: recomputation too."""


def base_work(model: PreTrainedModel, adapter: int) -> TokenWork | None:
    """From the modules of a base, on any device, before an adapter is put on it.

    Args:
        model: not quantised (4-bit weights have another shape).
        adapter: weights of the adapter.

    Returns:
        None for a mixture of experts that does not say how many of them a token meets.
    """
    text = model.config.get_text_config()
    settings = text.to_dict()
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]
    experts = [weight for weight in model.parameters() if weight.dim() == EXPERT_DIMENSIONS]
    met = settings.get("num_experts_per_tok", settings.get("experts_per_token")) if experts else 0
    if met is None:
        return None
    width = settings.get("head_dim") or text.hidden_size // text.num_attention_heads
    return TokenWork(
        frozen=sum(module.weight.numel() for module in linear) + met * sum(weight[0].numel() for weight in experts),
        head=head.weight.numel(),
        attention=text.num_hidden_layers * text.num_attention_heads * width,
        adapter=adapter,
    )


def empty_base_work(config: transformers.PretrainedConfig, recipe: Recipe, adapter: int) -> TokenWork | None:
    """:func:`base_work` from empty modules on torch's meta device: no weight is read.

    None where the adapter is on fused weights too: peft then adds whole updates to weights, which is other arithmetic.
    """
    if recipe.adapter.target_parameters:
        return None
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.base.trust_remote_code)
    return base_work(model, adapter)


def data_work(work: TokenWork, length: float, trained: float, copies: int, recomputes: bool) -> DataWork:
    """The formula above.

    Args:
        work: of a token in a pass.
        length: T, tokens that attend to each other.
        trained: s.
        copies: N.
        recomputes: activation checkpointing is on.
    """
    attention, head = work.attention * length, trained * work.head
    model = 4 * work.frozen + 6 * work.adapter + 12 * attention + 4 * head
    again = 2 * head + (2 * work.frozen + 2 * work.adapter + 4 * attention if recomputes else 0)
    return DataWork(model=copies * model, hardware=copies * (model + again))


def recipe_work(work: TokenWork, recipe: Recipe, rows: Dataset) -> DataWork:
    """:func:`data_work` of a recipe on its training rows, of columns ``input_ids`` and ``labels``."""
    tokens, squares, trained = 0, 0, 0
    for part in rows.with_format("arrow").iter(batch_size=10_000):
        lengths = pyarrow.compute.list_value_length(part["input_ids"]).to_numpy().astype(np.int64)
        labels = part["labels"].combine_chunks().flatten().to_numpy()
        tokens, squares = tokens + int(lengths.sum()), squares + int((lengths**2).sum())
        trained += int((labels != IGNORED).sum())
    return data_work(
        work,
        length=squares / tokens,  # of the example in which a token lies, mean over tokens
        trained=trained / tokens,
        copies=recipe.adapter.dropout.instances,
        recomputes=resolved_training(recipe)["activation_checkpointing"],
    )


# Peak -----------------------------------------------------------------------------------------------------------------

# Dense, 16-bit tensor cores with 32-bit accumulation, TFLOP/s; NVIDIA's data sheets of each device (where these state
# figures with sparsity, half of them). The first pattern found in torch.cuda.get_device_name() counts.
PEAK_TFLOPS = (
    (r"GB200", 2500.0),
    (r"B200", 2250.0),
    (r"GH200", 990.0),
    (r"H200 NVL", 835.5),
    (r"H200", 989.5),
    (r"H100 NVL", 835.5),
    (r"H100 PCIe", 756.5),
    (r"H100", 989.5),
    (r"H800 PCIe", 756.5),
    (r"H800", 989.5),
    (r"A100", 312.0),
    (r"A800", 312.0),
    (r"L40S", 362.0),
    (r"L40\b", 181.0),
    (r"L4\b", 121.0),
    (r"A40\b", 149.7),
    (r"A30\b", 165.0),
    (r"A10\b", 125.0),
    (r"RTX A6000", 154.8),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
)
PEAK_TFLOPS_FLOAT16_ONLY = ((r"V100.*PCI", 112.0), (r"V100", 125.0), (r"\bT4\b", 65.0))
"""Devices whose tensor cores have no bfloat16."""


def peak_flops(device: str, dtype: str) -> float | None:
    """FLOP/s that a device can reach at most in this dtype; None for one that is not in the table, or in float32.

    Args:
        device: of ``torch.cuda.get_device_name()``.
        dtype: of the recipe's base.
    """
    if dtype == "float32":
        return None
    table = PEAK_TFLOPS + (PEAK_TFLOPS_FLOAT16_ONLY if dtype == "float16" else ())
    found = [tflops for pattern, tflops in table if re.search(pattern, device)]
    return found[0] * 1e12 if found else None


def own_peak_flops(dtype: str) -> float | None:
    """:func:`peak_flops` of this process's device; None on a CPU."""
    return peak_flops(torch.cuda.get_device_name(), dtype) if torch.cuda.is_available() else None
