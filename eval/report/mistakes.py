"""The most confident mistakes as the report prints them, and how they shrink where the report would be too large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eval.analysis.schema import Mistake

MOST_BYTES = 10_000_000
"""Of one report file."""
CUTS = ((20, 2000), (20, 400), (5, 400), (0, 0))
"""(mistakes per task, characters of each text), tried in this order until the report is small enough."""


@dataclass(frozen=True)
class ShownMistake:
    """A wrong answer as text."""

    document: int
    prompt: str
    """Its end, where the question stands."""
    answer: str
    target: str
    choices: list[str]
    """Of multiple choice."""
    confidence: str


def shown_mistakes(mistakes: Sequence[Mistake], most: int, characters: int) -> list[ShownMistake]:
    """The first of them, each text with its last characters only where it has more."""
    return [
        ShownMistake(
            document=one.doc_id,
            prompt=ending(one.prompt, characters),
            answer=ending(one.answer, characters).strip() or "nothing",
            target=ending(one.target, characters).strip() or "nothing",
            choices=[ending(choice, characters).strip() for choice in one.choices],
            confidence=f"{100 * one.confidence:.1f} %".replace(" ", "\N{NO-BREAK SPACE}"),
        )
        for one in mistakes[:most]
    ]


def ending(text: str, characters: int) -> str:
    """The last characters, and how many were left out."""
    left_out = len(text) - characters
    return text if left_out <= 0 else f"[{left_out:,} characters left out] … {text[left_out:]}"


def cut_note(most: int, characters: int) -> str:
    """What is said in a report that was cut."""
    texts = f"at most {most} mistakes per task, {characters} characters of each text" if most else "no mistakes"
    limit = f"{MOST_BYTES // 1_000_000} MB"
    return f"This report would exceed {limit}: it shows {texts}. The samples files beside it have them all."
