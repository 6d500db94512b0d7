"""Every kind of layer that LoRA Dropout masks, with its dense weight ``W0 + s * B_hat A_hat`` written out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

Weights = dict[str, torch.Tensor]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Experts(nn.Module):
    """One parameter for all experts, ``(E, out, in)`` or ``(E, in, out)``; the output is a weighted sum of theirs."""

    def __init__(self, experts: int, size_in: int, size_out: int, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed  # where peft looks
        shape = (experts, size_in, size_out) if is_transposed else (experts, size_out, size_in)
        self.weight = nn.Parameter(torch.randn(shape) / size_in**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.mT if self.is_transposed else self.weight
        return torch.einsum("e,...i,eoi->...o", self.shares(weight), x, weight)

    @staticmethod
    def shares(weight: torch.Tensor) -> torch.Tensor:
        """Of the experts in the sum, all different."""
        return torch.arange(1, len(weight) + 1, dtype=weight.dtype)


class Dense(nn.Module):
    """A layer with a bare parameter of two dimensions."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size_out, size_in) / size_in**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class Kind:
    """A kind of layer: how to build it, and its dense weight. Base: linear layers."""

    shapes: tuple[tuple[int, int, int], ...] = ((13, 7, 3), (24, 33, 1), (65, 17, 8), (16, 48, 20))
    """in, out, rank."""
    inner: tuple[int, ...] = (4,)
    """Dimensions of an input between its rows and its features."""
    packs = True
    """Whether several masks may share a row."""
    one_group = False
    parameter_names = ("lora_A", "lora_B")

    def layer(self, size_in: int, size_out: int) -> nn.Module:
        return nn.Linear(size_in, size_out)

    def quantised(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The layer as the model holds it, in the dtype."""
        return layer.to(dtype)

    def config(self, rank: int) -> PeftConfig:
        return LoraConfig(r=rank, lora_alpha=6.0, target_modules=["layer"])

    def input(self, rows: int, size_in: int, inner: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(rows, *inner, size_in)

    def frozen(self, layer: nn.Module) -> torch.Tensor:
        """W0, float64."""
        return layer.weight.detach().double()

    def delta(self, weights: Weights, scaling: float, kept_in: torch.Tensor, kept_out: torch.Tensor) -> torch.Tensor:
        """``s B_hat A_hat``, shaped like W0; masks as float64 with their factors."""
        a_hat = weights["lora_A"] @ torch.diag(kept_in)
        b_hat = torch.diag(kept_out) @ weights["lora_B"]
        return scaling * b_hat @ a_hat

    def applied(
        self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor:
        """What the layer does with a dense weight."""
        return F.linear(x, weight, bias)

    def parameters(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """The adapter's, by peft's names."""
        found = {}
        for name in self.parameter_names:
            held = getattr(layer, name)["default"]
            found[name] = held if isinstance(held, nn.Parameter) else held.weight
        return found

    def scaling(self, layer: nn.Module) -> float:
        return layer.scaling["default"]


class Conv1DKind(Kind):
    """GPT-2's linear layer, whose weight is (in, out)."""

    def layer(self, size_in: int, size_out: int) -> nn.Module:
        return Conv1D(size_out, size_in)

    def config(self, rank: int) -> PeftConfig:
        return LoraConfig(r=rank, lora_alpha=6.0, target_modules=["layer"], fan_in_fan_out=True)

    def frozen(self, layer: nn.Module) -> torch.Tensor:
        return super().frozen(layer).T


class Linear4bitKind(Kind):
    def layer(self, size_in: int, size_out: int) -> nn.Module:
        return nn.Linear(size_in, size_out, bias=False)

    def quantised(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
        size_out, size_in = layer.weight.shape
        quantised = bitsandbytes.nn.Linear4bit(size_in, size_out, bias=False, compute_dtype=dtype, quant_type="nf4")
        quantised.load_state_dict(layer.to(dtype).state_dict())
        quantised.support_avx512bf16_for_cpu = False  # as pipeline.base does
        return quantised.to("cpu")  # quantises

    def frozen(self, layer: nn.Module) -> torch.Tensor:
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()


class Linear8bitKind(Linear4bitKind):
    """Its frozen product rounds the input to 8 bits: the reference takes that product from the layer itself."""

    def quantised(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
        size_out, size_in = layer.weight.shape
        quantised = bitsandbytes.nn.Linear8bitLt(size_in, size_out, bias=False, has_fp16_weights=False)
        quantised.load_state_dict(layer.state_dict())
        return quantised.to("cpu")

    def frozen(self, layer: nn.Module) -> torch.Tensor:
        return torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)


class EmbeddingKind(Kind):
    parameter_names = ("lora_embedding_A", "lora_embedding_B")

    def layer(self, size_in: int, size_out: int) -> nn.Module:
        return nn.Embedding(size_in, size_out)

    def input(self, rows: int, size_in: int, inner: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(1, size_in, (rows, *inner))

    def frozen(self, layer: nn.Module) -> torch.Tensor:
        return super().frozen(layer).T

    def delta(self, weights: Weights, scaling: float, kept_in: torch.Tensor, kept_out: torch.Tensor) -> torch.Tensor:
        names = {"lora_A": weights["lora_embedding_A"], "lora_B": weights["lora_embedding_B"]}
        return super().delta(names, scaling, kept_in, kept_out)

    def applied(
        self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor:
        return F.one_hot(x, weight.shape[1]).double() @ weight.T


class ScaledEmbeddingKind(EmbeddingKind):
    """Gemma's, whose output is multiplied by a constant."""

    def layer(self, size_in: int, size_out: int) -> nn.Module:
        return Gemma3TextScaledWordEmbedding(size_in, size_out, padding_idx=0, embed_scale=4.5)

    def applied(
        self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor:
        return super().applied(weight, bias, x, layer) * 4.5


@dataclass
class ConvolutionKind(Kind):
    """With any number of dimensions and groups; the dense kernel has no groups, so a group's is block-diagonal."""

    dimensions: int = 2
    groups: int = 1
    packs: bool = False
    shapes: Any = ((5, 7, 3), (6, 2, 4))

    @property
    def inner(self) -> tuple[int, ...]:  # type: ignore[override]
        return (7, 5, 3)[: self.dimensions]

    def layer(self, size_in: int, size_out: int) -> nn.Module:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dimensions - 1]
        return kind(size_in, size_out, 3, stride=2, padding=1, groups=self.groups)

    def input(self, rows: int, size_in: int, inner: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(rows, size_in, *inner)

    def ungrouped(self, kernel: torch.Tensor) -> torch.Tensor:
        """``(out, in, ...)`` from ``(out, in / groups, ...)``."""
        parts = kernel.chunk(self.groups)
        width = kernel.shape[1]
        dense = torch.zeros(len(kernel), width * self.groups, *kernel.shape[2:], dtype=kernel.dtype)
        for group, part in enumerate(parts):
            dense[group * len(part) : (group + 1) * len(part), group * width : (group + 1) * width] = part
        return dense

    def frozen(self, layer: nn.Module) -> torch.Tensor:
        return self.ungrouped(super().frozen(layer))

    def delta(self, weights: Weights, scaling: float, kept_in: torch.Tensor, kept_out: torch.Tensor) -> torch.Tensor:
        a_hat = torch.einsum("ri...,i->ri...", weights["lora_A"], kept_in)
        b_hat = torch.diag(kept_out) @ self.ungrouped(weights["lora_B"]).flatten(1)
        return scaling * torch.einsum("or,ri...->oi...", b_hat, a_hat)

    def applied(
        self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor:
        return CONVOLUTIONS[self.dimensions](x, weight, bias, layer.stride, layer.padding)


@dataclass
class ExpertsKind(Kind):
    experts: int = 3
    is_transposed: bool = False
    one_group: bool = True
    packs: bool = False

    def layer(self, size_in: int, size_out: int) -> nn.Module:
        if self.experts == 0:
            return Dense(size_in, size_out)
        return Experts(self.experts, size_in, size_out, self.is_transposed)

    def config(self, rank: int) -> PeftConfig:
        return LoraConfig(r=rank, lora_alpha=6.0, target_modules=[], target_parameters=["layer.weight"])

    def frozen(self, layer: nn.Module) -> torch.Tensor:
        weight = super().frozen(layer)
        return weight.mT if self.is_transposed else weight.view(-1, *weight.shape[-2:])

    def delta(self, weights: Weights, scaling: float, kept_in: torch.Tensor, kept_out: torch.Tensor) -> torch.Tensor:
        """Expert by expert; peft keeps A as (E r, in) and B as (out, r E), experts fastest."""
        experts = max(1, self.experts)
        rank = len(weights["lora_A"]) // experts
        parts = []
        for e, (own_in, own_out) in enumerate(zip(kept_in.chunk(experts), kept_out.chunk(experts), strict=True)):
            a = weights["lora_A"][e * rank : (e + 1) * rank]
            b = weights["lora_B"][:, [k * experts + e for k in range(rank)]]
            parts.append(scaling * (torch.diag(own_out) @ b) @ (a @ torch.diag(own_in)))
        return torch.stack(parts)

    def applied(
        self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor:
        return sum(F.linear(x, one) * share for one, share in zip(weight, Experts.shares(weight), strict=True))


class SVDKind(Kind):
    parameter_names = ("lora_A", "lora_B", "lora_E")

    def config(self, rank: int) -> PeftConfig:
        return AdaLoraConfig(init_r=rank, target_r=1, lora_alpha=6, total_step=100, target_modules=["layer"])

    def delta(self, weights: Weights, scaling: float, kept_in: torch.Tensor, kept_out: torch.Tensor) -> torch.Tensor:
        names = {"lora_A": torch.diag(weights["lora_E"][:, 0]) @ weights["lora_A"], "lora_B": weights["lora_B"]}
        return Kind.delta(self, names, scaling, kept_in, kept_out)

    def scaling(self, layer: nn.Module) -> float:
        return layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5)


class SVD4bitKind(SVDKind, Linear4bitKind):
    pass


class SVD8bitKind(SVDKind, Linear8bitKind):
    pass


@dataclass
class SVDConvolutionKind(SVDKind, ConvolutionKind):
    def delta(self, weights: Weights, scaling: float, kept_in: torch.Tensor, kept_out: torch.Tensor) -> torch.Tensor:
        q = (torch.diag(weights["lora_E"][:, 0]) @ weights["lora_A"]).unflatten(1, (-1, *(3,) * self.dimensions))
        names = {"lora_A": q, "lora_B": weights["lora_B"]}
        return ConvolutionKind.delta(self, names, scaling, kept_in, kept_out)


KINDS: dict[str, Kind] = {
    "Linear": Kind(),
    "Conv1D": Conv1DKind(),
    "Linear4bit": Linear4bitKind(),
    "Linear8bitLt": Linear8bitKind(),
    "Embedding": EmbeddingKind(),
    "Embedding, scaled": ScaledEmbeddingKind(),
    "Conv1d": ConvolutionKind(dimensions=1),
    "Conv2d": ConvolutionKind(dimensions=2),
    "Conv3d": ConvolutionKind(dimensions=3),
    "Conv2d, 2 groups": ConvolutionKind(dimensions=2, groups=2, shapes=((6, 4, 2), (10, 6, 4))),
    "Conv1d, depthwise": ConvolutionKind(dimensions=1, groups=4, shapes=((4, 8, 4), (4, 4, 8))),
    "experts": ExpertsKind(),
    "experts, transposed": ExpertsKind(is_transposed=True),
    "experts, one": ExpertsKind(experts=1),
    "parameter of two dimensions": ExpertsKind(experts=0),
    "SVDLinear": SVDKind(),
    "SVDLinear4bit": SVD4bitKind(),
    "SVDLinear8bitLt": SVD8bitKind(),
    "SVDConv2d": SVDConvolutionKind(),
}
