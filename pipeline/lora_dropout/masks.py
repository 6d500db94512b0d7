"""Masks as a pure function of their coordinates.

Source: Lin et al., *LoRA Dropout as a Sparsity Regularizer for Overfitting Control*, arXiv 2404.09610,
equations 1-3: ``m_A ~ Bern(1-p)^in``, ``m_B ~ Bern(1-p)^out``, ``A_hat = A diag(m_A)``, ``B_hat = diag(m_B) B``.

A mask bit is a hash of (seed, purpose, coordinates, side, module name, feature index). Nothing is drawn from a
global random stream, so recomputation under activation checkpointing, a resumed run, another number of ranks or
another device sees the same bits. The arithmetic is on integers only, hence equal on CPU and CUDA. Masks are kept as
bits and unpacked where a layer needs them.

Shapes: G groups of rows (one mask each); F features, of one side of one layer or of all sides of all layers in a row,
each side's padded to a multiple of 8, so that a side is a whole number of bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from operator import index
from typing import Literal

import torch

Side = Literal["A", "B"]
Coordinate = tuple[int, ...]

_MOST_WORDS = 2**24
"""Words hashed at once, 128 MiB for each intermediate: a 7B model has 1.3 million words per group."""

_HALF_RANGE = 2**31


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


def _mix(words: torch.Tensor) -> torch.Tensor:
    """The splitmix64 finaliser, a bijection of 64-bit words, in place: a step hashes millions of them."""
    for bits, multiplier in ((30, _MULTIPLIER_1), (27, _MULTIPLIER_2), (31, 1)):
        shifted = words >> bits
        shifted &= (1 << (64 - bits)) - 1  # torch's own shift of int64 is arithmetic
        words ^= shifted
        words *= multiplier
    return words


def padded(features: int) -> int:
    """Features of one side, rounded up to whole bytes of bits."""
    return -(-features // 8) * 8


def feature_words(module: str, side: Side, features: int, device: torch.device) -> torch.Tensor:
    """Words of one side of one module: ``(padded(features) / 2,)`` int64. Each decides over two neighbours."""
    pairs = torch.arange(padded(features) // 2, dtype=torch.int64, device=device)
    return _mix(pairs * _GOLDEN + hashed_word(module, side))


def _decisions(words: torch.Tensor, keys: Sequence[int]) -> torch.Tensor:
    """One uniform number for each of K keys and each feature: ``(K, F)`` int32, from ``(F/2,)`` int64.

    A word's two halves are independent, so that one hash serves two features.
    """
    key_words = torch.tensor(keys, dtype=torch.int64, device=words.device)[:, None]
    return _mix(words[None, :] ^ key_words).view(torch.int32)


def coordinate_key(seed: int, purpose: str, coordinate: Coordinate) -> int:
    """The word that stands for one mask, whatever kind of integers (numpy's, a tensor's) the coordinate is given in."""
    return hashed_word(int(index(seed)), purpose, tuple(int(index(number)) for number in coordinate))


def check_coordinates(coordinates: Sequence[Coordinate]) -> None:
    """Refuse coordinates that are not a sequence of tuples, with ``TypeError``; or empty, with ``ValueError``."""
    if not isinstance(coordinates, Sequence):
        raise TypeError(f"coordinates are a list of tuples, e.g. [(step, row)], found {coordinates!r}")
    if not coordinates:
        raise ValueError("no coordinates: give one for each mask")
    for coordinate in coordinates:
        if not isinstance(coordinate, tuple):
            raise TypeError(f"coordinates are tuples, e.g. (step, row), found {coordinate!r}")


def threshold(rate: float) -> int:
    """Largest int32 that means *kept*: of 2**32 equally likely numbers, (1-p) 2**32 are at most that; at least 1 is."""
    return max(round((1.0 - rate) * 2**32), 1) - 1 - _HALF_RANGE


def kept(
    words: torch.Tensor,
    seed: int,
    purpose: str,
    coordinates: Sequence[Coordinate],
    thresholds: torch.Tensor | int,
    balanced: int | None = None,
) -> torch.Tensor:
    """Which features are kept, for each of the G coordinates.

    Args:
        words: ``(F/2,)`` int64 from :func:`feature_words`.
        seed: the recipe's seed.
        purpose: what the masks are for, e.g. ``"train"`` or ``"ensemble"``; separates their streams.
        coordinates: G tuples of integers.
        thresholds: from :func:`threshold`, one for all or ``(F,)`` int32.
        balanced: N, to balance each feature over N masks whose coordinates differ in their last number, 0 to N-1:
            see :func:`_balanced`. Masks of such a set may be asked for one at a time.

    Returns:
        ``(G, F)`` bool, True with probability 1-p (to 2**-32).

    Raises:
        TypeError: a coordinate that is no tuple of integers.
        ValueError: no coordinates; balanced over no masks, or a coordinate's last number is not below N.
    """
    check_coordinates(coordinates)
    if balanced is not None:
        if balanced < 1:
            raise ValueError(f"balanced: at least 1, the number of masks, found {balanced}")
        each = torch.as_tensor(thresholds, dtype=torch.int32, device=words.device).expand(2 * len(words))
        size = max(1, _MOST_WORDS // balanced)
        pieces = zip(words.split(size), each.split(2 * size), strict=True)
        return torch.cat([_balanced(*piece, seed, purpose, coordinates, balanced) for piece in pieces], dim=1)
    keys = [coordinate_key(seed, purpose, coordinate) for coordinate in coordinates]
    groups = max(1, _MOST_WORDS // max(1, len(words)))
    parts = [_decisions(words, keys[at : at + groups]) <= thresholds for at in range(0, len(keys), groups)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _balanced(
    words: torch.Tensor,
    thresholds: torch.Tensor,
    seed: int,
    purpose: str,
    coordinates: Sequence[Coordinate],
    instances: int,
) -> torch.Tensor:
    """Every feature kept in K = floor((1-p) N + u) of N masks, u uniform, in K random ones of them: ``(G, F)`` bool.

    Each mask by itself is exactly Bernoulli(1-p), since the mean of K is (1-p) N; features, sides and modules are
    independent. N = 1 gives the bits of plain masks.
    """
    if any(not 0 <= coordinate[-1] < instances for coordinate in coordinates):
        raise ValueError(f"balanced over {instances} masks: their last coordinates are 0 to {instances - 1}")
    below = thresholds.long() + 1 + _HALF_RANGE  # (F,): (1-p) 2**32
    whole, fraction = (below * instances) >> 32, (below * instances) & 0xFFFFFFFF
    result = torch.empty(len(coordinates), 2 * len(words), dtype=torch.bool, device=words.device)
    for prefix in dict.fromkeys(coordinate[:-1] for coordinate in coordinates):
        uniform = _decisions(words, [coordinate_key(seed, purpose, (*prefix, 0))])[0].long() + _HALF_RANGE
        count = whole + (uniform < fraction)  # (F,): K
        slots = [coordinate_key(seed, f"{purpose}, slots of {instances}", (*prefix, n)) for n in range(instances)]
        places = _decisions(words, slots).argsort(dim=0, stable=True).argsort(dim=0)  # (N, F): a random permutation
        chosen = places < count
        for group, coordinate in enumerate(coordinates):
            if coordinate[:-1] == prefix:
                result[group] = chosen[coordinate[-1]]
    return result


def packed(bits: torch.Tensor) -> torch.Tensor:
    """``(..., F)`` bool as ``(..., F/8)`` uint8, F a multiple of 8; feature 8k+i is bit i of byte k."""
    eight = bits.contiguous().view(torch.int64)  # a bool is a byte of 0 or 1: eight of them in a word
    gathered = (eight * 0x0102040810204080) >> 56  # the product's top byte collects the eight lowest bits
    return gathered.to(torch.uint8)


_BITS_OF_BYTES = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).bool().view(torch.int64).flatten()
"""Each byte's eight bits as eight bools in a word."""


def unpacked(packed_bits: torch.Tensor, features: int) -> torch.Tensor:
    """``(..., features)`` bool from ``(..., padded(features)/8)`` uint8."""
    if packed_bits.device.type == "cpu":  # a look-up, 2 to 6 times faster: every layer does it twice in each pass
        words = _BITS_OF_BYTES.index_select(0, packed_bits.flatten().int())
        return words.view(torch.bool).view(*packed_bits.shape[:-1], -1)[..., :features]
    places = torch.arange(8, dtype=torch.uint8, device=packed_bits.device)
    return ((packed_bits[..., None] >> places) & 1).flatten(-2)[..., :features].bool()


def picked(packed_bits: torch.Tensor, groups: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The bits of single features: ``(T,)`` bool from ``(G, F/8)`` uint8 and ``(T,)`` integers of each."""
    return ((packed_bits[groups, features >> 3] >> (features & 7)) & 1).bool()
