"""Expected calibration error: plug-in, debiased, and what a perfectly calibrated model would show.

Legend: D documents, B bins. ``confidences``: ``(D,)`` in [0, 1]; ``correct``: ``(D,)`` bool; ``bins``: ``(D,)`` each
document's bin, 0..B-1, as :func:`equal_width_bins` and :func:`equal_count_bins` give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

BINS = 15
"""As in Guo et al. 2017 (arXiv 1706.04599)."""
CELLS_PER_CHUNK = 4_000_000
"""Simulated answers held at once: 16 MB of random numbers."""


@dataclass(frozen=True)
class Consistency:
    """Against a perfectly calibrated model with the same confidences."""

    low: float
    """2.5 % quantile of its plug-in error."""
    high: float
    """97.5 % quantile."""
    p_value: float


@dataclass(frozen=True)
class BinTotals:
    """Arrays ``(B,)``; bins without documents have zeros."""

    counts: Floats
    confidence: Floats
    """Mean."""
    accuracy: Floats


def bin_edges(bins: int = BINS) -> Floats:
    """``(B+1,)`` the quotients k/B, each rounded once, so that a confidence of exactly 1/3 lies on 5/15."""
    return np.arange(bins + 1) / bins


def equal_width_bins(confidences: Floats, bins: int = BINS) -> Ints:
    """The bin ``(k/B, (k+1)/B]`` of each document, 0 counting to the first: a confidence on an edge belongs below it.

    So Guo et al. 2017, section 2. torchmetrics 1.9 has ``[k/B, (k+1)/B)`` and a bin of its own for exactly 1: equal
    but for confidences on an edge.
    """
    _check(confidences)
    return np.maximum(np.searchsorted(bin_edges(bins), confidences, side="left") - 1, 0)


def equal_count_bins(confidences: Floats, bins: int = BINS) -> Ints:
    """Bins of equally many documents, in order of confidence (adaptive ECE, Nixon et al. 2019, arXiv 1904.01685).

    Documents of equal confidence share a bin, so the order of documents does not matter; bins may then differ in size,
    or be empty.
    """
    _check(confidences)
    middle = rankdata(confidences, method="average") - 0.5
    return np.minimum((middle * bins / len(confidences)).astype(np.int64), bins - 1)


def bin_totals(confidences: Floats, correct: Bools, bins: Ints) -> BinTotals:
    """Counts and means of the bins, as many as the highest number needs."""
    counts = np.bincount(bins).astype(np.float64)
    at_least_one = np.maximum(counts, 1)
    return BinTotals(
        counts,
        np.bincount(bins, weights=confidences) / at_least_one,
        np.bincount(bins, weights=correct.astype(np.float64)) / at_least_one,
    )


def plug_in_error(confidences: Floats, correct: Bools, bins: Ints) -> float:
    """Sum over bins of (share of documents) times abs(mean confidence - accuracy); biased upwards (Guo et al. 2017)."""
    return float(np.abs(np.bincount(bins, weights=confidences - correct)).sum() / len(bins))


def debiased_squared_error(confidences: Floats, correct: Bools, bins: Ints) -> float:
    """Sum over bins of (share) times (mean confidence - accuracy)², without its bias; it may be negative.

    Kumar et al. 2019 (arXiv 1909.10155) subtract the variance of a bin's accuracy, ``a(1-a)/(n-1)``. Here it
    is the variance of a bin's mean of ``confidence - correct``: the same where a bin's confidences are equal, and zero
    in expectation for every calibrated model where they are not. A bin of one document gives 0, as theirs.
    """
    residuals = confidences - correct
    counts = np.bincount(bins).astype(np.float64)
    means = np.bincount(bins, weights=residuals) / np.maximum(counts, 1)
    squares = np.bincount(bins, weights=(residuals - means[bins]) ** 2)
    several = counts > 1
    variances = squares[several] / (counts[several] - 1) / counts[several]
    return float((counts[several] * (means[several] ** 2 - variances)).sum() / len(bins))


def simulated_errors(confidences: Floats, binnings: Sequence[Ints], draws: int, seed: int) -> Floats:
    """Plug-in errors of a perfectly calibrated model: every answer right with the probability it is given.

    Consistency resampling (Bröcker and Smith 2007, Weather and Forecasting 22, p. 651) without redrawing confidences.

    Returns:
        ``(len(binnings), draws)``; the same simulated answers serve all binnings.
    """
    generator = np.random.default_rng(seed)
    sizes = [int(bins.max()) + 1 for bins in binnings]
    members = np.concatenate(
        [np.eye(size, dtype=np.float32)[bins] for bins, size in zip(binnings, sizes, strict=True)], axis=1
    )
    expected = np.concatenate([np.bincount(bins, weights=confidences) for bins in binnings])
    ends = np.cumsum(sizes)[:-1]
    chunk = max(1, CELLS_PER_CHUNK // len(confidences))
    single = confidences.astype(np.float32)
    errors = []
    for start in range(0, draws, chunk):
        uniform = generator.random((min(chunk, draws - start), len(confidences)), dtype=np.float32)
        right = (uniform < single).astype(np.float32) @ members  # counts below 2**24: exact
        errors.append([part.sum(axis=1) for part in np.split(np.abs(expected - right), ends, axis=1)])
    return np.concatenate(errors, axis=1) / len(confidences)


def consistency(error: float, simulated: Floats) -> Consistency:
    """Where a plug-in error lies among simulated ones ``(draws,)``; the p-value counts the error itself as a draw."""
    low, high = np.quantile(simulated, [0.025, 0.975])
    as_large = np.count_nonzero(simulated >= error - 1e-12)  # the same answers, summed in another order
    return Consistency(float(low), float(high), (1 + as_large) / (1 + len(simulated)))


def _check(confidences: Floats) -> None:
    if not (len(confidences) and np.isfinite(confidences).all() and confidences.min() >= 0 and confidences.max() <= 1):
        raise ValueError("confidences must be numbers between 0 and 1, and at least one")
