"""What abstaining from the least sure answers would buy; AURC and AUROC themselves are in eval.statistics.weighted."""

from __future__ import annotations

import numpy as np

from eval.calibration.ece import Bools, Floats

CURVE_POINTS = 100


def selective_risks(confidences: Floats, correct: Bools) -> Floats:
    """``(D,)`` share of wrong answers among the k surest, k = 1..D; their mean is the AURC (arXiv 1805.08206).

    Documents of equal confidence have no order: the value is the mean over all their orders.
    """
    order = np.argsort(-confidences, kind="stable")
    ordered, wrong = confidences[order], ~correct[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    sizes = np.diff(np.append(starts, len(ordered)))
    shares = np.add.reduceat(wrong.astype(np.float64), starts) / sizes
    return np.cumsum(np.repeat(shares, sizes)) / np.arange(1, len(ordered) + 1)


def risk_coverage(confidences: Floats, correct: Bools, points: int = CURVE_POINTS) -> list[tuple[float, float]]:
    """(coverage, risk), at most so many, evenly spaced in coverage; the last is the error rate of all documents."""
    risks = selective_risks(confidences, correct)
    count = len(risks)
    kept = np.unique(np.ceil(np.arange(1, points + 1) * count / points).astype(int))
    return [(int(k) / count, float(risks[k - 1])) for k in kept]
