"""Brier scores and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eval.calibration.ece import Bools, Floats, Ints, bin_totals


@dataclass(frozen=True)
class Decomposition:
    """Brier score = reliability - resolution + uncertainty + within_bin, exactly."""

    reliability: float
    resolution: float
    uncertainty: float
    within_bin: float
    """Variance of confidence within bins, minus twice its covariance with correctness."""


def choice_brier(probabilities: Floats, gold: Ints) -> Floats:
    """``(D,)`` sum over choices of (probability - whether it is right)², between 0 and 2 (Brier 1950).

    Args:
        probabilities: ``(D, C)``, 0 for choices that a document has not.
        gold: ``(D,)`` the right choice.
    """
    right = np.take_along_axis(probabilities, gold[:, None], axis=1)[:, 0]
    return (probabilities**2).sum(axis=1) - 2 * right + 1


def decomposition(confidences: Floats, correct: Bools, bins: Ints) -> Decomposition:
    """Parts of the mean of (confidence - correct)², of the given answer.

    Murphy 1973 (J. Applied Meteorology 12, p. 595) with the terms that make it an identity for confidences that differ
    within a bin (Stephenson et al. 2008, Weather and Forecasting 23, p. 752).
    """
    totals = bin_totals(confidences, correct, bins)
    share = totals.counts / len(bins)
    base_rate = correct.mean()
    spread = confidences - totals.confidence[bins]
    return Decomposition(
        reliability=float((share * (totals.confidence - totals.accuracy) ** 2).sum()),
        resolution=float((share * (totals.accuracy - base_rate) ** 2).sum()),
        uncertainty=float(base_rate * (1 - base_rate)),
        within_bin=float((spread**2 - 2 * spread * (correct - totals.accuracy[bins])).mean()),
    )
