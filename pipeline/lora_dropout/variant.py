"""The masked forward pass of one LoRA layer, as a peft ``LoraVariant``.

``h = W0 x + (alpha/rank) * B_hat A_hat x`` with ``A_hat = A diag(m_A)``, ``B_hat = diag(m_B) B`` (equation 2 of
arXiv 2404.09610). The masks fold into A and B, never onto activations, so the pass allocates nothing of the size
of ``x`` that plain LoRA does not. Differs from *fresh noise per token* on the activations, the usual mis-port.

Legend: G groups (masks), b rows per group, T tokens, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch.nn import functional as F


@dataclass
class LayerMasks:
    """Masks of one layer. Held by reference and outside ``nn.Module`` state: DDP would broadcast a buffer."""

    kept_in: torch.Tensor
    """``(G, in)`` bool, the kept columns of A."""
    kept_out: torch.Tensor
    """``(G, out)`` bool, the kept rows of B."""
    scale: float
    """(1 / (1-p))**2, of both masks together."""


def masked_weights(
    weight_a: torch.Tensor, weight_b: torch.Tensor, masks: LayerMasks, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``A_hat`` ``(G, r, in)``, and ``B_hat`` ``(G, out, r)`` times all factors, in the weights' dtype.

    On B the factors cost nothing; peft multiplies the output, which is larger. They are one Python float: a factor of
    1 / (1-p) held in bfloat16 would be off by up to 0.2 %, in one direction.
    """
    masked_a = weight_a[None] * masks.kept_in[:, None, :]
    masked_b = weight_b[None] * masks.kept_out[:, :, None] * (scaling * masks.scale)
    return masked_a, masked_b


def lora_output(x: torch.Tensor, masked_a: torch.Tensor, masked_b: torch.Tensor) -> torch.Tensor:
    """``B_hat A_hat x`` row group by row group.

    Args:
        x: ``(G*b, ..., in)``, group-major: rows ``[g*b, (g+1)*b)`` belong to mask g.
        masked_a: ``(G, r, in)``.
        masked_b: ``(G, out, r)``.

    Returns:
        ``(G*b, ..., out)``.

    Raises:
        ValueError: the batch does not divide into G groups.
    """
    groups = masked_a.shape[0]
    if x.shape[0] % groups:
        raise ValueError(
            f"{groups} mask groups need a batch whose rows divide by {groups}, found {x.shape[0]} rows; "
            "rows must be group-major inside LoraDropout.masks()"
        )
    if groups == 1:
        return F.linear(F.linear(x, masked_a[0]), masked_b[0])
    grouped = x.reshape(groups, -1, x.shape[-1])  # (G, b*T, in)
    output = torch.bmm(torch.bmm(grouped, masked_a.mT), masked_b.mT)  # (G, b*T, out)
    return output.reshape(*x.shape[:-1], output.shape[-1])


class LoraDropoutVariant(LoraVariant):
    """Attached to a layer only while masks are active; detached, peft's stock code runs."""

    def __init__(self, masks: LayerMasks) -> None:
        self.masks = masks

    def forward(  # type: ignore[override]  # peft declares a static method and calls it on the instance
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """``result`` plus the scaled masked update; called by the layer in place of its own LoRA lines.

        Args:
            x: ``(G*b, ..., in)``, already in the adapter's dtype (or autocast decides).
            result: ``(G*b, ..., out)``, the frozen layer's output.
        """
        weight_a = module.lora_A[active_adapter].get_parameter("weight")
        weight_b = module.lora_B[active_adapter].get_parameter("weight")
        masked_a, masked_b = masked_weights(weight_a, weight_b, self.masks, module.scaling[active_adapter])
        return result + lora_output(x, masked_a, masked_b)
