"""LoRA on a parameter (``target_parameters``): the fused weights of a mixture of experts, above all.

peft adds the update to the weight itself and refuses ``lora_dropout``, which needs the layer's input. LoRA Dropout
masks the weights of the adapter, so it is possible; the weight being one tensor, all rows of a batch share one mask.
Every expert is a layer of its own, with its own m_A and m_B.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from peft.tuners.lora.layer import ParamWrapper

from pipeline.lora_dropout.layer_masks import LayerMasks, refuse_merging
from pipeline.lora_dropout.swapped import SwappedLayer

# Legend: E experts, r rank.


def expert_masks(layer: ParamWrapper, masks: LayerMasks) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the one group: ``(E, in)`` and ``(E, out)`` bool."""
    return masks.kept_in[0].view(layer.num_experts, -1), masks.kept_out[0].view(layer.num_experts, -1)


class MaskedParamWrapper(ParamWrapper):
    """Class of the layer while masks are active."""

    masks: dict[str, LayerMasks]

    def merge(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused."""
        refuse_merging(next(iter(self.masks.values())).layer)

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Stock factors ``(E, ., r)`` and ``(E, r, .)``, masked; peft's way for one adapter on several experts."""
        left, right, scaling = super().get_delta_factors(adapter_name)
        if adapter_name not in self.masks:
            return left, right, scaling
        kept_in, kept_out = expert_masks(self, self.masks[adapter_name])
        # stored as (E, out, in), where peft swapped them, else as (E, in, out)
        first, last = (kept_out, kept_in) if self._did_swap_in_out_features else (kept_in, kept_out)
        return left * first[:, :, None], right * last[:, None, :], scaling * self.masks[adapter_name].scale

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stock update of the weight, masked: ``diag(m_B) B A diag(m_A)``; peft's way in all other cases."""
        delta = super().get_delta_weight(adapter_name, *args, **kwargs)
        if adapter_name not in self.masks:
            return delta
        kept_in, kept_out = expert_masks(self, self.masks[adapter_name])
        if self.num_experts == 1:  # (out, in) from peft, whatever the parameter's shape
            kept = kept_out[0, :, None] * kept_in[0]
        elif self._did_swap_in_out_features:
            kept = kept_out[:, :, None] * kept_in[:, None, :]
        else:
            kept = kept_in[:, :, None] * kept_out[:, None, :]
        return delta * self.masks[adapter_name].scale * kept


class MaskedExperts(SwappedLayer):
    """``ParamWrapper``, around one parameter of two dimensions, or of three (experts first)."""

    one_group = "its weight is one tensor for all rows of a batch"
    layer: ParamWrapper
    classes: ClassVar[dict[type, type]] = {ParamWrapper: MaskedParamWrapper}

    def features(self) -> tuple[int, int]:
        """Of all experts together, one expert after another."""
        features_in, features_out = super().features()
        return self.layer.num_experts * features_in, self.layer.num_experts * features_out

    def member_weights(self, masks: LayerMasks) -> dict[str, torch.Tensor]:
        """A_hat ``(E r, in)``, expert by expert, and B_hat ``(out, r E)``, experts fastest, as peft keeps them."""
        weight_a = self.layer.lora_A[self.adapter_name].get_parameter("weight").detach().float()
        weight_b = self.layer.lora_B[self.adapter_name].get_parameter("weight").detach().float()
        kept_in, kept_out = expert_masks(self.layer, masks)
        by_expert_a = weight_a.view(len(kept_in), -1, weight_a.shape[1]) * kept_in[:, None, :]
        by_expert_b = weight_b.view(weight_b.shape[0], -1, len(kept_out)) * kept_out.T[:, None, :]
        return {
            "lora_A": by_expert_a.reshape(weight_a.shape),
            "lora_B": by_expert_b.reshape(weight_b.shape) * masks.scale,
        }
