"""Two runs on the same documents: tests of no difference, and intervals for the difference.

Legend: K draws at a time, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from eval.statistics.bootstrap import SEED, Statistic, draws_at_once
from eval.statistics.weighted import Values

FLIPS = 9_999
"""Monte Carlo draws of a sign-flip or swap test: p-values down to 1e-4."""
MOST_TO_ENUMERATE = 16
"""Clusters whose 2^16 sign patterns are all tried."""


@dataclass(frozen=True)
class PairedTest:
    """A two-sided test that the runs are exchangeable."""

    p_value: float
    units: int
    """Clusters (documents) whose signs are flipped: those on which the runs differ at all, for the others say nothing.
    Of a swap test all clusters."""
    patterns: int
    """Sign patterns tried."""
    exact: bool
    """All of them, or a sample."""


def mcnemar_midp(only_first: int, only_second: int) -> float:
    """Two-sided mid-p value of McNemar's test, for independent documents.

    Fagerland, Lydersen and Laake 2013 (BMC Med. Res. Methodol. 13:91), section "The McNemar mid-p test": the exact
    conditional p-value, which sees the discordant pairs as Binomial(n, 1/2), minus the probability of what was found.

    Args:
        only_first: documents that only the first run answers right; ``only_second``: likewise. 1 where the
            runs never disagree.

    Raises:
        ValueError: a negative count.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"counts cannot be negative; found {only_first} and {only_second}.")
    fewer, pairs = min(only_first, only_second), only_first + only_second
    exact = min(1.0, 2 * float(binom.cdf(fewer, pairs, 0.5)))
    if only_first == only_second:
        return 1 - float(binom.pmf(fewer, pairs, 0.5)) / 2 if pairs else 1.0
    return exact - float(binom.pmf(fewer, pairs, 0.5))


def _sign_patterns(units: int, flips: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """``(K, units)`` at a time: all patterns, the unchanged one first, or ``flips`` random ones."""
    at_once = draws_at_once(max(units, 1))
    if units <= MOST_TO_ENUMERATE:
        for start in range(0, 1 << units, at_once):
            numbers = np.arange(start, min(start + at_once, 1 << units))
            yield (numbers[:, None] >> np.arange(units)) & 1 == 1
        return
    generator = np.random.default_rng(seed)
    for start in range(0, flips, at_once):
        yield generator.random((min(at_once, flips - start), units)) < 0.5


def _test(values: Values, observed: float, units: int) -> PairedTest:
    """Two-sided p-value: how often a pattern gives a difference at least as large, up to rounding."""
    as_large = int(np.count_nonzero(np.abs(values) >= abs(observed) * (1 - 1e-9) - 1e-15))
    if units <= MOST_TO_ENUMERATE:
        return PairedTest(as_large / values.size, units, values.size, exact=True)
    return PairedTest((as_large + 1) / (values.size + 1), units, values.size, exact=False)


def sign_flip(differences: ArrayLike, clusters: ArrayLike, flips: int = FLIPS, seed: int = SEED) -> PairedTest:
    """Test of a mean difference whose documents may depend on each other within clusters.

    If the runs are exchangeable, the sum of differences of every cluster is as likely with the other sign. Exact for
    up to 16 clusters that differ, else (b + 1) / (m + 1) over m random patterns (Phipson and Smyth 2010).

    Args:
        differences: ``(D,)`` first run minus second: right answers, NLL, Brier ...
        clusters: ``(D,)`` labels.

    Raises:
        ValueError: a difference that is not finite.
    """
    found = np.asarray(differences, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"{int((~np.isfinite(found)).sum())} of {found.size} differences are not finite.")
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(cluster, found)
    sums = sums[np.abs(sums) > 1e-12 * np.bincount(cluster, np.abs(found))]
    values = [(1.0 - 2.0 * flipped) @ sums for flipped in _sign_patterns(sums.size, flips, seed)]
    return _test(np.concatenate(values), float(sums.sum()), sums.size)


def swap_test(statistic: Statistic, clusters: ArrayLike, flips: int = FLIPS, seed: int = SEED) -> PairedTest | None:
    """Test of the difference of any score: F1, Matthews, AUROC, perplexity. None where a run has no score.

    If the runs are exchangeable, the two answers to a cluster's documents may as well be swapped (Noreen 1989,
    Computer-Intensive Methods). Patterns in which a run has no score (one class only) count as large
    differences: that can only raise the p-value.

    Args:
        statistic: weights ``(K, 2 D)`` to values: of the first run's documents followed by the second run's, in the
            same order, as ``lambda w: f1(w, np.append(predicted_a, predicted_b), np.append(gold, gold))``.
        clusters: ``(D,)`` labels.
    """
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    units = int(cluster.max()) + 1

    def difference(swapped: NDArray[np.bool_]) -> Values:
        second = swapped[:, cluster].astype(np.float64)
        return statistic(np.hstack([1 - second, second])) - statistic(np.hstack([second, 1 - second]))

    observed = float(difference(np.zeros((1, units), dtype=np.bool_))[0])
    if np.isnan(observed):
        return None
    values = np.concatenate([difference(swapped) for swapped in _sign_patterns(units, flips, seed)])
    return _test(np.where(np.isnan(values), np.inf, values), observed, units)


def difference(first: Statistic, second: Statistic) -> Statistic:
    """First run's score minus the second's on the same draws: ``bootstrap.interval`` of it is the paired interval."""
    return lambda weights: first(weights) - second(weights)
