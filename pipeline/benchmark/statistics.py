"""Medians, their spread, and ratios to the reference within rounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
"""Bootstrap resamples of an interval."""


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
    """95 % bootstrap interval of the ratio, over rounds."""


def timing(seconds: list[float], reference: list[float], seed: int) -> Timing:
    """Summary of one phase of one variant.

    Args:
        seconds: one per round.
        reference: of the reference, in the same rounds.
        seed: of the bootstrap.
    """
    ratios = np.array(seconds) / np.array(reference)
    draws = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    first, third = np.quantile(seconds, [0.25, 0.75])
    return Timing(
        seconds=seconds,
        median=float(np.median(seconds)),
        quartiles=(float(first), float(third)),
        ratio=float(np.median(ratios)),
        ratio_interval=(float(low), float(high)),
    )
