"""Scores with their intervals, and what every notion of confidence is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.analysis.samples import Bools, Floats, Ints
from eval.analysis.schema import Bin, BrierParts, CalibrationError, Estimate
from eval.calibration import brier, ece, selective
from eval.statistics import weighted
from eval.statistics.bootstrap import SEED, STRATA_TO_RESAMPLE, Interval, Method, intervals, intervals_over_strata
from eval.statistics.proportions import wilson
from eval.statistics.weighted import Values


@dataclass(frozen=True)
class Score:
    """A score of documents, each counting as often as its weight says.

    Its columns are kept apart, so that a comparison can put two runs' side by side.
    """

    score: Callable[..., Values]
    """From weights ``(K, D)`` and the columns to ``(K,)``."""
    columns: tuple[npt.NDArray[Any], ...]
    """``(D,)`` each."""
    higher_is_better: bool | None
    percent: bool = False
    right: Bools | None = None
    """``(D,)`` where the score is the share of right answers: independent ones get Wilson's interval."""

    def statistic(self, weights: Values) -> Values:
        """``(K,)`` from ``(K, D)``; nan in rows whose documents give no score."""
        return self.score(weights, *self.columns)


def mean_of(values: Floats, higher_is_better: bool | None, percent: bool = False) -> Score:
    """Mean over documents of ``(D,)``; a share where all values are 0 or 1."""
    share = bool(np.isin(values, (0, 1)).all())
    right = values == 1 if share else None
    return Score(weighted.mean, (values,), higher_is_better, percent or share, right)


def point(score: Score, documents: int) -> float:
    """The score of the documents as they are; nan where they give none."""
    return float(score.statistic(np.ones((1, documents)))[0])


def independent(clusters: Ints, strata: Ints) -> bool:
    """Whether no two documents share a text, and all are of one subject."""
    return len(np.unique(clusters)) == len(clusters) and len(np.unique(strata)) == 1


def estimates(
    scores: Mapping[str, Score], clusters: Ints, strata: Ints, draws: int, method: Method = "bca"
) -> tuple[dict[str, Estimate], list[str]]:
    """Every score with its 95 % interval, and notes on those that have no value or no interval.

    Shares of independent documents have Wilson's interval, all else the bootstrap's: subjects stay as they are,
    documents that share a text are drawn together.
    """
    alone = independent(clusters, strata)
    drawn = {name: score for name, score in scores.items() if score.right is None or not alone}
    found = intervals({name: score.statistic for name, score in drawn.items()}, clusters, strata, draws, method=method)
    told: dict[str, Estimate] = {}
    notes = []
    for name, score in scores.items():
        if name in drawn:
            interval = found[name]
            if interval.value is None:
                notes.append(f"{name} is left out: {interval.words}.")
                continue
            if interval.low is None:
                notes.append(f"{name}: {interval.words}.")
            told[name] = _estimate(interval, score)
        elif score.right is not None:
            ends = wilson(np.count_nonzero(score.right), len(score.right))
            told[name] = Estimate(
                value=float(score.right.mean()),
                low=float(ends.low),
                high=float(ends.high),
                interval="Wilson",
                higher_is_better=score.higher_is_better,
                percent=score.percent,
            )
    return told, notes


def sensitivities(scores: Mapping[str, Score], strata: Ints, draws: int) -> dict[str, Estimate]:
    """The intervals if the subjects themselves were a sample; empty for fewer than 20 subjects."""
    if len(np.unique(strata)) < STRATA_TO_RESAMPLE:
        return {}
    found = intervals_over_strata({name: score.statistic for name, score in scores.items()}, strata, draws)
    return {name: _estimate(found[name], score) for name, score in scores.items() if found[name].value is not None}


def _estimate(interval: Interval, score: Score) -> Estimate:
    return Estimate(
        value=float("nan") if interval.value is None else interval.value,
        low=interval.low,
        high=interval.high,
        interval="" if interval.low is None else interval.words,
        higher_is_better=score.higher_is_better,
        percent=score.percent,
    )


def confidence_scores(confidences: Floats, correct: Bools) -> dict[str, Score]:
    """What confidence in the given answers ``(D,)`` is worth, against whether they are right ``(D,)``."""
    return {
        "brier_of_answer": Score(weighted.mean, ((confidences - correct) ** 2,), False),
        "auroc": Score(weighted.auroc, (confidences, correct), True),
        "aurc": Score(weighted.aurc, (confidences, correct), False),
        "overconfidence": Score(weighted.overconfidence, (confidences, correct), None, percent=True),
    }


@dataclass(frozen=True)
class Reliability:
    """The parts of an analysis that have no interval; the names are the schema's."""

    ece: CalibrationError
    adaptive_ece: CalibrationError
    brier_parts: BrierParts
    bins: list[Bin]
    risk_coverage: list[tuple[float, float]]


def reliability(confidences: Floats, correct: Bools, draws: int) -> Reliability:
    """Calibration of the confidence in the given answers ``(D,)``."""
    binnings = [ece.equal_width_bins(confidences), ece.equal_count_bins(confidences)]
    simulated = ece.simulated_errors(confidences, binnings, draws, SEED)
    errors = [_error(confidences, correct, bins, drawn) for bins, drawn in zip(binnings, simulated, strict=True)]
    parts = brier.decomposition(confidences, correct, binnings[0])
    return Reliability(
        ece=errors[0],
        adaptive_ece=errors[1],
        brier_parts=BrierParts(
            reliability=parts.reliability,
            resolution=parts.resolution,
            uncertainty=parts.uncertainty,
            within_bin=parts.within_bin,
        ),
        bins=reliability_bins(confidences, correct),
        risk_coverage=selective.risk_coverage(confidences, correct),
    )


def plug_in_ece(confidences: Floats, correct: Bools) -> float:
    """Of 15 equal-width bins."""
    return ece.plug_in_error(confidences, correct, ece.equal_width_bins(confidences))


def reliability_bins(confidences: Floats, correct: Bools) -> list[Bin]:
    """The bars of the diagram, each with Wilson's interval; empty bins are left out."""
    bins, edges = ece.equal_width_bins(confidences), ece.bin_edges()
    totals = ece.bin_totals(confidences, correct, bins)
    rights = np.rint(totals.accuracy * totals.counts)
    ends = wilson(rights, totals.counts)
    return [
        Bin(
            low=float(edges[k]),
            high=float(edges[k + 1]),
            count=int(totals.counts[k]),
            confidence=float(totals.confidence[k]),
            accuracy=float(totals.accuracy[k]),
            accuracy_low=float(ends.low[k]),
            accuracy_high=float(ends.high[k]),
        )
        for k in np.flatnonzero(totals.counts)
    ]


def _error(confidences: Floats, correct: Bools, bins: np.ndarray, simulated: Floats) -> CalibrationError:
    value = ece.plug_in_error(confidences, correct, bins)
    found = ece.consistency(value, simulated)
    return CalibrationError(
        value=value,
        debiased_squared=ece.debiased_squared_error(confidences, correct, bins),
        band_low=found.low,
        band_high=found.high,
        p_value=found.p_value,
    )
