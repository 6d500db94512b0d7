"""The masked pass of a LoRA embedding, as a peft ``LoraVariant``.

The paper has linear layers only. Ours: an embedding is a linear layer of one-hot inputs, so its input features are the
vocabulary entries and ``A_hat = A diag(m_A)`` drops the update of whole entries; ``B_hat = diag(m_B) B`` drops output
features. A group's mask is looked up at the tokens' ids: nothing of the size of the vocabulary is made per group.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import Embedding

from pipeline.lora_dropout.layer_masks import LayerMasks, MaskedLayer, MaskedVariant
from pipeline.lora_dropout.linear import added, compute_dtype, masked_rows


class MaskedEmbeddingVariant(MaskedVariant):
    """An embedding's masked pass."""

    def forward(  # type: ignore[override]  # peft declares a static method and calls it on the instance
        self, module: Embedding, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """``result`` plus the scaled masked update.

        Args:
            x: ``(rows, T)`` ids, or ``(tokens,)``.
            result: ``(rows, T, out)``, the frozen embedding, times its ``embed_scale`` where the model has one.
        """
        entries = module._embed(x, module.lora_embedding_A[active_adapter].T)  # (rows, T, r)
        self.masks.check_rows(entries)
        dtype = compute_dtype(entries)
        hidden = entries.reshape(-1, entries.shape[-1]).to(dtype) * self.masks.kept_in_at(x)[:, None]
        embed_scale = module._get_embed_scale()  # as stock does, but on r features and not on all
        if embed_scale is not None:
            hidden = hidden * embed_scale.to(dtype)
        weight_b = module.lora_embedding_B[active_adapter]
        masked_b = masked_rows(weight_b, self.masks, module.scaling[active_adapter], dtype)
        return added(result, hidden, masked_b, self.masks.ragged_runs(x.numel()))


class MaskedEmbedding(MaskedLayer):
    """``nn.Embedding``. Position embeddings, which all rows share, only under one mask: see ``check_rows``."""

    layer: Embedding

    def device(self) -> torch.device:
        """Of A."""
        return self.layer.lora_embedding_A[self.adapter_name].device

    def attach(self, masks: LayerMasks) -> None:
        """Put the masked pass in place of peft's."""
        self.layer.lora_variant[self.adapter_name] = MaskedEmbeddingVariant(masks)

    def detach(self) -> None:
        """peft's own lines run again."""
        self.layer.lora_variant.pop(self.adapter_name, None)

    def member_weights(self, masks: LayerMasks) -> dict[str, torch.Tensor]:
        """A_hat and B_hat of the first group."""
        weight_a = self.layer.lora_embedding_A[self.adapter_name].detach().float()
        weight_b = self.layer.lora_embedding_B[self.adapter_name].detach()
        masked_b = masked_rows(weight_b, masks, 1.0, torch.float32)
        return {"lora_embedding_A": weight_a * masks.kept_in[0], "lora_embedding_B": masked_b[0]}
