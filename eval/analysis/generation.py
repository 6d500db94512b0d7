"""The analysis of generated text: exact match per filter, and confidence in the text.

Legend: D documents, N members.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eval.analysis.answers import GeneratedAnswers
from eval.analysis.common import MISTAKES, OwnScores, curve_of, end_of_prompt, own_scores, shared_notes, totals_of
from eval.analysis.estimates import Score, confidence_scores, estimates, plug_in_ece, reliability
from eval.analysis.samples import Bools, Floats
from eval.analysis.schema import Confidence, CurvePoint, Entropy, JensenGap, Mistake, TaskAnalysis

ANSWER_CHARACTERS = 500
"""Of a mistake's text: its end, where the answer is."""


def generation_analysis(answers: GeneratedAnswers, own: OwnScores, draws: int) -> TaskAnalysis:
    """Exact match (or the task's own scores) per filter; confidence where the run kept records.

    Args:
        answers: of a task.
        own: lm-eval's scores of it.
        draws: of the bootstrap and of calibrated models.
    """
    scores, notes = own_scores(answers, own, [])
    filters = list(answers.correct)
    primary = f"{answers.metric},{filters[0]}" if filters else next(iter(scores), "")
    metrics, unfound = estimates(scores, answers.clusters, answers.strata, draws)
    confidences = _confidences(answers, draws) if answers.tokens.any() else {}
    main = confidences.get(f"length_normalised,{filters[0]}") if filters else None
    correct = answers.correct[filters[0]] if filters else None
    return TaskAnalysis(
        kind="generation",
        **totals_of(answers),
        primary=primary,
        metrics={**metrics, **(main.metrics if main else {})},
        ece=main.ece if main else None,
        adaptive_ece=main.adaptive_ece if main else None,
        brier_parts=main.brier_parts if main else None,
        bins=main.bins if main else [],
        risk_coverage=main.risk_coverage if main else [],
        entropy=_entropy(answers),
        jensen=_jensen(answers),
        curve=generation_curve(answers, correct) if main and correct is not None else [],
        confidences=confidences,
        mistakes=_mistakes(answers, correct) if main and correct is not None else [],
        notes=[*notes, *unfound, *shared_notes(answers), *_notes(answers, correct)],
    )


def generation_curve(answers: GeneratedAnswers, correct: Bools) -> list[CurvePoint]:
    """Scores of the length-normalised confidence of the first 1..N members in the texts of all of them."""

    some = answers.tokens > 0

    def scores_of(confidences: Floats) -> tuple[Mapping[str, Score], float]:
        return confidence_scores(confidences[some], correct[some]), plug_in_ece(confidences[some], correct[some])

    lengths = np.maximum(answers.tokens, 1)
    confidences = [np.minimum(np.exp(running / lengths), 1.0) for running in answers.running[:-1]]
    points = [scores_of(each) for each in [*confidences, answers.confidence_length_normalised]]
    return curve_of(points, int(some.sum()))


def _confidences(answers: GeneratedAnswers, draws: int) -> dict[str, Confidence]:
    """Of the texts that have a token."""
    found = {}
    some = answers.tokens > 0
    clusters, strata = answers.clusters[some], answers.strata[some]
    for name, right in answers.correct.items():
        correct = right[some]
        ways = {
            "length_normalised": answers.confidence_length_normalised,
            "first_answer_token": answers.confidence_first_answer_token[name],
        }
        for way, of_documents in ways.items():
            confidences = of_documents[some]
            parts = reliability(confidences, correct, draws)
            metrics, _ = estimates(confidence_scores(confidences, correct), clusters, strata, draws)
            found[f"{way},{name}"] = Confidence(
                ece=parts.ece,
                adaptive_ece=parts.adaptive_ece,
                brier_parts=parts.brier_parts,
                bins=parts.bins,
                risk_coverage=parts.risk_coverage,
                metrics=metrics,
            )
    return found


def _entropy(answers: GeneratedAnswers) -> Entropy | None:
    """Mean over all tokens."""
    if not answers.recorded or not answers.tokens.any():
        return None
    some = answers.tokens > 0
    total = float(np.average(answers.total_entropy[some], weights=answers.tokens[some]))
    expected = float(np.average(answers.expected_entropy[some], weights=answers.tokens[some]))
    return Entropy(total=total, expected=expected, mutual_information=total - expected)


def _jensen(answers: GeneratedAnswers) -> JensenGap | None:
    if not answers.recorded or len(answers.members) == 1 or not answers.tokens.any():
        return None
    some = answers.tokens > 0
    gaps = (answers.running[-1] - answers.members.mean(axis=0))[some]
    return JensenGap(
        per_token=float(gaps.sum() / answers.tokens.sum()),
        least=float((gaps / answers.tokens[some]).min()),
        choice_level=None,
    )


def _mistakes(answers: GeneratedAnswers, correct: Bools) -> list[Mistake]:
    confidences = answers.confidence_length_normalised
    order = np.argsort(-confidences, kind="stable")  # nan, of empty texts, at the end
    wrong = order[~correct[order] & (answers.tokens[order] > 0)][:MISTAKES]
    return [
        Mistake(
            task=answers.task,
            doc_id=int(answers.doc_ids[place]),
            prompt=end_of_prompt(answers.prompts[place]),
            answer=answers.texts[place][-ANSWER_CHARACTERS:],
            target=answers.targets[place][-ANSWER_CHARACTERS:],
            confidence=float(confidences[place]),
        )
        for place in wrong
    ]


def _notes(answers: GeneratedAnswers, correct: Bools | None) -> list[str]:
    notes = []
    if not answers.recorded:
        notes.append("Confidence in texts is known in mode fast and of ensembles only.")
    elif len(answers.running) > 1:
        notes.append(
            "The curve keeps the texts of all members: with fewer members only the confidence in them changes."
        )
    empty = int((answers.tokens == 0).sum())
    if answers.recorded and empty:
        notes.append(f"{empty:,} texts are empty: they have no confidence, and calibration is judged without them.")
    if answers.recorded and correct is not None and (correct.all() or not correct.any()):
        notes.append(f"All texts are {'right' if correct.all() else 'wrong'}: confidence has nothing to rank.")
    return notes
