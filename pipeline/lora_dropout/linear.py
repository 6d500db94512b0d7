"""The masked forward pass of a linear LoRA layer, as a peft ``LoraVariant``.

``h = W0 x + (alpha/rank) * B_hat A_hat x`` with ``A_hat = A diag(m_A)``, ``B_hat = diag(m_B) B`` (equation 2 of
arXiv 2404.09610). The masks fold into A and B, never onto activations, so the pass allocates nothing of the size
of ``x`` that plain LoRA does not. Differs from *fresh noise per token* on the activations, the usual mis-port.

Legend: G groups (masks), S tokens of one group, r rank.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import LoraLayer
from torch.nn import functional as F

from pipeline.lora_dropout.layer_masks import LayerMasks, MaskedLayer, MaskedVariant, Runs


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What a matrix product of ``x`` is computed in: autocast's dtype, where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def masked_rows(weight_b: torch.Tensor, masks: LayerMasks, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """``B_hat`` ``(G, out, r)`` times all factors, in the dtype.

    On B the factors cost nothing; peft multiplies the output, which is larger. They are one Python float: a factor of
    1 / (1-p) held in bfloat16 would be off by up to 0.2 %, in one direction. Cast first, masked after: the G copies are
    made in the dtype that computes. Transposed in memory: a product along rows of ``out`` is vectorised, along ``r``
    it is not (5 times slower on a CPU, 32 groups).
    """
    scaled = (weight_b * (scaling * masks.scale)).mT.to(dtype, memory_format=torch.contiguous_format)
    return (scaled[None] * masks.kept_out[:, None, :]).mT


def masked_weights(
    weight_a: torch.Tensor, weight_b: torch.Tensor, masks: LayerMasks, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``A_hat`` ``(G, r, in)``, and ``B_hat`` ``(G, out, r)`` times all factors, in the dtype."""
    return weight_a.to(dtype)[None] * masks.kept_in[:, None, :], masked_rows(weight_b, masks, scaling, dtype)


def ragged_product(tokens: torch.Tensor, weights: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Consecutive runs of tokens, each times its own matrix.

    Args:
        tokens: ``(tokens of all runs, in)``.
        weights: ``(G, in, out)``.
        runs: G of them.

    Returns:
        ``(tokens of all runs, out)``.
    """
    # one kernel for all runs, where its rules are met: rows of a multiple of 16 bytes, and bfloat16, the only dtype in
    # which torch.compile takes it (torch 2.13)
    if tokens.dtype == torch.bfloat16 and all(size % 8 == 0 for size in weights.shape[1:]):
        return F.grouped_mm(tokens, weights, offs=runs.ends)
    parts = zip(tokens.split(runs.lengths), weights, strict=True)
    return torch.cat([part @ weight for part, weight in parts])


def added(result: torch.Tensor, hidden: torch.Tensor, masked_b: torch.Tensor, runs: Runs | None = None) -> torch.Tensor:
    """``result + B_hat hidden``, group by group.

    The sum is part of the product where the dtypes allow, which saves an activation-sized tensor and a pass over it
    against ``result + output * scaling``.

    Args:
        result: ``(..., out)``, tokens in the order of ``hidden``.
        hidden: ``(tokens, r)``, G runs of tokens.
        masked_b: ``(G, out, r)``, in the dtype of ``hidden``.
        runs: of tokens; None, all of one length.

    Returns:
        Shape and dtype of ``result``.
    """
    groups, out_features, rank = masked_b.shape
    base = result.reshape(-1, out_features)
    if runs is not None:
        return (base + ragged_product(hidden, masked_b.mT, runs)).reshape(result.shape).to(result.dtype)
    if groups == 1:
        if base.dtype == hidden.dtype:
            return torch.addmm(base, hidden, masked_b[0].mT).reshape(result.shape)
        return (base + hidden @ masked_b[0].mT).reshape(result.shape).to(result.dtype)
    grouped, hidden = base.view(groups, -1, out_features), hidden.view(groups, -1, rank)
    if base.dtype == hidden.dtype:
        return torch.baddbmm(grouped, hidden, masked_b.mT).reshape(result.shape)
    return (grouped + torch.bmm(hidden, masked_b.mT)).reshape(result.shape).to(result.dtype)


def updated(
    result: torch.Tensor,
    x: torch.Tensor,
    masked_a: torch.Tensor,
    masked_b: torch.Tensor,
    runs: Runs | None = None,
) -> torch.Tensor:
    """``result + B_hat A_hat x``, group by group.

    Args:
        result: ``(..., out)``, tokens in the order of ``x``.
        x: ``(..., in)``, group-major: its flattened tokens are G runs.
        masked_a: ``(G, r, in)``.
        masked_b: ``(G, out, r)``.
        runs: of tokens; None, all of one length.

    Returns:
        Shape and dtype of ``result``.
    """
    groups, rank, in_features = masked_a.shape
    tokens = x.to(masked_a.dtype).reshape(-1, in_features)
    if runs is not None:
        hidden = ragged_product(tokens, masked_a.mT, runs)
    elif groups == 1:
        hidden = tokens @ masked_a[0].mT
    else:
        hidden = torch.bmm(tokens.view(groups, -1, in_features), masked_a.mT).view(-1, rank)
    return added(result, hidden, masked_b, runs)


class MaskedLinearVariant(MaskedVariant):
    """A linear layer's masked pass."""

    def forward(  # type: ignore[override]  # peft declares a static method and calls it on the instance
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """``result`` plus the scaled masked update; called by the layer in place of its own LoRA lines.

        Args:
            x: ``(rows, ..., in)``, in any dtype: the products are in autocast's, else in the adapter's.
            result: ``(rows, ..., out)``, the frozen layer's output.
        """
        self.masks.check_rows(x)
        weight_a = module.lora_A[active_adapter].get_parameter("weight")
        weight_b = module.lora_B[active_adapter].get_parameter("weight")
        masked_a, masked_b = masked_weights(
            weight_a, weight_b, self.masks, module.scaling[active_adapter], compute_dtype(weight_a)
        )
        tokens = x.numel() // x.shape[-1]
        x = module.lora_dropout[active_adapter](x)  # the identity, unless peft's own dropout is asked for, too
        return updated(result, x, masked_a, masked_b, self.masks.ragged_runs(tokens))


class MaskedLinear(MaskedLayer):
    """``Linear``, GPT-2's ``Conv1D``, ``Linear4bit`` and ``Linear8bitLt``: their A and B are linear layers alike."""

    layer: LoraLayer

    def attach(self, masks: LayerMasks) -> None:
        """Put the masked pass in place of peft's."""
        self.layer.lora_variant[self.adapter_name] = MaskedLinearVariant(masks)
        # peft would cast the input to A's float32 before autocast casts it back: two copies of the activations. Other
        # adapters on the layer need it.
        self._casts_input = self.layer.cast_input_dtype_enabled
        self.layer.cast_input_dtype_enabled = self._casts_input and len(self.layer.lora_A) > 1

    def detach(self) -> None:
        """peft's own lines run again."""
        if self.layer.lora_variant.pop(self.adapter_name, None) is not None:
            self.layer.cast_input_dtype_enabled = self._casts_input

    def member_weights(self, masks: LayerMasks) -> dict[str, torch.Tensor]:
        """A_hat and B_hat of the first group as a plain LoRA's weights, at unchanged alpha."""
        weight_a = self.layer.lora_A[self.adapter_name].get_parameter("weight").detach()
        weight_b = self.layer.lora_B[self.adapter_name].get_parameter("weight").detach()
        masked_a, masked_b = masked_weights(weight_a, weight_b, masks, 1.0, torch.float32)
        return {"lora_A": masked_a[0], "lora_B": masked_b[0]}
