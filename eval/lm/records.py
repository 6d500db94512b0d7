"""What one run keeps of every request beside lm-eval's own answer, so that a whole curve comes out of it.

Legend: N members, T scored or generated tokens.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoredRecord:
    """A request for a log-likelihood. One model is an ensemble of one: N = 1."""

    running: list[float]
    """``(N,)`` log-likelihood of the continuation, in nats, under the average of the first 1..N members; the last one
    is the answer."""
    members: list[float]
    """``(N,)`` under each member alone."""
    greedy: bool
    """Whether the continuation is what greedy decoding of the whole ensemble would write."""
    tokens: int
    """T, of the continuation."""
    truncated: int
    """Tokens that the prompt lost on its left for the model's context."""
    least_gap: float
    """The smallest Jensen gap of any token, mean over members of its loss minus the ensemble's loss, in nats."""

    def followed_by(self, other: ScoredRecord) -> ScoredRecord:
        """Of both continuations together, e.g. two windows of one text."""
        return ScoredRecord(
            running=[a + b for a, b in zip(self.running, other.running, strict=True)],
            members=[a + b for a, b in zip(self.members, other.members, strict=True)],
            greedy=self.greedy and other.greedy,
            tokens=self.tokens + other.tokens,
            truncated=self.truncated + other.truncated,
            least_gap=min(self.least_gap, other.least_gap),
        )


@dataclass(frozen=True)
class GeneratedRecord:
    """A request for generated text, teacher-forced on the tokens that the whole ensemble chose."""

    text: str
    """lm-eval's answer: without stop strings."""
    running: list[float]
    """``(N,)`` log-probability of the T tokens, in nats, under the average of the first 1..N members."""
    members: list[float]
    """``(N,)`` under each member alone."""
    token_logprobs: list[float]
    """``(T,)`` in nats, under the whole ensemble, before temperature and other processors. T ends with the text: the
    tokens of stop strings and padding are left out, but for the one in which the text ends."""
    token_starts: list[int]
    """``(T,)`` character of ``text`` at which each token begins."""
    total_entropy: float
    """Mean over tokens of the entropy of the arithmetic mean of the members' distributions, in nats."""
    expected_entropy: float
    """Mean over tokens of the mean of the members' entropies, in nats."""
    truncated: int
    """Tokens that the prompt lost on its left."""


RequestRecord = ScoredRecord | GeneratedRecord
