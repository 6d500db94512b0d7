"""Claims about methods, from training seeds; the ensemble's own noise, from mask seeds.

Seeds are few and are never bootstrapped: Student's t over paired differences, and a chi-squared interval for a
standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2, ttest_1samp

from pipeline.errors import UserError

TRAINING_SEEDS = 5
MASK_SEEDS = 3


@dataclass(frozen=True)
class SeedDifference:
    """First method minus second, over training seeds."""

    seeds: int
    mean: float
    low: float
    """Of the 95 % Student t interval."""
    high: float
    p_value: float
    """Two-sided, of no difference."""


@dataclass(frozen=True)
class SeedNoise:
    """How much one number moves when only the masks are drawn anew."""

    seeds: int
    mean: float
    deviation: float
    """Sample standard deviation (n - 1)."""
    deviation_low: float
    """Of its 95 % chi-squared interval."""
    deviation_high: float


def _numbers(values: ArrayLike, least: int, what: str) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or found.size < least:
        raise UserError(f"{what} need at least {least} seeds; found {found.size}. Run more seeds.")
    if not np.isfinite(found).all():
        raise UserError(f"{what} need finite scores; found {found.tolist()}.")
    return found


def paired_seeds(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> SeedDifference:
    """Difference of two methods trained with the same seeds: Student's t over the seeds' differences.

    Args:
        first, second: ``(S,)`` scores of the two methods; entry s of both was trained with the same seed.

    Raises:
        UserError: fewer than 5 seeds, scores that are not finite or not paired, or differences that are all equal:
            seeds that change nothing are no sample.
    """
    a = _numbers(first, TRAINING_SEEDS, "Claims about methods")
    b = _numbers(second, TRAINING_SEEDS, "Claims about methods")
    if a.size != b.size:
        raise UserError(f"Seeds are compared in pairs; found {a.size} scores of one method and {b.size} of the other.")
    differences = a - b
    if np.ptp(differences) <= 1e-12 * max(1.0, float(np.abs(differences).max())):
        raise UserError(
            f"All {a.size} seeds differ by the same {differences[0]:.6g}: Student's t needs differences that vary. "
            "Check that the runs were trained with different seeds."
        )
    test = ttest_1samp(differences, 0.0)
    ends = test.confidence_interval(confidence)
    return SeedDifference(a.size, float(differences.mean()), float(ends.low), float(ends.high), float(test.pvalue))


def mask_noise(scores: ArrayLike, confidence: float = 0.95) -> SeedNoise:
    """The ensemble's own noise: the same adapter and documents, several mask seeds.

    Args:
        scores: ``(S,)`` one score per mask seed.

    Raises:
        UserError: fewer than 3 seeds, or scores that are not finite.
    """
    found = _numbers(scores, MASK_SEEDS, "The noise of an ensemble")
    freedom = found.size - 1
    tail = (1 - confidence) / 2
    deviation = float(found.std(ddof=1))
    low, high = (deviation * np.sqrt(freedom / chi2.ppf(q, freedom)) for q in (1 - tail, tail))
    return SeedNoise(found.size, float(found.mean()), deviation, float(low), float(high))
