"""Bootstrap intervals over documents: clusters are resampled whole, within strata that stay as they are.

Documents that share a text are one cluster; the subjects of MMLU are strata, fixed by the benchmark. A draw is a
weighting of the documents (``weighted.py``), so all scores of a run, and both runs of a comparison, share the draws.

Legend: K draws at a time, D documents, C clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

from eval.statistics.weighted import Values

Statistic = Callable[[Values], Values]
"""Weights ``(K, D)`` to values ``(K,)``, NaN where the weighted documents give none."""
Method = Literal["percentile", "bca"]
"""`bca` for one run's scores, which are skewed; `percentile` for differences of two runs and for sums over articles,
whose tails are heavy on both sides or whose lengths differ much: there it covers better, by up to 1 point in 62 to 277
documents; with 1,000 they are alike (tests/eval/intervals/interval_coverage.py)."""
DRAWS = 2000
SEED = 20240415
LEAST_CLUSTERS = 5
"""Fewest independent units of an interval."""
STRATA_TO_RESAMPLE = 20
"""Fewest strata whose own resampling says something."""
MOST_UNDEFINED = 0.05
"""Largest share of draws without a value (of one class only) that an interval may leave out."""
MOST_LEFT_OUT = 1000
"""Clusters whose removal tells the skewness; with more of them the skewness hardly matters, and these are a sample."""
ENTRIES_AT_ONCE = 1 << 17
"""Weights in memory at a time: 1 MiB, which a processor's cache holds (twice as fast as 16 MiB)."""
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A score, and the interval where it has one."""

    value: float | None
    """On the documents as they are; None where they give none."""
    low: float | None
    high: float | None
    draws: int
    undefined: int
    """Draws without a value, left out."""
    words: str
    """How the interval was found, or why there is none."""


@dataclass(frozen=True)
class Sampling:
    """Which documents are drawn together, and from which pool."""

    cluster_of: NDArray[np.intp]
    """``(D,)`` number of the document's cluster; clusters are numbered stratum by stratum."""
    stratum_first: NDArray[np.intp]
    """``(C,)`` number of the first cluster in this cluster's stratum."""
    stratum_size: NDArray[np.intp]
    """``(C,)`` clusters in this cluster's stratum."""

    @property
    def clusters(self) -> int:
        """C."""
        return self.stratum_first.size

    @property
    def strata(self) -> int:
        """S."""
        return np.unique(self.stratum_first).size


def sampling(clusters: ArrayLike, strata: ArrayLike) -> Sampling:
    """The plan of a bootstrap.

    Args:
        clusters: ``(D,)`` equal labels are drawn together; all different where documents are independent.
        strata: ``(D,)`` labels; all equal where there is one pool.

    Raises:
        ValueError: no documents, different lengths, or a cluster in two strata.
    """
    cluster, stratum = np.asarray(clusters), np.asarray(strata)
    if cluster.ndim != 1 or cluster.shape != stratum.shape or cluster.size == 0:
        raise ValueError(f"one cluster and one stratum per document expected; found {cluster.shape}, {stratum.shape}.")
    _, stratum_code = np.unique(stratum, return_inverse=True)
    names, first, cluster_code = np.unique(cluster, return_index=True, return_inverse=True)
    stratum_of_cluster = stratum_code[first]
    torn = np.flatnonzero(stratum_of_cluster[cluster_code] != stratum_code)
    if torn.size:
        raise ValueError(f"cluster {cluster[torn[0]]!r} lies in two strata; clusters are resampled within a stratum.")
    by_stratum = np.argsort(stratum_of_cluster, kind="stable")
    number = np.empty(names.size, dtype=np.intp)
    number[by_stratum] = np.arange(names.size)
    ordered = stratum_of_cluster[by_stratum]
    sizes = np.bincount(ordered)
    return Sampling(number[cluster_code], (np.cumsum(sizes) - sizes)[ordered], sizes[ordered])


def draws_at_once(documents: int) -> int:
    """K: as many as ``ENTRIES_AT_ONCE`` allows."""
    return max(1, ENTRIES_AT_ONCE // documents)


def resamples(plan: Sampling, draws: int = DRAWS, seed: int = SEED) -> Iterator[Values]:
    """``(K, D)`` float64 at a time, ``draws`` rows in all: how often each document is drawn.

    Row k depends on ``seed`` and k alone, not on how many rows come at a time.
    """
    generator = np.random.default_rng(seed)
    at_once = draws_at_once(plan.cluster_of.size)
    for start in range(0, draws, at_once):
        rows = min(at_once, draws - start)
        chosen = plan.stratum_first + (generator.random((rows, plan.clusters)) * plan.stratum_size).astype(np.intp)
        chosen += np.arange(rows)[:, None] * plan.clusters
        counts = np.bincount(chosen.ravel(), minlength=rows * plan.clusters).reshape(rows, plan.clusters)
        yield counts[:, plan.cluster_of].astype(np.float64)


def left_out(plan: Sampling) -> NDArray[np.intp]:
    """Numbers of the clusters that the jackknife leaves out in turn: at most 1,000, evenly spaced over the strata.

    Clusters that are alone in their stratum have no replacement and stay.
    """
    replaceable = np.flatnonzero(plan.stratum_size > 1)
    step = max(1.0, replaceable.size / MOST_LEFT_OUT)
    return replaceable[np.arange(0, replaceable.size, step).astype(np.intp)]


def leave_one_out(plan: Sampling) -> Iterator[Values]:
    """``(K, D)`` float64 at a time, one row per cluster of ``left_out``: its stratum is weighted up instead."""
    numbers = left_out(plan)
    at_once = draws_at_once(plan.cluster_of.size)
    for start in range(0, numbers.size, at_once):
        number = numbers[start : start + at_once, None]
        same_stratum = plan.stratum_first[number] == plan.stratum_first[plan.cluster_of]
        size = plan.stratum_size[number]
        yield np.where(same_stratum, size / (size - 1), 1.0) * (plan.cluster_of != number)


def acceleration(plan: Sampling, jackknife: Values) -> float:
    """Skewness of the score, from the jackknife (Davison and Hinkley 1997, Bootstrap Methods, section 5.3).

    Args:
        jackknife: the score in the rows of ``leave_one_out``. Rows without a value count as the mean of their stratum.
    """
    numbers = left_out(plan)
    size, stratum = plan.stratum_size[numbers], plan.stratum_first[numbers]
    known = ~np.isnan(jackknife)
    totals = np.bincount(stratum, np.where(known, jackknife, 0.0))
    means = totals / np.maximum(np.bincount(stratum, known), 1)
    influence = np.where(known, (size - 1) * (means[stratum] - jackknife), 0.0) / size
    every = np.count_nonzero(plan.stratum_size > 1) / max(numbers.size, 1)  # clusters that one row stands for
    squares = every * (influence**2).sum()
    return float(every * (influence**3).sum() / (6 * squares**1.5)) if squares > 0 else 0.0


def expanded_z(plan: Sampling, confidence: float) -> float:
    """Normal quantile of the interval's ends, wider for few clusters (Hesterberg 2014, arXiv 1411.5279).

    Draws of C clusters vary by the share (C - 1) / C of what they should, and know their own variance with C - 1
    degrees of freedom; in S strata the two are (C - S) / C and C - S.
    """
    freedom = plan.clusters - plan.strata
    return float(student_t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(plan.clusters / freedom)


def bca_levels(values: Values, value: float, skewness: float, z: float) -> tuple[float, float]:
    """Quantiles of the draws that bound the interval (Efron 1987, JASA 82, p. 171); draws at the value count half."""
    near = np.isclose(values, value, rtol=1e-12, atol=1e-14)
    share = float((np.count_nonzero((values < value) & ~near) + np.count_nonzero(near) / 2) / values.size)
    bias = _NORMAL.inv_cdf(min(max(share, 0.5 / values.size), 1 - 0.5 / values.size))

    def level(end: float) -> float:
        return _NORMAL.cdf(bias + (bias + end) / (1 - skewness * (bias + end)))

    return level(-z), level(z)


def bounds(
    values: Values, value: float, jackknife: Values, plan: Sampling, method: Method, confidence: float
) -> tuple[float, float]:
    """Ends of the interval, from draws ``(draws,)`` that all have a value, of at least ``LEAST_CLUSTERS``."""
    z = expanded_z(plan, confidence)
    levels = (_NORMAL.cdf(-z), _NORMAL.cdf(z))
    if method == "bca":
        levels = bca_levels(values, value, acceleration(plan, jackknife), z)
    low, high = np.quantile(values, levels)
    return float(low), float(high)


def _no_interval(value: float, values: Values, plan: Sampling) -> str:
    """Why there is none; empty where there is one."""
    undefined = int(np.isnan(values).sum())
    if np.isnan(value):
        return "not defined on these documents"
    if plan.clusters - plan.strata + 1 < LEAST_CLUSTERS:
        return f"no interval: fewer than {LEAST_CLUSTERS} documents or clusters that could be others"
    if undefined > MOST_UNDEFINED * values.size:
        return f"no interval: not defined in {undefined:,} of {values.size:,} bootstrap draws"
    found = values[~np.isnan(values)]
    if np.allclose(found, found[0], rtol=1e-12, atol=1e-14):
        return f"no interval: the same in all {values.size:,} bootstrap draws"
    return ""


def interval_of(
    value: float, values: Values, jackknife: Values, plan: Sampling, method: Method, confidence: float = 0.95
) -> Interval:
    """The interval of one score, or why there is none.

    Args:
        value: on the documents as they are; NaN where it is not defined.
        values: ``(draws,)`` in the rows of ``resamples``.
        jackknife: in the rows of ``leave_one_out``; not read by ``percentile``.
    """
    undefined = int(np.isnan(values).sum())
    reason = _no_interval(value, values, plan)
    if reason:
        return Interval(None if np.isnan(value) else value, None, None, values.size, undefined, reason)
    low, high = bounds(values[~np.isnan(values)], value, jackknife, plan, method, confidence)
    unit = (" of clusters" if plan.clusters < plan.cluster_of.size else "") + (" within strata" * (plan.strata > 1))
    return Interval(value, low, high, values.size, undefined, f"bootstrap{unit}, {values.size:,} draws")


def intervals(
    statistics: Mapping[str, Statistic],
    clusters: ArrayLike,
    strata: ArrayLike,
    draws: int = DRAWS,
    seed: int = SEED,
    method: Method = "bca",
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """The interval of every score, all from the same draws.

    Args:
        statistics: by name.
        clusters, strata: ``(D,)`` labels, as in ``sampling``.

    Raises:
        ValueError: as ``sampling``.
    """
    plan = sampling(clusters, strata)
    whole = np.ones((1, plan.cluster_of.size))
    values = values_of(statistics, resamples(plan, draws, seed))
    jackknife = values_of(statistics, leave_one_out(plan) if method == "bca" else iter(()))
    return {
        name: interval_of(float(statistic(whole)[0]), values[name], jackknife[name], plan, method, confidence)
        for name, statistic in statistics.items()
    }


def values_of(statistics: Mapping[str, Statistic], weightings: Iterator[Values]) -> dict[str, Values]:
    """``(rows,)`` of every score, over all weightings."""
    found: dict[str, list[Values]] = {name: [np.empty(0)] for name in statistics}
    for weights in weightings:
        for name, statistic in statistics.items():
            found[name].append(statistic(weights))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def interval(
    statistic: Statistic,
    clusters: ArrayLike,
    strata: ArrayLike,
    draws: int = DRAWS,
    seed: int = SEED,
    method: Method = "bca",
    confidence: float = 0.95,
) -> Interval:
    """``intervals`` of one score."""
    return intervals({"": statistic}, clusters, strata, draws, seed, method, confidence)[""]


def intervals_over_strata(
    statistics: Mapping[str, Statistic], strata: ArrayLike, draws: int = DRAWS, seed: int = SEED
) -> dict[str, Interval]:
    """A sensitivity, not the interval: as if the subjects too were drawn from a population of subjects.

    Whole strata are resampled, with all their documents.

    Raises:
        ValueError: fewer than 20 strata, or as ``sampling``.
    """
    labels = np.asarray(strata)
    count = np.unique(labels).size
    if count < STRATA_TO_RESAMPLE:
        raise ValueError(f"resampling strata needs at least {STRATA_TO_RESAMPLE} of them; found {count}.")
    found = intervals(statistics, labels, np.zeros(labels.size), draws, seed)
    return {
        name: Interval(e.value, e.low, e.high, e.draws, e.undefined, e.words.replace("of clusters", "of whole strata"))
        for name, e in found.items()
    }
