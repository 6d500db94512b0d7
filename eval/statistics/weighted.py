"""Scores of weighted documents, many weightings at once.

A bootstrap draw is a weighting: document d counts ``weights[k, d]`` times. Every score here gives exactly what its
plain definition gives on the documents written out that many times.

Legend: K weightings (bootstrap draws), D documents. ``weights``: ``(K, D)`` float64, not negative. Every function
returns ``(K,)`` float64, with NaN in the rows where the score has no value (no document of a needed class): the
callers in ``bootstrap.py`` and ``paired.py`` count these rows and never pass them on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import digamma

Values = NDArray[np.float64]


def _quotient(numerator: Values, denominator: Values) -> Values:
    """NaN where the denominator is zero."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _truths(values: ArrayLike) -> Values:
    """0/1 as float64.

    Raises:
        ValueError: any other value: these scores know two classes only.
    """
    found = np.asarray(values)
    if not np.isin(found, (0, 1)).all():
        raise ValueError(f"two classes 0 and 1 expected; found {sorted(set(found.tolist()))[:5]}.")
    return found.astype(np.float64)


def mean(weights: Values, values: ArrayLike) -> Values:
    """Accuracy, NLL, Brier score ... from one value per document, ``(D,)``."""
    return _quotient(weights @ np.asarray(values, dtype=np.float64), weights.sum(axis=1))


def ratio(weights: Values, numerators: ArrayLike, denominators: ArrayLike) -> Values:
    """Sum over sum: log-likelihoods ``(D,)`` over bytes ``(D,)`` and the like; denominators are positive."""
    return _quotient(
        weights @ np.asarray(numerators, dtype=np.float64), weights @ np.asarray(denominators, dtype=np.float64)
    )


def overconfidence(weights: Values, confidences: ArrayLike, correct: ArrayLike) -> Values:
    """Mean confidence minus accuracy: positive for a model that is surer than it is right."""
    return mean(weights, np.asarray(confidences, dtype=np.float64) - _truths(correct))


def f1(weights: Values, predicted: ArrayLike, gold: ArrayLike) -> Values:
    """2 TP / (2 TP + FP + FN) of class 1. No value where class 1 is neither predicted nor true."""
    p, g = _truths(predicted), _truths(gold)
    return _quotient(2 * weights @ (p * g), weights @ (p + g))


def matthews(weights: Values, predicted: ArrayLike, gold: ArrayLike) -> Values:
    """Matthews correlation of two classes. No value where one class is never predicted or never true."""
    p, g = _truths(predicted), _truths(gold)
    n = weights.sum(axis=1)
    predicted_1, gold_1, both = weights @ p, weights @ g, weights @ (p * g)
    spread = predicted_1 * (n - predicted_1) * gold_1 * (n - gold_1)
    return _quotient(n * both - predicted_1 * gold_1, np.sqrt(spread))


def _ordered(keys: ArrayLike) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(order, starts): places of the documents by ascending key, and where each run of equal keys starts in it.

    Raises:
        ValueError: a key that is not a number, which has no place in an order.
    """
    found = np.asarray(keys, dtype=np.float64)
    if np.isnan(found).any():
        raise ValueError(f"{int(np.isnan(found).sum())} of {found.size} confidences are not a number.")
    order = np.argsort(found, kind="stable")
    ordered = found[order]
    return order, np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def _sums_of_ties(values: Values, starts: NDArray[np.intp]) -> Values:
    """``(K, T)`` sums over each run of equal keys."""
    return values if starts.size == values.shape[1] else np.add.reduceat(values, starts, axis=1)


def auroc(weights: Values, scores: ArrayLike, positive: ArrayLike) -> Values:
    """Probability that a positive document scores above a negative one, ties counted half (Mann-Whitney).

    Of confidences and right answers it is the AUROC of correctness. No value where all are positive or none is.
    """
    order, starts = _ordered(scores)
    label, drawn = _truths(positive)[order], weights[:, order]
    positives = _sums_of_ties(drawn * label, starts)
    negatives = _sums_of_ties(drawn * (1 - label), starts)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    return _quotient((positives * below).sum(axis=1), positives.sum(axis=1) * negatives.sum(axis=1))


def aurc(weights: Values, confidences: ArrayLike, correct: ArrayLike) -> Values:
    """Area under the risk-coverage curve: mean over k of the error among the k most confident documents.

    Geifman, Uziel and El-Yaniv 2019 (arXiv 1805.08206). Equally confident documents have no order, so the
    mean over all their orders counts. A tie of m documents with e errors, after N more confident ones with E errors,
    adds sum over j = 1..m of (E + j e / m) / (N + j) = e + (E - N e / m) (H(N + m) - H(N)), H the harmonic numbers;
    digamma continues them to weights that are not whole.
    """
    order, starts = _ordered(-np.asarray(confidences, dtype=np.float64))
    wrong, drawn = 1 - _truths(correct)[order], weights[:, order]
    tied = _sums_of_ties(drawn, starts)
    tied_errors = _sums_of_ties(drawn * wrong, starts)
    accepted, errors = np.cumsum(tied, axis=1), np.cumsum(tied_errors, axis=1)
    harmonic = np.diff(digamma(accepted + 1), axis=1, prepend=digamma(1.0))
    error_share = np.divide(tied_errors, tied, out=np.zeros_like(tied), where=tied > 0)
    areas = tied_errors + (errors - tied_errors - (accepted - tied) * error_share) * harmonic
    return _quotient(areas.sum(axis=1), accepted[:, -1])
