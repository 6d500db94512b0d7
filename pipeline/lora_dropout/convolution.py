"""The masked pass of a LoRA convolution, as a peft ``LoraVariant``.

The paper leaves convolutions open. Ours: input channels are masked on A and output channels on B, as a convolution is
a linear layer over channels at every offset of its kernel; one mask serves all offsets and all positions.

There is no batched convolution (one kernel per row), so masks act on activations, channel-wise:
``B_hat * A_hat * x = m_B . (B * A * (m_A . x))`` exactly, with one number per row and channel, the same at all
positions. Cost: one more tensor of the size of the input; the product with m_B replaces peft's with the scaling.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from pipeline.lora_dropout.layer_masks import LayerMasks, MaskedLayer, MaskedVariant


def channel_mask(kept: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``(G, C)`` bool for the rows and channels of ``x`` ``(rows, C, ...)``: ``(rows, C, 1, ...)``."""
    return kept.repeat_interleave(x.shape[0] // len(kept), dim=0).view(x.shape[:2] + (1,) * (x.dim() - 2))


def check_batch(masks: LayerMasks, x: torch.Tensor, kernel: tuple[int, ...]) -> None:
    """Refuse an input whose rows do not belong to the masks' groups.

    Raises:
        ValueError: names the layer.
    """
    if x.dim() != len(kernel) + 2:
        raise ValueError(
            f"{masks.layer}: a convolution under masks needs a batch of {len(kernel) + 2} dimensions (rows, channels, "
            f"...), found {x.dim()}"
        )
    masks.check_rows(x)


class MaskedConvolutionVariant(MaskedVariant):
    """A convolution's masked pass."""

    def forward(  # type: ignore[override]  # peft declares a static method and calls it on the instance
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """``result`` plus the scaled masked update.

        peft's A convolves all input channels at once and only B has the base layer's ``groups``: masks of channels mean
        the same with and without groups.

        Args:
            x: ``(rows, in, ...)``, in the adapter's dtype (or autocast decides).
            result: ``(rows, out, ...)``, the frozen layer's output.
        """
        base = module.get_base_layer()
        assert isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        check_batch(self.masks, x, base.kernel_size)
        x = module.lora_dropout[active_adapter](x)
        hidden = module.lora_A[active_adapter](x * channel_mask(self.masks.kept_in, x))
        # all factors on r channels, as a Python float: in bfloat16, masks scaled by them would be off in one direction
        output = module.lora_B[active_adapter](hidden * (module.scaling[active_adapter] * self.masks.scale))
        return result + output * channel_mask(self.masks.kept_out, output)


class MaskedConvolution(MaskedLayer):
    """``Conv1d``, ``Conv2d`` and ``Conv3d``, with and without groups."""

    layer: LoraLayer

    def attach(self, masks: LayerMasks) -> None:
        """Put the masked pass in place of peft's."""
        refuse_packed_rows(masks)
        self.layer.lora_variant[self.adapter_name] = MaskedConvolutionVariant(masks)

    def detach(self) -> None:
        """peft's own lines run again."""
        self.layer.lora_variant.pop(self.adapter_name, None)

    def member_weights(self, masks: LayerMasks) -> dict[str, torch.Tensor]:
        """A_hat ``(r, in, *kernel)`` and B_hat ``(out, r / groups, 1, ...)`` of the first group."""
        weight_a = self.layer.lora_A[self.adapter_name].get_parameter("weight").detach().float()
        weight_b = self.layer.lora_B[self.adapter_name].get_parameter("weight").detach().float()
        ones = (1,) * (weight_a.dim() - 2)
        return {
            "lora_A": weight_a * masks.kept_in[0].view(1, -1, *ones),
            "lora_B": weight_b * masks.scale * masks.kept_out[0].view(-1, 1, *ones),
        }


def refuse_packed_rows(masks: LayerMasks) -> None:
    """Raise ``ValueError`` where several masks are to share a row: a kernel would reach across their border."""
    if masks.runs is not None and masks.groups > 1:
        raise ValueError(
            f"{masks.layer}: a convolution cannot have {masks.groups} masks in one row of packed examples, its kernel "
            "reaches from one into the next; give each example its own row"
        )
