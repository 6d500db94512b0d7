"""Why a layer cannot have LoRA Dropout, by the name of its class: the classes exist only where their package does."""

from __future__ import annotations

_OWN_PASS = (
    "peft's pass for it has no place for another update; load the base unquantised, or in 4 or 8 bits by bitsandbytes"
)
_UNTESTED = "it has not been tried; load the base unquantised, or in 4 or 8 bits by bitsandbytes"

LAYERS = {
    "MultiheadAttention": "peft merges the adapter into its weights for the pass; target the linear layers of an "
    "attention that has them, or leave it out of target_modules",
    "AqlmLoraLinear": _OWN_PASS,
    "AwqLoraLinear": _OWN_PASS,
    "EetqLoraLinear": _OWN_PASS,
    "HqqLoraLinear": _UNTESTED,
    "GPTQLoraLinear": _UNTESTED,
    "IncLoraLinear": _UNTESTED,
    "SVDQuantLinear": _OWN_PASS,
    "TeLinear": "peft's pass for it has no place for another update; leave it out of target_modules",
    "TorchaoLoraLinear": _UNTESTED,
    "LoraParallelLinear": "its features are spread over tensor-parallel ranks, its masks would be, too; use data "
    "parallelism or ZeRO-3",
}
"""Of peft's layer types without masks; what to do, too."""

VARIANTS = {
    "ALoraLinearVariant": "it switches the adapter on within a sequence; set alora_invocation_tokens to None",
    "ArrowLinearVariant": "it chooses among adapters for each token; set arrow_config to None",
    "BdLoraLinearVariant": "its A or B is block-diagonal and no plain matrix; set use_bdlora to None",
    "KasaLinearVariant": "it has a third matrix between A and B; set kasa_config to None",
    "MontecloraLinearVariant": "it draws weights of its own; set monteclora_config to None",
    "QALoraLinearVariant": "its A sees pooled inputs and not features; set use_qalora to False",
    "VeloraLinearVariant": "its backward pass compresses the input of A; set velora_config to None",
    **dict.fromkeys(
        ("DoraLinearVariant", "DoraEmbeddingVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant"),
        "DoRA divides by the norm of W0 + BA, which would differ under every mask; set use_dora to False",
    ),
    **dict.fromkeys(
        ("MiCALinearVariant", "MiCAEmbeddingVariant"),
        "it takes the place where the masks go; set init_lora_weights to another start",
    ),
}
"""Of peft's LoRA variants."""
