"""Layer level: one linear layer with its adapter, as the trainer runs it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from pipeline.base import DTYPES
from pipeline.benchmark.measure import Interval, mark, stored_bytes
from pipeline.benchmark.variants import Variant
from pipeline.lora_dropout import LoraDropout, example_coordinates, instance_coordinates
from pipeline.recipe import Recipe


class OneLayer(nn.Module):
    """A module with one linear layer, so that peft finds it by name."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(rows, tokens, in)`` to ``(rows, tokens, out)``."""
        return self.linear(x)


def frozen_linear(size_in: int, size_out: int, recipe: Recipe, device: torch.device) -> nn.Module:
    """A random layer, stored as the recipe's base is."""
    dtype = DTYPES[recipe.base.dtype]
    if recipe.base.quantization == "none":
        return nn.Linear(size_in, size_out, bias=False, dtype=dtype, device=device).requires_grad_(False)
    layer = Linear4bit(
        size_in,
        size_out,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=recipe.base.double_quantization,
        quant_type="nf4",
        quant_storage=dtype,
    )
    layer.support_avx512bf16_for_cpu = False  # see pipeline.base.keep_training_kernel
    return layer.to(device)


class LayerSubject:
    """Forward and backward of one layer under one variant, in autocast as in training; there is no optimizer.

    Adapters have the dtype that each trainer gives them: stock peft's on a quantised base is cast by trl to bfloat16,
    ours stays float32.
    """

    def __init__(self, variant: Variant, recipe: Recipe, linear: nn.Module, x: torch.Tensor, out: int) -> None:
        """Put the adapter on.

        Args:
            variant: of the table.
            recipe: whose adapter it is.
            linear: frozen; shared by all variants.
            x: ``(rows, tokens, in)``.
            out: output features.
        """
        adapter = variant.applied(recipe).adapter
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=int(adapter.alpha),
            lora_dropout=adapter.input_dropout,
            target_modules=["linear"],
            init_lora_weights=False,
        )
        self.variant = variant
        self.model: PeftModel = get_peft_model(OneLayer(linear), config).train().to(x.device)
        if variant.stock and recipe.base.quantization != "none":
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        dropout = variant.dropout
        self.dropout = None if variant.stock else LoraDropout(self.model, dropout.rate, recipe.seed)
        self.x = x.repeat(variant.copies_at_once, 1, 1).requires_grad_()
        self.gradient = torch.randn(*self.x.shape[:-1], out, dtype=x.dtype, device=x.device)
        self.rows = x.shape[0]
        self._step = 0

    def run(self) -> Mapping[str, list[Interval]]:
        """One micro-batch."""
        self._step += 1
        coordinates = self._coordinates()
        passes = self.variant.copies // self.variant.copies_at_once
        groups = len(coordinates) // passes
        forward, both = [], []
        for number in range(passes):
            start = mark(self.x.device)
            middle = self._pass(coordinates[number * groups : (number + 1) * groups])
            forward.append((start, middle))
            both.append((start, mark(self.x.device)))
        self.model.zero_grad()
        self.x.grad = None
        return {"forward": forward, "forward+backward": both}

    def own_bytes(self) -> int:
        """The adapter's."""
        return stored_bytes([parameter for parameter in self.model.parameters() if parameter.requires_grad])

    def _pass(self, coordinates: list[tuple[int, ...]]) -> float | torch.cuda.Event:
        """Forward and backward; returns the moment between them."""
        device = self.x.device
        with torch.autocast(device.type, dtype=self.x.dtype, enabled=self.x.dtype != torch.float32):
            if self.dropout is None:
                output = self.model(self.x)
                middle = mark(device)
                output.backward(self.gradient)
                return middle
            with self.dropout.masks("benchmark", coordinates):
                output = self.model(self.x)
                middle = mark(device)
                output.backward(self.gradient)
                return middle

    def _coordinates(self) -> list[tuple[int, ...]]:
        if self.variant.dropout.sampling == "example":
            return example_coordinates(self._step, range(self.rows), self.variant.copies)
        return instance_coordinates(self._step, 0, 0, 1, self.variant.copies)
