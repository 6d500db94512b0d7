"""What the analyses of all kinds of tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.analysis.answers import Answers
from eval.analysis.estimates import Score, mean_of, point
from eval.analysis.schema import CurvePoint

MISTAKES = 20
PROMPT_CHARACTERS = 700
"""Of a mistake's prompt: its end, where the question is."""
SAME = 1e-9
"""Relative; two sums of the same numbers in another order."""


@dataclass(frozen=True)
class OwnScores:
    """What lm-eval itself found of a task or a group, by metric (of generation by ``metric,filter``)."""

    values: Mapping[str, float]
    higher_is_better: Mapping[str, bool | None]
    """By metric alone."""

    def direction(self, name: str) -> bool | None:
        """Of a metric, with or without its filter."""
        return self.higher_is_better.get(name.partition(",")[0])


def own_scores(answers: Answers, own: OwnScores, but: Sequence[str]) -> tuple[dict[str, Score], list[str]]:
    """lm-eval's other scores that are a mean over documents, and a note on those that are not."""
    found, notes = {}, []
    for name, values in answers.scores.items():
        if name in but or not np.isfinite(values).all():
            continue
        reported = own.values.get(name)
        if reported is not None and abs(values.mean() - reported) > SAME * (1 + abs(reported)):
            notes.append(f"{name} is no mean over documents: lm-eval's value stands without an interval.")
            continue
        found[name] = mean_of(values, own.direction(name))
    return found, notes


def totals_of(answers: Answers) -> dict[str, Any]:
    """The counts of a ``TaskAnalysis``."""
    return {
        "documents": len(answers.doc_ids),
        "clusters": len(np.unique(answers.clusters)),
        "strata": len(np.unique(answers.strata)),
    }


def curve_of(points: Sequence[tuple[Mapping[str, Score], float]], documents: int) -> list[CurvePoint]:
    """A curve from the scores and the ECE of the first 1..N members; scores without a value are left out."""
    curve = []
    for members, (scores, error) in enumerate(points, start=1):
        values = {**{name: point(score, documents) for name, score in scores.items()}, "ece": error}
        known = {name: value for name, value in values.items() if np.isfinite(value)}
        curve.append(CurvePoint(members=members, scores=known))
    return curve


def shared_notes(answers: Answers) -> list[str]:
    """Truncated prompts, and documents that depend on each other."""
    notes = []
    shortened = int((answers.truncated > 0).sum())
    if shortened:
        notes.append(
            f"{shortened:,} of {len(answers.doc_ids):,} prompts were longer than the model's context and lost their "
            f"beginning (up to {answers.truncated.max():,} tokens), as in lm-eval."
        )
    clusters = len(np.unique(answers.clusters))
    if clusters < len(answers.doc_ids):
        notes.append(
            f"{len(answers.doc_ids):,} documents share {clusters:,} texts: intervals draw whole texts; the band and "
            "the p-value of calibration errors, and the bars of bins, take documents as independent."
        )
    return notes


def end_of_prompt(prompt: str) -> str:
    """Its last characters; three dots mark what is left out."""
    return prompt if len(prompt) <= PROMPT_CHARACTERS else "... " + prompt[-PROMPT_CHARACTERS:]
