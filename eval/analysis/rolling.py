"""The analysis of the log-likelihood of given text: whole articles, or one continuation of each prompt.

Legend: D documents, N members.
"""

from __future__ import annotations

import math

import numpy as np

from eval.analysis.answers import Answers, RollingAnswers
from eval.analysis.common import OwnScores, own_scores, shared_notes, totals_of
from eval.analysis.estimates import Score, estimates, mean_of, point
from eval.analysis.samples import Floats
from eval.analysis.schema import CurvePoint, JensenGap, TaskAnalysis
from eval.statistics import weighted
from eval.statistics.weighted import Values

KNOWN = ("acc", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


def rolling_analysis(answers: RollingAnswers, own: OwnScores, draws: int) -> TaskAnalysis:
    """Perplexities over all words, bytes and tokens: sums over sums, so long articles count more.

    Args:
        answers: of a task.
        own: lm-eval's scores of it.
        draws: of the bootstrap.
    """
    scores = rolling_scores(answers, answers.loglikelihood)
    if answers.greedy is not None:
        scores = {"acc": mean_of(answers.greedy.astype(np.float64), True, percent=True), **scores}
    others, notes = own_scores(answers, own, KNOWN)
    metrics, told = estimates({**scores, **others}, answers.clusters, answers.strata, draws, "percentile")
    named = [name for name in ("acc", "bits_per_byte", *answers.scored) if name in metrics]
    return TaskAnalysis(
        kind="rolling" if answers.greedy is None else "other",
        **totals_of(answers),
        primary=named[0] if named else next(iter(metrics)),
        metrics=metrics,
        jensen=_jensen(answers),
        curve=rolling_curve(answers),
        notes=[*notes, *told, *shared_notes(answers)],
    )


def rolling_scores(answers: RollingAnswers, loglikelihoods: Floats) -> dict[str, Score]:
    """lm-eval's perplexities where the task has them, and the loss per document and token, from ``(D,)`` nats."""
    found = {}
    if answers.greedy is not None:
        found["nll"] = Score(weighted.mean, (-loglikelihoods,), False)
        if "perplexity" in answers.scored:
            found["perplexity"] = Score(_perplexity, (-loglikelihoods, np.ones(len(loglikelihoods))), False)
    if answers.tokens.all():
        found["nll_per_token"] = _per(loglikelihoods, answers.tokens.astype(np.float64))
    if answers.words is not None:
        found["word_perplexity"] = Score(_perplexity, (-loglikelihoods, answers.words), False)
    if answers.bytes is not None:
        if "byte_perplexity" in answers.scored:
            found["byte_perplexity"] = Score(_perplexity, (-loglikelihoods, answers.bytes), False)
        if "bits_per_byte" in answers.scored:
            found["bits_per_byte"] = _per(loglikelihoods, answers.bytes * math.log(2))
    return found


def rolling_curve(answers: RollingAnswers) -> list[CurvePoint]:
    """The same of the first 1..N members."""
    documents = len(answers.doc_ids)
    return [
        CurvePoint(
            members=members,
            scores={name: point(score, documents) for name, score in rolling_scores(answers, running).items()},
        )
        for members, running in enumerate(answers.running, start=1)
    ]


def plain_analysis(answers: Answers, own: OwnScores, draws: int) -> TaskAnalysis:
    """The means over documents that lm-eval scores: of a task of no kind known here."""
    scores, notes = own_scores(answers, own, [])
    metrics, told = estimates(scores, answers.clusters, answers.strata, draws)
    return TaskAnalysis(
        kind="other",
        **totals_of(answers),
        primary=next((name for name in answers.scored if name in metrics), ""),
        metrics=metrics,
        notes=[
            "This task is not scored by one right choice per document, so calibration is not judged.",
            *notes,
            *told,
            *shared_notes(answers),
        ],
    )


def _per(loglikelihoods: Floats, units: Floats) -> Score:
    return Score(weighted.ratio, (-loglikelihoods, units), False)


def _perplexity(weights: Values, losses: Floats, units: Floats) -> Values:
    found: Values = np.exp(weighted.ratio(weights, losses, units))
    return found


def _jensen(answers: RollingAnswers) -> JensenGap | None:
    if not answers.recorded or len(answers.members) == 1:
        return None
    gaps = answers.running[-1] - answers.members.mean(axis=0)
    return JensenGap(per_token=float(gaps.sum() / answers.tokens.sum()), least=answers.least_gap, choice_level=None)
