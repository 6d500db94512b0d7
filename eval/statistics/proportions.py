"""Intervals for shares of independent documents: right answers, and the difference of two runs on the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Bounds:
    """Ends of an interval; arrays where the counts were arrays."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]


def two_sided_z(confidence: float) -> float:
    """Standard normal quantile of a two-sided interval: 1.96 for 0.95."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def wilson(successes: ArrayLike, trials: ArrayLike, confidence: float = 0.95) -> Bounds:
    """Wilson's score interval without continuity correction (Wilson 1927, JASA 22, p. 209).

    Args:
        successes, trials: whole numbers of any shape; ``trials`` may be zero, which tells nothing: (0, 1).

    Raises:
        ValueError: more successes than trials, or negative counts.
    """
    k, n = np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    if np.any(k < 0) or np.any(k > n):
        raise ValueError(f"successes must lie between 0 and trials; found {successes!r} of {trials!r}.")
    z2 = two_sided_z(confidence) ** 2
    centre = (k + z2 / 2) / (n + z2)
    half = np.sqrt(z2) / (n + z2) * np.sqrt(k * (n - k) / np.maximum(n, 1) + z2 / 4)
    low = np.where(k == 0, 0.0, centre - half)  # exactly, as rounding would leave 1e-17 beyond the ends
    high = np.where(k == n, 1.0, centre + half)
    return Bounds(low, high)


def paired_difference(only_first: int, only_second: int, documents: int, confidence: float = 0.95) -> Bounds:
    """Interval for accuracy of the first run minus accuracy of the second, on the same independent documents.

    Wald's interval after adding one document to each kind of disagreement (Bonett and Price 2012, J. Educ. Behav.
    Stat. 37, p. 479). It has a width where the runs never disagree, as a bootstrap has not.

    Args:
        only_first: documents that only the first run answers right; ``only_second``: likewise.
        documents: all of them.

    Raises:
        ValueError: counts that are negative or more than all documents.
    """
    if min(only_first, only_second) < 0 or only_first + only_second > documents or documents < 1:
        raise ValueError(f"{only_first} + {only_second} disagreements do not fit in {documents} documents.")
    first, second = (only_first + 1) / (documents + 2), (only_second + 1) / (documents + 2)
    half = two_sided_z(confidence) * np.sqrt((first + second - (first - second) ** 2) / (documents + 2))
    return Bounds(np.maximum(first - second - half, -1.0), np.minimum(first - second + half, 1.0))
