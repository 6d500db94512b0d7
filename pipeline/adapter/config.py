"""The peft adapter of a recipe: its configuration, and the modules it goes on."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig, LoraConfig
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError
from pipeline.lora_dropout import folded_alpha
from pipeline.recipe import schema

ADAPTER_NAME = "default"
"""peft's own, where none is given."""

_TARGETS: dict[str, tuple[type[nn.Module], ...]] = {
    "lora": (nn.Linear, Conv1D, nn.Embedding),
    "adalora": (nn.Linear, Conv1D),
}
"""Layers of a language model that peft adapts, by method."""


def lora_config(adapter: schema.Adapter) -> LoraConfig:
    """peft's configuration, with eq. 2's factor folded into alpha where ``rescale`` is false.

    AdaLoRA's schedule is not known before the trainer counts its steps: until then it is a placeholder, see
    :class:`pipeline.adapter.adalora.RankAllocation`.
    """
    dropout = adapter.dropout
    common: dict[str, Any] = {
        "lora_alpha": folded_alpha(adapter.alpha, dropout.rate, dropout.rescale),
        "target_modules": adapter.target_modules,
        "lora_dropout": adapter.input_dropout,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    if adapter.method == "adalora":
        return AdaLoraConfig(
            **common,
            target_r=adapter.rank,
            init_r=adapter.initial_rank,
            deltaT=adapter.adalora.interval,
            beta1=adapter.adalora.beta1,
            beta2=adapter.adalora.beta2,
            orth_reg_weight=adapter.adalora.orthogonality,
            total_step=1,
        )
    return LoraConfig(
        **common,
        r=adapter.rank,
        use_rslora=adapter.rank_stabilized,
        alpha_pattern=_alpha_pattern(adapter),
        target_parameters=adapter.target_parameters or None,
    )


def _alpha_pattern(adapter: schema.Adapter) -> dict[str, float]:
    """Folded alphas of the layers with a rate of their own; peft matches the same patterns in the same way."""
    dropout = adapter.dropout
    if dropout.rescale:
        return {}
    return {
        pattern: folded_alpha(adapter.alpha, rate, dropout.rescale) for pattern, rate in dropout.rate_pattern.items()
    }


def freeze_rank_numbers(model: nn.Module) -> None:
    """Keep AdaLoRA's ``ranknum``, by which each layer divides, the constant that it is.

    peft 0.21 makes it a trained parameter wherever it is moved to a GPU or cast to 16 bits (``ParameterDict`` wraps
    the copy anew), and does not save it: the adapter that is loaded would not be the one that was trained. Delete when
    tests/pipeline/test_adalora_training.py passes without it.
    """
    for module in model.modules():
        if isinstance(module, AdaLoraLayer):
            for number in module.ranknum.values():
                number.requires_grad_(False)


def check_target_modules(model: PreTrainedModel, adapter: schema.Adapter) -> None:
    """Every listed module and parameter must be there; peft complains only when none of them is.

    Raises:
        UserError: names those that match nothing, and the names there are.
    """
    if adapter.target_modules != "all-linear":
        head = model.get_output_embeddings()  # trl multiplies by its weight directly: an adapter would not be seen
        kinds = _TARGETS[adapter.method]
        modules = [name for name, module in model.named_modules() if isinstance(module, kinds) and module is not head]
        missing = _unmatched(adapter.target_modules, modules)
        if missing:
            raise UserError(
                f"adapter.target_modules: {', '.join(missing)} matches no linear layer"
                f"{' or embedding' if nn.Embedding in kinds else ''} of this model.\n"
                f"It has: {_last_words(modules, 1)}; or use target_modules: all-linear."
            )
    fused = _fused_parameters(model)
    missing = _unmatched(adapter.target_parameters, fused)
    if missing:
        has = f"It has: {_last_words(fused, 3)}." if fused else "It has none: leave target_parameters out."
        raise UserError(
            f"adapter.target_parameters: {', '.join(missing)} matches no weight of this model that is fused or holds "
            f"several experts.\n{has}"
        )


def _fused_parameters(model: PreTrainedModel) -> list[str]:
    """Weights of two dimensions, or of three with experts first, that belong to no layer that peft adapts."""
    return [
        f"{name}.{parameter_name}"
        for name, module in model.named_modules()
        if not isinstance(module, _TARGETS["lora"])
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3)
    ]


def _unmatched(targets: list[str], names: list[str]) -> list[str]:
    """Targets that are neither a name nor the end of one, from a dot on."""
    return [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]


def _last_words(names: list[str], words: int) -> str:
    """The different ends of dotted names."""
    return ", ".join(sorted({".".join(name.split(".")[-words:]) for name in names}))
