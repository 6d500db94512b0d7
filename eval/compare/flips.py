"""Documents on which right and wrong changed places, with their texts.

Legend: D documents, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import softmax

from eval.analysis.answers import Answers, ChoiceAnswers, GeneratedAnswers, RollingAnswers
from eval.analysis.samples import Bools, Floats
from eval.compare.schema import Flip, Flips

MOST = 20
"""Of each direction, with text; the counts are of all."""
MOST_IN_ALL = 4000
"""So that the page stays far below 10 MB."""
MOST_CHARACTERS = 600
"""Of a prompt, whose end is the question, and of an answer, whose beginning is kept."""


def right_answers(answers: Answers, metric: str) -> Bools | None:
    """``(D,)`` which documents were answered right.

    Args:
        answers: of one run.
        metric: the primary one; of several filters of a generated text it names the one that counts.

    Returns:
        None where answers are not right or wrong.
    """
    if isinstance(answers, ChoiceAnswers):
        return answers.correct
    if isinstance(answers, GeneratedAnswers):
        _, _, filtered = metric.partition(",")
        return answers.correct.get(filtered) if filtered else next(iter(answers.correct.values()), None)
    return answers.greedy if isinstance(answers, RollingAnswers) else None


def shown_of(tests: int) -> int:
    """With text, of each direction of one test of so many."""
    return max(1, min(MOST, MOST_IN_ALL // (2 * max(tests, 1))))


def flips(first: Answers, second: Answers, metric: str, task_of: Sequence[str], most: int) -> Flips | None:
    """Counts and texts, from the first run to the second.

    Args:
        first, second: on the same documents, in the same order.
        metric: the primary one.
        task_of: ``(D,)`` names: of a group, the part that a document is from.
        most: of each direction, with text.

    Returns:
        None where answers are not right or wrong.
    """
    was, now = right_answers(first, metric), right_answers(second, metric)
    if was is None or now is None:
        return None
    confidences = confidence_of(first, metric), confidence_of(second, metric)
    answers = answer_texts(first, metric), answer_texts(second, metric)
    order = np.argsort(-np.nan_to_num(confidences[1], nan=-1.0), kind="stable")

    def told(changed: Bools) -> list[Flip]:
        return [
            Flip(
                task=task_of[place],
                doc_id=int(first.doc_ids[place]),
                prompt=end_of(first.prompts[place]),
                target=target_text(first, place),
                first_answer=start_of(answers[0][place]),
                second_answer=start_of(answers[1][place]),
                first_confidence=known(confidences[0][place]),
                second_confidence=known(confidences[1][place]),
            )
            for place in order[changed[order]][:most]
        ]

    lost, gained = was & ~now, ~was & now
    return Flips(
        both_right=int((was & now).sum()),
        both_wrong=int((~was & ~now).sum()),
        right_to_wrong=int(lost.sum()),
        wrong_to_right=int(gained.sum()),
        lost=told(lost),
        gained=told(gained),
    )


def confidence_of(answers: Answers, metric: str) -> Floats:
    """``(D,)`` a run's probability of its own answer among the choices, or of the text's tokens (geometric mean)."""
    if isinstance(answers, ChoiceAnswers):
        found: Floats = softmax(answers.loglikelihoods, axis=1).max(axis=1)
        return found
    if isinstance(answers, GeneratedAnswers):
        return answers.confidence_length_normalised
    return np.full(len(answers.doc_ids), np.nan)


def answer_texts(answers: Answers, metric: str) -> Sequence[str]:
    """``(D,)`` what was answered."""
    if isinstance(answers, ChoiceAnswers):
        given = answers.loglikelihoods.argmax(axis=1)
        return [choices[place] for choices, place in zip(answers.choices, given, strict=True)]
    if isinstance(answers, GeneratedAnswers):
        return answers.texts
    right = right_answers(answers, metric)
    return [] if right is None else ["as expected" if one else "something else" for one in right]


def target_text(answers: Answers, place: int) -> str:
    """The right answer of one document."""
    if isinstance(answers, ChoiceAnswers):
        return start_of(answers.choices[place][int(answers.gold[place])])
    return start_of(answers.targets[place])


def known(value: float) -> float | None:
    """None for a NaN, which JSON has not."""
    return None if np.isnan(value) else float(value)


def end_of(text: str) -> str:
    """The last characters: few-shot examples stand before the question."""
    return text if len(text) <= MOST_CHARACTERS else "… " + text[-MOST_CHARACTERS:]


def start_of(text: str) -> str:
    """The first characters."""
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"
