"""Members of the ensemble as plain adapters: a masked adapter is itself a LoRA, with masks and scales in its weights.

``A_hat = A diag(m_A)`` and ``B_hat = diag(m_B) B / (1-p)**2`` (equations 1-3 of arXiv 2404.09610) stand where A and B
were, at the adapter's own alpha. AdaLoRA's ``P Lambda Q`` becomes a plain LoRA: see :class:`MemberWriter`.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model_state_dict
from torch.nn import functional as F

from pipeline.adapter.files import WEIGHTS_FILE, AdapterSettings, adapter_dropout, without_false_warnings
from pipeline.lora_dropout.layer_masks import LayerMasks
from pipeline.run.tensor_file import write_tensors


class MemberWriter:
    """Writes members of one adapter, one after another.

    An AdaLoRA member has one rank r in every layer, the largest that the allocation left any, and alpha = r: Lambda and
    all factors are in A, and smaller layers end in rows of zeros, since servers want one rank.
    """

    def __init__(self, adapted: PeftModel, masks: AdapterSettings, balanced: int | None) -> None:
        """Nothing is written yet.

        Args:
            adapted: the adapter on its base; :func:`pipeline.base.hollow_base` is enough.
            masks: of the ensemble.
            balanced: N, where the members keep each feature about (1-p) N times between them.
        """
        self._dropout = adapter_dropout(adapted, masks)
        self._balanced = balanced
        paths = {module: path for path, module in adapted.named_modules()}
        self._paths = {name: paths[layer.layer] for name, layer in self._dropout.layers.items()}
        with without_false_warnings():
            self._weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        config = adapted.peft_config["default"]
        assert isinstance(config, LoraConfig)  # AdaLoRA's is one, too
        self._config = config

    @property
    def bytes(self) -> int:
        """Of one member's file, about."""
        return sum(4 * weight.numel() for weight in self._weights.values())

    def write(self, number: int, folder: Path) -> None:
        """Write a member into an existing folder, in peft's format and float32.

        Args:
            number: of the member, from 0.
            folder: must exist.
        """
        masks = self._dropout.layer_masks("ensemble", [(number,)], balanced=self._balanced)
        if isinstance(self._config, AdaLoraConfig):
            config, weights = self._from_adalora(masks)
        else:
            config, weights = copy.copy(self._config), self._from_lora(masks)
        config.inference_mode = True
        config.save_pretrained(str(folder))
        whole = {name: weight.cpu().contiguous().clone() for name, weight in weights.items()}  # no storage is shared
        write_tensors(folder / WEIGHTS_FILE, whole, {"format": "pt"})

    def _from_lora(self, masks: dict[str, LayerMasks]) -> dict[str, torch.Tensor]:
        """The adapter's tensors by their names in its file, A and B of each layer in their masked form."""
        weights = dict(self._weights)
        for name, layer in self._dropout.layers.items():
            for kind, masked in layer.member_weights(masks[name]).items():
                plain = f"{self._paths[name]}.{kind}"  # an embedding's A and B are parameters, the others' are modules
                key = plain if plain in weights else f"{plain}.weight"
                assert weights[key].shape == masked.shape, f"{key}: {weights[key].shape} became {masked.shape}"
                weights[key] = masked
        return weights

    def _from_adalora(self, masks: dict[str, LayerMasks]) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
        """Configuration and tensors of the plain LoRA that is equal to ``P_hat Lambda Q_hat``."""
        members = {name: layer.member_weights(masks[name]) for name, layer in self._dropout.layers.items()}
        used = {name: weights["lora_A"].flatten(1).abs().sum(1) > 0 for name, weights in members.items()}
        rank = max(1, *(int(rows.sum()) for rows in used.values()))
        weights = {}
        for name, rows in used.items():
            missing = rank - int(rows.sum())
            a, b = members[name]["lora_A"][rows], members[name]["lora_B"][:, rows]
            tail_a, tail_b = [0, 0] * (a.dim() - 1), [0, 0] * (b.dim() - 2)
            weights[f"{self._paths[name]}.lora_A.weight"] = F.pad(a, [*tail_a, 0, missing])
            weights[f"{self._paths[name]}.lora_B.weight"] = F.pad(b, [*tail_b, 0, missing])
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=self._config.target_modules,
            task_type=self._config.task_type,
            fan_in_fan_out=self._config.fan_in_fan_out,
            base_model_name_or_path=self._config.base_model_name_or_path,
            revision=self._config.revision,
        )
        return config, weights
