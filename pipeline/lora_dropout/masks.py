"""Masks as a pure function of their coordinates.

Source: Lin et al., *LoRA Dropout as a Sparsity Regularizer for Overfitting Control*, arXiv 2404.09610,
equations 1-3: ``m_A ~ Bern(1-p)^in``, ``m_B ~ Bern(1-p)^out``, ``A_hat = A diag(m_A)``, ``B_hat = diag(m_B) B``.

A mask bit is a hash of (seed, purpose, coordinates, side, module name, feature index). Nothing is drawn from a
global random stream, so recomputation under activation checkpointing, a resumed run, another number of ranks or
another device sees the same bits. The arithmetic is on 64-bit integers only, hence equal on CPU and CUDA.

Shapes: G groups of rows (one mask each), F = sum over modules of (in + out) features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch

Side = Literal["A", "B"]

_LOW_32_BITS = 0xFFFFFFFF

_MOST_WORDS = 2**24
"""Words hashed at once, 128 MiB for each intermediate: a 7B model has 2.5 million features per group."""


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word: torch multiplies and adds int64 modulo 2**64."""
    return word - (1 << 64) if word >= (1 << 63) else word


# The multipliers of the splitmix64 finaliser (Steele, Lea & Flood, "Fast splittable pseudorandom number
# generators", OOPSLA 2014) and its increment, the golden ratio.
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)
_GOLDEN = _signed(0x9E3779B97F4A7C15)


def hashed_word(*parts: object) -> int:
    """64-bit word from a tuple of strings and integers, equal on every machine (BLAKE2b, not Python's ``hash``)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest, "little"))


def _shifted_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's own shift of int64 is arithmetic."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def mixed(words: torch.Tensor) -> torch.Tensor:
    """The splitmix64 finaliser, a bijection of 64-bit words. int64 in, int64 out, any shape."""
    words = (words ^ _shifted_right(words, 30)) * _MULTIPLIER_1
    words = (words ^ _shifted_right(words, 27)) * _MULTIPLIER_2
    return words ^ _shifted_right(words, 31)


def feature_words(module: str, side: Side, features: int, device: torch.device) -> torch.Tensor:
    """One word for each feature of one side of one module: ``(features,)`` int64."""
    index = torch.arange(features, dtype=torch.int64, device=device)
    return mixed(index * _GOLDEN + hashed_word(module, side))


def coordinate_words(seed: int, purpose: str, coordinates: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Two independent words for each of the G coordinates."""
    first = [hashed_word(seed, purpose, tuple(c), 0) for c in coordinates]
    second = [hashed_word(seed, purpose, tuple(c), 1) for c in coordinates]
    return first, second


def kept(
    words: torch.Tensor, seed: int, purpose: str, coordinates: Sequence[tuple[int, ...]], rate: float
) -> torch.Tensor:
    """Which features are kept, for each of the G coordinates.

    Args:
        words: ``(F,)`` int64 from :func:`feature_words`.
        seed: the recipe's seed.
        purpose: what the masks are for, e.g. ``"train"`` or ``"ensemble"``; separates their streams.
        coordinates: G tuples of integers.
        rate: p, the probability of dropping, in [0, 1).

    Returns:
        ``(G, F)`` bool, True with probability 1-p (to 2**-32).
    """
    first, second = coordinate_words(seed, purpose, coordinates)
    first_words = torch.tensor(first, dtype=torch.int64, device=words.device)[:, None]
    second_words = torch.tensor(second, dtype=torch.int64, device=words.device)[:, None]
    threshold = round((1.0 - rate) * 2**32)
    groups = max(1, _MOST_WORDS // len(words))
    parts = [
        (mixed(mixed(words[None, :] ^ one) + other) >> 32) & _LOW_32_BITS < threshold
        for one, other in zip(first_words.split(groups), second_words.split(groups), strict=True)
    ]
    return torch.cat(parts)
