"""AdaLoRA's layers: ``dW = P Lambda Q``, rows of P and columns of Q masked, Lambda never.

Equations 4-6 of arXiv 2404.09610. peft names P ``lora_B`` ``(out, r)``, Lambda ``lora_E`` ``(r, 1)`` and Q ``lora_A``
``(r, in)``, and scales by ``alpha / (ranknum + 1e-5)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.adalora.layer import AdaLoraLayer, SVDConv2d, SVDLinear
from torch import nn
from torch.nn import functional as F

from pipeline.lora_dropout.convolution import channel_mask, check_batch, refuse_packed_rows
from pipeline.lora_dropout.layer_masks import LayerMasks
from pipeline.lora_dropout.linear import compute_dtype, updated
from pipeline.lora_dropout.swapped import SwappedLayer


def scaled_q(layer: AdaLoraLayer, adapter_name: str, factor: float) -> torch.Tensor:
    """``Lambda Q`` ``(r, in)`` times peft's scaling and the factor, float32 where Q is of 16 bits.

    The scaling is computed in float32 on the r values of Lambda: it costs nothing there, and in 16 bits it would be off
    in one direction.
    """
    scaling = layer.scaling[adapter_name] * factor / (layer.ranknum.get_parameter(adapter_name).float() + 1e-5)
    return layer.lora_A.get_parameter(adapter_name) * (layer.lora_E.get_parameter(adapter_name).float() * scaling)


def added_linear(
    layer: AdaLoraLayer, adapter_name: str, masks: LayerMasks | None, result: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """``result`` plus the adapter's update, in the dtype of ``result``; without masks, an unmasked adapter's."""
    dtype = compute_dtype(x)
    weight_p = layer.lora_B.get_parameter(adapter_name).to(dtype)[None]
    if masks is None:
        return updated(result, x, scaled_q(layer, adapter_name, 1.0).to(dtype)[None], weight_p)
    masks.check_rows(x)
    masked_q = scaled_q(layer, adapter_name, masks.scale).to(dtype)[None] * masks.kept_in[:, None, :]
    runs = masks.ragged_runs(x.numel() // x.shape[-1])
    return updated(result, x, masked_q, weight_p * masks.kept_out[:, :, None], runs)


def added_convolution(
    layer: AdaLoraLayer, adapter_name: str, masks: LayerMasks | None, result: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """The same for a convolution: masks on channels (see ``convolution.py``), P Lambda Q as one kernel, as in stock."""
    base = layer.get_base_layer()
    assert isinstance(base, nn.Conv2d)
    q = scaled_q(layer, adapter_name, 1.0 if masks is None else masks.scale)
    kernel = (layer.lora_B.get_parameter(adapter_name).to(q.dtype) @ q).to(compute_dtype(x))
    kernel = kernel.view(base.out_channels, base.in_channels, *base.kernel_size)
    if masks is not None:
        check_batch(masks, x, base.kernel_size)
        x = x * channel_mask(masks.kept_in, x)
    output = F.conv2d(x, kernel, None, base.stride, base.padding, base.dilation, base.groups)
    if masks is not None:
        output = output * channel_mask(masks.kept_out, output)
    return (result + output).to(result.dtype)


Update = Callable[[AdaLoraLayer, str, LayerMasks | None, torch.Tensor, torch.Tensor], torch.Tensor]


def masked_pass(layer: AdaLoraLayer, update: Update, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The frozen layer's ``result`` plus the update of each active adapter, as in stock."""
    masks = layer.__dict__["masks"]
    for adapter_name in layer.active_adapters:
        if adapter_name in layer.lora_A and layer.r[adapter_name] > 0:  # AdaLoRA may leave a layer no rank
            x = layer._cast_input_dtype(x, layer.lora_A.get_parameter(adapter_name).dtype)
            result = update(layer, adapter_name, masks.get(adapter_name), result, layer.lora_dropout[adapter_name](x))
    return result


# A class can only be swapped for one with the same single base, so each repeats the same few lines.


class MaskedSVDLinear(SVDLinear):
    """``SVDLinear`` while masks are active."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Masked."""
        if self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        return masked_pass(self, added_linear, self.base_layer(x, *args, **kwargs), x)


class MaskedSVDConv2d(SVDConv2d):
    """``SVDConv2d`` while masks are active."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Masked."""
        if self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        return masked_pass(self, added_convolution, self.base_layer(x, *args, **kwargs), x)


class MaskedSVD(SwappedLayer):
    """AdaLoRA's layer around a linear layer, in 16 bits or more or of bitsandbytes."""

    layer: AdaLoraLayer
    classes: ClassVar[dict[type, type]] = {SVDLinear: MaskedSVDLinear}

    def device(self) -> torch.device:
        """Of Q."""
        return self.layer.lora_A.get_parameter(self.adapter_name).device

    def member_weights(self, masks: LayerMasks) -> dict[str, torch.Tensor]:
        """The first group as a plain LoRA at **scaling 1** (alpha = rank): Lambda and all factors are in ``lora_A``."""
        with torch.no_grad():
            masked_q = scaled_q(self.layer, self.adapter_name, masks.scale).float() * masks.kept_in[0]
            return {
                "lora_A": masked_q,
                "lora_B": self.layer.lora_B.get_parameter(self.adapter_name).float() * masks.kept_out[0][:, None],
            }


class MaskedSVDConvolution(MaskedSVD):
    """AdaLoRA's layer around a ``Conv2d``."""

    classes: ClassVar[dict[type, type]] = {SVDConv2d: MaskedSVDConv2d}

    def attach(self, masks: LayerMasks) -> None:
        """Swap the class."""
        refuse_packed_rows(masks)
        super().attach(masks)

    def member_weights(self, masks: LayerMasks) -> dict[str, torch.Tensor]:
        """As above, in the shapes of a LoRA convolution: ``(r, in, *kernel)`` and ``(out, r, 1, 1)``."""
        base = self.layer.get_base_layer()
        assert isinstance(base, nn.Conv2d)
        with torch.no_grad():
            q = scaled_q(self.layer, self.adapter_name, masks.scale).float().unflatten(1, (-1, *base.kernel_size))
            weight_p = self.layer.lora_B.get_parameter(self.adapter_name).float() * masks.kept_out[0][:, None]
            return {"lora_A": q * masks.kept_in[0][:, None, None], "lora_B": weight_p[:, :, None, None]}


if is_bnb_available():
    from peft.tuners.adalora.bnb import SVDLinear8bitLt

    class MaskedSVDLinear8bitLt(SVDLinear8bitLt):
        """``SVDLinear8bitLt`` while masks are active."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Masked."""
            if self.disable_adapters:
                return super().forward(x)
            return masked_pass(self, added_linear, self.base_layer(x), x)

    MaskedSVD.classes[SVDLinear8bitLt] = MaskedSVDLinear8bitLt

if is_bnb_4bit_available():
    from peft.tuners.adalora.bnb import SVDLinear4bit

    class MaskedSVDLinear4bit(SVDLinear4bit):
        """``SVDLinear4bit`` while masks are active."""

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            """Masked."""
            if self.disable_adapters:
                return super().forward(x, *args, **kwargs)
            return masked_pass(self, added_linear, self.base_layer(x, *args, **kwargs), x)

    MaskedSVD.classes[SVDLinear4bit] = MaskedSVDLinear4bit
