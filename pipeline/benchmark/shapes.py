"""Known model shapes: a configuration is all that is needed to time a base of that size."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import LlamaConfig

from pipeline.errors import UserError


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool = False
) -> Mapping[str, int | bool]:
    return MappingProxyType(
        {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
        }
    )


SHAPES: Mapping[str, Mapping[str, int | bool]] = MappingProxyType(
    {
        "tiny": _llama(64, 176, 2, 4, 4, 512),
        # the vocabulary is small, so that the output head, which no mask touches, does not dilute the ratios
        "width-512": _llama(512, 1408, 8, 8, 8, 2048),
        "width-1024": _llama(1024, 2816, 8, 16, 16, 2048),
        "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000),
        "llama3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, tied=True),
        "llama2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
        "llama3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
        "llama2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
        "llama2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    }
)
"""LLaMA configurations by name, as their authors published them; ``tiny`` and ``width-*`` are ours."""


def shape_config(name: str, layers: int | None = None) -> LlamaConfig:
    """The configuration of a known shape.

    Args:
        name: a key of ``SHAPES``.
        layers: decoder layers, to cut the depth; None keeps them all.

    Raises:
        UserError: unknown name; more layers than the shape has.
    """
    if name not in SHAPES:
        raise UserError(f"--shape: found {name!r}, expected one of {', '.join(SHAPES)}")
    shape = SHAPES[name]
    if layers is not None and layers > shape["num_hidden_layers"]:
        raise UserError(f"--layers: found {layers}, and {name} has {shape['num_hidden_layers']} layers: give fewer")
    depth = {} if layers is None else {"num_hidden_layers": layers}
    sizes: dict[str, Any] = {**shape, **depth}
    return LlamaConfig(**sizes, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2)
