"""Equation 2 with explicit dense weights in float64: what the masked layers are held against.

For each mask, ``W0 + s * B_hat A_hat`` is written out as one dense weight (see ``lora_kinds``), the rows or the tokens
under that mask go through it, and autograd gives the gradients. Nothing here knows how the library computes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from lora_kinds import Kind, Linear8bitKind
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from pipeline.lora_dropout import LoraDropout


class OneLayer(nn.Module):
    """A model of a single layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.is_loaded_in_4bit = isinstance(layer, bitsandbytes.nn.Linear4bit)  # where peft looks, as transformers sets
        self.is_loaded_in_8bit = isinstance(layer, bitsandbytes.nn.Linear8bitLt)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class Numbers:
    """The dtypes of a run."""

    base: torch.dtype
    adapter: torch.dtype
    autocast: torch.dtype | None = None

    def context(self) -> AbstractContextManager[Any]:
        """Autocast, where it is on."""
        return nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)


@dataclass(frozen=True)
class Mode:
    """How a batch falls into groups."""

    name: str
    groups: int
    rows: int
    """Of each group."""
    copies: bool = False
    """Whether each group has the same examples."""
    lengths: tuple[int, ...] | None = None
    balanced: int | None = None
    inner: bool = True
    """Whether the input has dimensions between rows and features."""

    def arguments(self) -> dict[str, Any]:
        """Of ``LoraDropout.masks``."""
        rows = None if self.lengths else self.groups * self.rows
        return {"rows": rows, "lengths": self.lengths, "balanced": self.balanced}

    def coordinates(self) -> list[tuple[int, ...]]:
        return [(3, group) for group in range(self.groups)]

    def parts(self) -> list[tuple[slice, ...]]:
        """Where each group is in the batch."""
        if self.lengths is None:
            return [(slice(at, at + self.rows),) for at in range(0, self.groups * self.rows, self.rows)]
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [(slice(0, 1), slice(end - length, end)) for end, length in zip(ends, self.lengths, strict=True)]

    def input(self, kind: Kind, size_in: int) -> torch.Tensor:
        if self.lengths is not None:
            return kind.input(1, size_in, (sum(self.lengths),))
        inner = kind.inner if self.inner else ()
        rows = self.rows if self.copies else self.groups * self.rows
        x = kind.input(rows, size_in, inner)
        return x.repeat(self.groups, *[1] * (x.dim() - 1)) if self.copies else x


def adapted(layer: nn.Module, config: PeftConfig, dtype: torch.dtype) -> PeftModel:
    """The layer with a random adapter, B included, in the dtype."""
    model = get_peft_model(OneLayer(layer), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            fan_in = max(1, parameter.numel() // len(parameter))
            parameter.data = (torch.randn(parameter.shape) / fan_in**0.5).to(dtype)
    return model


def reference(
    kind: Kind,
    model: PeftModel,
    dropout: LoraDropout,
    mode: Mode,
    x: torch.Tensor,
    upstream: torch.Tensor,
    numbers: Numbers,
    absolute: bool = False,
) -> dict[str, torch.Tensor]:
    """Output and all gradients, float64.

    ``absolute`` takes the absolute value of every number that goes in: each element is then the sum of the sizes of the
    terms that it is made of, and the unit in which rounding errors of that element are to be counted.
    """

    def number(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().double().abs() if absolute else tensor.detach().double()

    ((name, masked),) = dropout.layers.items()
    layer, base = masked.layer, masked.layer.get_base_layer()
    masks = dropout.layer_masks("train", mode.coordinates(), **mode.arguments())[name]
    weights = {key: number(parameter).requires_grad_() for key, parameter in kind.parameters(layer).items()}
    biases = [number(parameter) for key, parameter in base.named_parameters() if key == "bias"]
    x64 = number(x).requires_grad_() if x.is_floating_point() else x
    parts = []
    for group, part in enumerate(mode.parts()):
        kept_in, kept_out = masks.kept_in[group].double(), masks.kept_out[group].double()
        keep = 1 - dropout.rate
        weight = number(kind.frozen(base))
        weight = weight + kind.delta(weights, kind.scaling(layer), kept_in / keep, kept_out / keep)
        parts.append(kind.applied(weight, *(biases or [None]), x64[part], base))
    output = torch.cat(parts, dim=0 if mode.lengths is None else 1)
    output.backward(number(upstream))
    result = {"output": output.detach(), **{key: weight.grad for key, weight in weights.items()}}
    if x.is_floating_point():
        result["x"] = x64.grad
    if isinstance(kind, Linear8bitKind):
        x = x.detach().clone().requires_grad_()
        with numbers.context():  # which rounds the input, and with it the 8 bits
            own = base(x)
            own.backward(upstream.to(own.dtype))
        result["output"] += number(own)
        result["x"] += number(x.grad)
    return result


def computed(kind: Kind, model: PeftModel, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same by the model, in its dtype, under whatever masks are on."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    model.zero_grad()
    output = model(x)
    output.backward(upstream.to(output.dtype))
    found = {"output": output.detach(), **{k: p.grad for k, p in kind.parameters(model.base_model.model.layer).items()}}
    return {**found, "x": x.grad} if x.is_floating_point() else found


def error(found: torch.Tensor, expected: torch.Tensor, unit: torch.Tensor) -> float:
    """Largest difference of an element, in its unit; where nothing but zeros goes in, nothing else may come out."""
    difference = (found.double() - expected).abs()
    without_unit = torch.where(difference > 0, float("inf"), 0.0).double()
    return torch.where(unit > 0, difference / unit, without_unit).max().item()
