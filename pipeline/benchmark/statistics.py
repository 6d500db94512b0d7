"""Medians, their spread, and ratios to the reference within rounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
"""Bootstrap resamples of an interval."""
ENOUGH = 6
"""Rounds from which there is a 95 % interval: even from the least to the most of 5 ratios, the median of the
distribution that they come from is missed with probability 2 x 2^-5 = 6 %."""


@dataclass(frozen=True)
class Timing:
    """One phase of one variant."""

    seconds: list[float]
    """One per round."""
    median: float
    quartiles: tuple[float, float]
    """Of the seconds."""
    ratio: float
    """Median over rounds of the seconds divided by the reference's in the same round."""
    ratio_interval: tuple[float, float]
    """As :func:`interval_name` says, over rounds."""


def interval_name(rounds: int) -> str:
    """What a ratio's interval is: a bootstrap's; with few rounds, the least and the most of them."""
    return "95 % interval" if rounds >= ENOUGH else "range"


def timing(seconds: list[float], reference: list[float], seed: int) -> Timing:
    """Summary of one phase of one variant.

    Args:
        seconds: one per round.
        reference: of the reference, in the same rounds.
        seed: of the bootstrap.
    """
    ratios = np.array(seconds) / np.array(reference)
    low, high = _interval(ratios, seed)
    first, third = np.quantile(seconds, [0.25, 0.75])
    return Timing(
        seconds=seconds,
        median=float(np.median(seconds)),
        quartiles=(float(first), float(third)),
        ratio=float(np.median(ratios)),
        ratio_interval=(float(low), float(high)),
    )


def _interval(ratios: np.ndarray, seed: int) -> np.ndarray:
    """Least and most of few, else a 95 % bootstrap interval of the median: ``(2,)``."""
    if len(ratios) < ENOUGH:
        return np.array([ratios.min(), ratios.max()])
    draws = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    return np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
