"""The analysis of multiple choice: one task, or several as strata.

Legend: D documents, C choices, N members.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.special import softmax

from eval.analysis.answers import ChoiceAnswers
from eval.analysis.common import MISTAKES, OwnScores, curve_of, end_of_prompt, own_scores, shared_notes, totals_of
from eval.analysis.estimates import (
    Score,
    confidence_scores,
    estimates,
    mean_of,
    plug_in_ece,
    reliability,
    sensitivities,
)
from eval.analysis.samples import Floats, Ints
from eval.analysis.schema import CurvePoint, Entropy, Estimate, JensenGap, Mistake, TaskAnalysis, Temperature
from eval.calibration.brier import choice_brier
from eval.calibration.entropy import choice_entropies
from eval.calibration.temperature import CrossFitted, choice_nll, cross_fitted, fold_numbers
from eval.statistics import weighted

OURS = ("acc", "f1", "mcc")
"""lm-eval's metrics that are computed here from the answers, not taken from its samples."""
SENSITIVE = ("acc", "nll")
"""Scores whose interval is also told with subjects as a sample."""


def choice_analysis(answers: ChoiceAnswers, own: OwnScores, draws: int) -> TaskAnalysis:
    """Accuracy, NLL and Brier score of the right choice, calibration of the given answer, curves, mistakes.

    Args:
        answers: of a task or a group.
        own: lm-eval's scores of it.
        draws: of the bootstrap and of calibrated models.
    """
    folds = fold_numbers(answers.cluster_keys)
    fitted = cross_fitted(answers.loglikelihoods, answers.gold, folds)
    probabilities = softmax(answers.loglikelihoods, axis=1)
    confidences = probabilities.max(axis=1)
    scores = choice_scores(answers, answers.loglikelihoods, fitted)
    others, notes = own_scores(answers, own, [*OURS, "brier_score", "likelihood"])
    metrics, told = estimates({**scores, **others}, answers.clusters, answers.strata, draws)
    found = reliability(confidences, answers.correct, draws)
    entropies = choice_entropies(answers.members)
    return TaskAnalysis(
        kind="choice",
        **totals_of(answers),
        primary=_primary(answers, metrics),
        metrics=metrics,
        ece=found.ece,
        adaptive_ece=found.adaptive_ece,
        brier_parts=found.brier_parts,
        temperature=None if fitted is None else Temperature(folds=fitted.temperatures.tolist()),
        entropy=Entropy(
            total=float(entropies.total.mean()),
            expected=float(entropies.expected.mean()),
            mutual_information=float(entropies.mutual_information.mean()),
        ),
        jensen=_jensen(answers),
        bins=found.bins,
        risk_coverage=found.risk_coverage,
        curve=choice_curve(answers, folds),
        sampled_subjects=sensitivities({name: scores[name] for name in SENSITIVE}, answers.strata, draws),
        mistakes=_mistakes(answers, confidences),
        notes=[*notes, *told, *shared_notes(answers), *_notes(answers, metrics, own, fitted)],
    )


def choice_scores(answers: ChoiceAnswers, loglikelihoods: Floats, fitted: CrossFitted | None) -> dict[str, Score]:
    """The scores of answers by these log-likelihoods ``(D, C)``: of the run, or of its first n members."""
    probabilities = softmax(loglikelihoods, axis=1)
    picked = loglikelihoods.argmax(axis=1)
    correct = picked == answers.gold
    return {
        "acc": mean_of(correct.astype(np.float64), True, percent=True),
        **_two_class_scores(answers, picked),
        "nll": Score(weighted.mean, (choice_nll(loglikelihoods, answers.gold),), False),
        **({"calibrated_nll": Score(weighted.mean, (fitted.nll,), False)} if fitted else {}),
        "brier": Score(weighted.mean, (choice_brier(probabilities, answers.gold),), False),
        **confidence_scores(probabilities.max(axis=1), correct),
    }


def choice_curve(answers: ChoiceAnswers, folds: Ints) -> list[CurvePoint]:
    """The scores under the average of the first 1..N members; each n has its own temperatures."""

    def scores_of(loglikelihoods: Floats) -> tuple[dict[str, Score], float]:
        scores = choice_scores(answers, loglikelihoods, cross_fitted(loglikelihoods, answers.gold, folds))
        correct = loglikelihoods.argmax(axis=1) == answers.gold
        return scores, plug_in_ece(softmax(loglikelihoods, axis=1).max(axis=1), correct)

    return curve_of([scores_of(loglikelihoods) for loglikelihoods in answers.running], len(answers.gold))


def _two_class_scores(answers: ChoiceAnswers, picked: Ints) -> dict[str, Score]:
    """F1 and Matthews correlation of choice 1 against choice 0, where lm-eval scores the task by them."""
    if answers.loglikelihoods.shape[1] != 2 or len(np.unique(answers.strata)) > 1:
        return {}
    found = {
        "f1": Score(weighted.f1, (picked, answers.gold), True, percent=True),
        "mcc": Score(weighted.matthews, (picked, answers.gold), True),
    }
    return {name: score for name, score in found.items() if name in answers.scored}


def _primary(answers: ChoiceAnswers, metrics: Mapping[str, Estimate]) -> str:
    """Accuracy where lm-eval scores it (the exact tests are of accuracies), else the first that it does."""
    named = [name for name in answers.scored if name in metrics]
    return "acc" if "acc" in named or not named else named[0]


def _jensen(answers: ChoiceAnswers) -> JensenGap | None:
    """None for one model, and where no record tells the tokens."""
    if not answers.recorded or len(answers.members) == 1:
        return None
    each = np.mean([choice_nll(member, answers.gold) for member in answers.members], axis=0)
    gap = each - choice_nll(answers.loglikelihoods, answers.gold)
    return JensenGap(
        per_token=float(answers.token_gap.sum() / answers.tokens.sum()),
        least=answers.least_gap,
        choice_level=float(gap.mean()),
    )


def _mistakes(answers: ChoiceAnswers, confidences: Floats) -> list[Mistake]:
    picked = answers.loglikelihoods.argmax(axis=1)
    order = np.argsort(-confidences, kind="stable")
    wrong = order[~answers.correct[order]][:MISTAKES]
    return [
        Mistake(
            task=answers.subjects[answers.strata[place]],
            doc_id=int(answers.doc_ids[place]),
            prompt=end_of_prompt(answers.prompts[place]),
            answer=answers.choices[place][picked[place]],
            target=answers.choices[place][answers.gold[place]],
            confidence=float(confidences[place]),
            choices=list(answers.choices[place]),
        )
        for place in wrong
    ]


def _notes(
    answers: ChoiceAnswers, metrics: Mapping[str, Estimate], own: OwnScores, fitted: CrossFitted | None
) -> list[str]:
    notes = []
    if "auroc" not in metrics:
        notes.append(
            f"All answers are {'right' if answers.correct.all() else 'wrong'}: confidence has nothing to rank."
        )
    if "acc_norm" in metrics:
        notes.append("acc_norm has no calibration error: its scores are no probabilities.")
    if fitted is None:
        notes.append("calibrated_nll is left out: a temperature needs other documents to be fitted on.")
    elif fitted.at_bound:
        notes.append(
            "A temperature was stopped by its bounds: the answers it was fitted on are all right, or like chance."
        )
    missing = [name for name in ("f1", "mcc") if name in answers.scored and name not in metrics]
    if missing and len(np.unique(answers.strata)) == 1:
        notes.append(f"{' and '.join(missing)}: lm-eval's value stands without an interval.")
    reported = own.values.get("acc")
    if reported is not None and abs(reported - float(answers.correct.mean())) > 1e-9:
        notes.append("acc counts all documents alike; lm-eval's own value counts all subjects alike.")
    return notes
