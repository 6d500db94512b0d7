"""The average of members' next-token scores, in float32 (equation 8 of arXiv 2404.09610).

``logits``: the mean of the logits; after a softmax, the members' normalised geometric mean.
``probabilities``: the logarithm of the mean of the members' softmax, which is normalised already.

Legend: N members, R places (token positions), V vocabulary, Q (place, token) pairs whose probability is wanted.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.nn import functional as F

Average = Literal["logits", "probabilities"]


class RunningAverage:
    """Average over the members added so far."""

    def __init__(self, average: Average) -> None:
        self.average = average
        self.members = 0
        self._total: torch.Tensor | None = None

    def add(self, logits: torch.Tensor) -> None:
        """Add n members: ``(n, ..., V)`` logits of any float dtype."""
        for member in logits:  # one by one: a float32 copy of all n would double the largest tensor there is
            self._add_one(member.float())

    def _add_one(self, scores: torch.Tensor) -> None:
        """One member's ``(..., V)`` float32 logits."""
        if self.average == "probabilities":
            scores = F.log_softmax(scores, dim=-1)
        if self._total is None:
            self._total = scores.clone()
        elif self.average == "logits":
            self._total += scores
        else:
            torch.logaddexp(self._total, scores, out=self._total)
        self.members += 1

    def value(self) -> torch.Tensor:
        """``(..., V)`` float32: mean logits, or the logarithm of mean probabilities.

        Raises:
            ValueError: no member was added.
        """
        if self._total is None:
            raise ValueError("no member was added to the average")
        if self.average == "logits":
            return self._total / self.members
        return self._total - math.log(self.members)


class RunningLogprobs(RunningAverage):
    """Log-probabilities of given tokens under each member, and under the average of the first 1, 2, ... members."""

    def __init__(self, average: Average, places: torch.Tensor, tokens: torch.Tensor) -> None:
        """Args: ``places`` and ``tokens``, both ``(Q,)``: which of the R places, which token there."""
        super().__init__(average)
        self._places = places
        self._tokens = tokens
        self._running: list[torch.Tensor] = []
        self._members: list[torch.Tensor] = []

    def _add_one(self, scores: torch.Tensor) -> None:
        """One member's ``(R, V)`` float32 logits."""
        super()._add_one(scores)
        self._members.append(self._logprobs(scores))
        self._running.append(self._members[-1] if self.members == 1 else self._logprobs(self.value()))

    def _logprobs(self, scores: torch.Tensor) -> torch.Tensor:
        """``(Q,)`` from ``(R, V)`` scores before or after a softmax."""
        return scores[self._places, self._tokens] - scores.logsumexp(dim=-1)[self._places]

    @property
    def running(self) -> torch.Tensor:
        """``(N, Q)`` float32, nats, under the average of the first 1..N members."""
        return torch.stack(self._running)

    @property
    def each(self) -> torch.Tensor:
        """``(N, Q)`` float32, nats, under each member alone."""
        return torch.stack(self._members)

    def greedy(self) -> torch.Tensor:
        """``(Q,)`` bool: whether the token is the most probable one of its place under the whole average."""
        return self.value().argmax(dim=-1)[self._places] == self._tokens
