"""Whose predictions are averaged: one model, or the members of an ensemble over masks.

Members are rows of one batch, so that the frozen weights are read once for all of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from eval.lm.average import Average
from pipeline.lora_dropout import LoraDropout
from pipeline.recipe.schema import Ensemble


class Members(Protocol):
    """N models in one, numbered 0 to N - 1."""

    @property
    def count(self) -> int:
        """N."""

    @property
    def average(self) -> Average:
        """What is averaged at every token."""

    @property
    def most_per_pass(self) -> int | None:
        """Members that can be rows of one batch; None: any number."""

    @property
    def rows_per_pass(self) -> int | None:
        """Most rows of one batch, all members counted; None: no such limit."""

    def active(self, numbers: range) -> AbstractContextManager[None]:
        """Inside, a batch is ``len(numbers)`` equal parts, one after another, and each member answers its part."""


@dataclass(frozen=True)
class OneModel:
    """The model as it is: the base, or an adapter without masks."""

    count: int = 1
    average: Average = "logits"
    most_per_pass: int | None = None
    rows_per_pass: int | None = None

    def active(self, numbers: range) -> AbstractContextManager[None]:
        """Nothing changes."""
        return nullcontext()


@dataclass(frozen=True)
class MaskedMembers:
    """The ensemble over masks."""

    dropout: LoraDropout
    ensemble: Ensemble
    most_per_pass: int | None = None

    @property
    def count(self) -> int:
        return self.ensemble.instances

    @property
    def average(self) -> Average:
        return self.ensemble.average

    @property
    def rows_per_pass(self) -> int | None:
        return self.ensemble.rows_per_pass

    def active(self, numbers: range) -> AbstractContextManager[None]:
        """Masks of these members; where they are balanced, each pass gets its part of the set of all N."""
        return self.dropout.members(numbers, balanced=self.ensemble.instances if self.ensemble.balanced else None)


def passes(members: Members, rows: int) -> list[range]:
    """Member numbers of each forward pass: as many members of ``rows`` rows each as fit, at least one."""
    limits = [members.count]
    if members.most_per_pass is not None:
        limits.append(members.most_per_pass)
    if members.rows_per_pass is not None:
        limits.append(max(1, members.rows_per_pass // rows))
    size = min(limits)
    return [range(first, min(first + size, members.count)) for first in range(0, members.count, size)]
