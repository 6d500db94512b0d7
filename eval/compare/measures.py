"""Every score of one run on one task, and its values document by document: what tests and intervals need.

Legend: D documents.
"""

from __future__ import annotations

import numpy as np

from eval.analysis.answers import Answers, ChoiceAnswers, GeneratedAnswers, RollingAnswers
from eval.analysis.choice import choice_scores
from eval.analysis.common import OwnScores, own_scores
from eval.analysis.estimates import Score, confidence_scores, mean_of, point
from eval.analysis.rolling import rolling_scores
from eval.analysis.samples import Floats
from eval.calibration.temperature import cross_fitted, fold_numbers
from eval.statistics import weighted
from eval.statistics.bootstrap import Statistic


def scores_of(answers: Answers) -> dict[str, Score]:
    """By the keys of ``TaskAnalysis.metrics``, from the same functions; calibration errors are none of them."""
    found, _ = own_scores(answers, OwnScores({}, {}), [])
    if isinstance(answers, ChoiceAnswers):
        fitted = cross_fitted(answers.loglikelihoods, answers.gold, fold_numbers(answers.cluster_keys))
        return found | choice_scores(answers, answers.loglikelihoods, fitted)
    if isinstance(answers, GeneratedAnswers) and answers.correct and answers.tokens.all():
        return found | confidence_scores(answers.confidence_length_normalised, next(iter(answers.correct.values())))
    if isinstance(answers, RollingAnswers):
        continued = {} if answers.greedy is None else {"acc": mean_of(answers.greedy.astype(np.float64), True)}
        return found | continued | rolling_scores(answers, answers.loglikelihood)
    return found


def value_of(score: Score) -> float | None:
    """On the documents as they are; None where they give none."""
    found = point(score, len(score.columns[0]))
    return None if np.isnan(found) else found


def document_values(score: Score) -> Floats | None:
    """``(D,)`` of which the score is the mean; None for other scores."""
    return score.columns[0] if score.score is weighted.mean else None


def side_by_side(first: Score, second: Score) -> Statistic:
    """The same score of the first run's documents followed by the second's, for ``swap_test``."""
    columns = [np.append(mine, theirs) for mine, theirs in zip(first.columns, second.columns, strict=True)]
    return lambda weights: first.score(weights, *columns)
