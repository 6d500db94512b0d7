"""Requests that have no score, and how the user is told which."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from lm_eval.api.instance import Instance
from transformers import LogitsProcessor

from pipeline.errors import UserError


class NotFinite(ArithmeticError):
    """A score is NaN or infinite."""

    def __init__(self, request: int) -> None:
        """``request``: its index."""
        self.request = request
        super().__init__(f"request {request} has a score that is not finite")


class TooLong(ValueError):
    """A continuation is longer than the base's context."""

    def __init__(self, request: int, tokens: int) -> None:
        """``request``: its index; ``tokens``: of its continuation."""
        self.request, self.tokens = request, tokens
        super().__init__(f"request {request} has a continuation of {tokens} tokens")


class FiniteScores(LogitsProcessor):
    """Changes nothing, and stops generation where the model's scores choose no token: greedy search would take one.

    A score of minus infinity is a token that is ruled out.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``(B, V)`` to the same.

        Raises:
            NotFinite: with the row.
        """
        broken = (scores.isnan() | scores.isposinf()).any(dim=-1)
        if broken.any():
            raise NotFinite(int(broken.nonzero()[0]))
        return scores


def check_finite(requests: Sequence[Instance], scores: Sequence[float]) -> None:
    """One score for each request.

    Raises:
        UserError: one is NaN or infinite.
    """
    for request, score in zip(requests, scores, strict=True):
        if not math.isfinite(score):
            raise not_finite(request)


def not_finite(request: Instance) -> UserError:
    """Which request, and what to look at."""
    text = request.args[0]
    shown = text if len(text) <= 120 else f"... {text[-120:]}"
    return UserError(
        f"task {request.task_name}, document {request.doc_id}: the model's score is not a finite number (NaN or "
        f"infinite logits), so nothing was scored.\nThe text ends in {shown!r}.\n"
        "Weights that are not finite or that overflow in their type are the usual reason: try base.dtype=float32 or "
        "bfloat16, and look at the training's loss."
    )


def too_long(request: Instance, tokens: int, most: int) -> UserError:
    """Of a continuation, which lm-eval never cuts."""
    return UserError(
        f"task {request.task_name}, document {request.doc_id}: a text to be scored has {tokens} tokens, but the base's "
        f"context is {most}, and only what comes before it may be cut.\nIt begins with {request.args[1][:120]!r}.\n"
        "Leave the document out of the task, or take a base with a longer context."
    )
