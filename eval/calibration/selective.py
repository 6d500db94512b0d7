"""Whether confidence ranks right answers above wrong ones, and what abstaining would buy."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score

from eval.calibration.ece import Bools, Floats

CURVE_POINTS = 100


def auroc(confidences: Floats, correct: Bools) -> float | None:
    """Probability that a right answer is surer than a wrong one, ties counting half; None where there is one class."""
    return float(roc_auc_score(correct, confidences)) if correct.any() and not correct.all() else None


def selective_risks(confidences: Floats, correct: Bools) -> Floats:
    """``(D,)`` share of wrong answers among the k surest, k = 1..D.

    Documents of equal confidence have no order: the value is the mean over all their orders.
    """
    order = np.argsort(-confidences, kind="stable")
    ordered, wrong = confidences[order], ~correct[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    sizes = np.diff(np.append(starts, len(ordered)))
    shares = np.add.reduceat(wrong.astype(np.float64), starts) / sizes
    return np.cumsum(np.repeat(shares, sizes)) / np.arange(1, len(ordered) + 1)


def aurc(confidences: Floats, correct: Bools) -> float:
    """Area under the risk-coverage curve: the mean of the selective risks (Geifman et al. 2019, arXiv 1805.08206)."""
    return float(selective_risks(confidences, correct).mean())


def risk_coverage(confidences: Floats, correct: Bools, points: int = CURVE_POINTS) -> list[tuple[float, float]]:
    """(coverage, risk), at most so many, evenly spaced in coverage; the last is the error rate of all documents."""
    risks = selective_risks(confidences, correct)
    count = len(risks)
    kept = np.unique(np.ceil(np.arange(1, points + 1) * count / points).astype(int))
    return [(int(k) / count, float(risks[k - 1])) for k in kept]
