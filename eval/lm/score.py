"""Log-likelihoods of continuations, with shared tokens computed once (mode ``fast``).

``layout.py`` says which tokens share a forward pass; this file runs the passes and reads the scores, in float32.

Legend: N members, n members of one pass, B rows, T new tokens of a row, P kept tokens before them, K last columns whose
logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import Cache, DynamicCache, PreTrainedModel

from eval.lm.attention import has_length_dependent_rope, why_separate
from eval.lm.average import RunningLogprobs
from eval.lm.faults import NotFinite
from eval.lm.layout import Group, Request, Row, batches_of, groups_of, rows_of, separate_rows
from eval.lm.members import Members, passes
from eval.lm.tensors import Batch, Kept, KeptPrefix, batch_of, mask_of, states

LEAST_SAVING = 256
"""Tokens that keeping a beginning must save: about what reading the weights for one more pass costs."""
LOGITS_BYTES = 512 * 2**20
"""Of one pass, in float32, at most (a longer single row takes what it needs)."""


@dataclass(frozen=True)
class Scored:
    """The scores of one request."""

    running: list[float]
    """``(N,)`` log-likelihood in nats under the average of the first 1..N members."""
    members: list[float]
    """``(N,)`` under each member alone."""
    greedy: bool
    least_gap: float
    """Smallest Jensen gap of any token, nats."""


class Scorer:
    """Scores requests with a causal language model, over the members of an ensemble."""

    def __init__(self, model: PeftModel | PreTrainedModel, members: Members, tokens_per_pass: int) -> None:
        """Args: ``model`` in eval mode on its device; ``tokens_per_pass``: new tokens of one pass, all members
        counted."""
        self.model = model
        self.members = members
        self.tokens_per_pass = tokens_per_pass
        self.device = model.device
        self.separate: str | None = None
        """Why tokens of the latest requests could not be shared, in words; None where they were."""
        self._most_members = members.count  # of one pass; falls when memory is short
        self._active: range | None = None
        self._mask_context = ExitStack()

    def plan(self, requests: Sequence[Request]) -> list[tuple[Group, list[list[Row]]]]:
        """All forward passes, as groups of batches; equal for equal requests."""
        if not requests:
            return []
        self.separate = why_separate(self.model, max(request.length for request in requests))
        tokens = max(1, self.tokens_per_pass // self.members.count)
        scored = max(1, LOGITS_BYTES // (4 * self.model.config.get_text_config().vocab_size * self.members.count))
        rows = self.members.rows_per_pass or len(requests)
        if self.separate is None:
            groups = groups_of(rows_of(requests), LEAST_SAVING)
            return [(group, batches_of(group, tokens, rows, scored)) for group in groups]
        if has_length_dependent_rope(self.model):
            rows = 1  # a longer row beside it would change a row's scores
        group = Group(0, separate_rows(requests))
        return [(group, batches_of(group, tokens, rows, scored, whole=True))]

    def scores(
        self, requests: Sequence[Request], finished: frozenset[int] = frozenset()
    ) -> Iterator[dict[int, Scored]]:
        """The scores of each batch, by index of the request.

        Batches are those of all requests, whichever are finished: what a request shares a batch with, and so its last
        bits, does not depend on when an evaluation was ended. A batch is skipped where all its requests are finished.

        Raises:
            NotFinite: a score is NaN or infinite.
            torch.OutOfMemoryError: one row of one member does not fit.
        """
        if len(finished) == len(requests):
            return
        try:
            for group, batches in self.plan(requests):
                todo = [batch for batch in batches if not _indices(batch) <= finished]
                kept: Kept | None = None  # the former group's is let go before the next is computed
                kept = self._kept(group) if group.prefix and todo else None
                prefix = group.prefix if kept else 0
                for batch in todo:
                    yield self._scored(batch, prefix, kept)
        finally:
            self._deactivate()

    @torch.no_grad()
    def _kept(self, group: Group) -> Kept | None:
        """The prefix in every member; None where it does not fit: rows are then run whole."""
        tokens = torch.tensor([group.rows[0].context[: group.prefix]], device=self.device)
        parts: list[Kept] = []
        try:
            for numbers in self._passes(1, group.prefix):
                cache = DynamicCache(config=self.model.config)
                self._activate(numbers)
                rows = tokens.repeat(len(numbers), 1)
                self.model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
                parts.append(states(cache))
        except torch.OutOfMemoryError:
            return None
        return [
            (torch.cat([keys for keys, _ in layers]), torch.cat([values for _, values in layers]))
            for layers in zip(*parts, strict=True)
        ]

    def _scored(self, rows: list[Row], prefix: int, kept: Kept | None) -> dict[int, Scored]:
        """The scores of a batch, in smaller passes where memory is short."""
        try:
            return self._batch_scores(rows, prefix, kept)
        except torch.OutOfMemoryError:
            if len(rows) == 1 and self._most_members == 1:
                raise
        # Outside the handler, whose traceback would keep the failed pass's tensors.
        if self._most_members > 1:
            self._most_members = -(-self._most_members // 2)
            return self._scored(rows, prefix, kept)
        half = len(rows) // 2
        return self._scored(rows[:half], prefix, kept) | self._scored(rows[half:], prefix, kept)

    @torch.no_grad()
    def _batch_scores(self, rows: list[Row], prefix: int, kept: Kept | None) -> dict[int, Scored]:
        """The scores of a batch."""
        batch = batch_of(rows, prefix, self.device, left=self.separate is not None)
        average = RunningLogprobs(self.members.average, batch.place, batch.token)
        for numbers in self._passes(len(rows), batch.tokens.shape[1]):
            logits = self._logits(batch, numbers, kept)  # (n*B, K, V)
            for member in logits.unflatten(0, (len(numbers), -1)):
                average.add(member[batch.places[:, 0], batch.places[:, 1]][None])
        return _by_request(rows, batch.owner, average)

    def _logits(self, batch: Batch, numbers: range, kept: Kept | None) -> torch.Tensor:
        """``(n*B, K, V)`` in the model's dtype, member-major."""
        self._activate(numbers)
        n = len(numbers)
        tokens = batch.tokens.repeat(n, 1)
        if self.separate:
            return self.model(input_ids=tokens).logits
        cache = None
        if kept is not None:
            members = slice(numbers.start, numbers.stop)
            cache = Cache(layers=[KeptPrefix(keys[members], values[members]) for keys, values in kept])
        return self.model(
            input_ids=tokens,
            attention_mask=mask_of(batch, n, self.model),
            position_ids=batch.positions.repeat(n, 1),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=batch.columns,
        ).logits

    def _passes(self, rows: int, tokens: int) -> list[range]:
        """Members of each pass over ``rows`` rows of ``tokens`` new tokens."""
        most = max(1, min(self._most_members, self.tokens_per_pass // (rows * tokens)))
        return [
            range(first, min(first + most, part.stop))
            for part in passes(self.members, rows)
            for first in range(part.start, part.stop, most)
        ]

    def _activate(self, numbers: range) -> None:
        """Masks of these members, kept on from pass to pass: drawing them costs as much as some tokens."""
        if numbers != self._active:
            self._deactivate()
            self._mask_context.enter_context(self.members.active(numbers))
            self._active = numbers

    def _deactivate(self) -> None:
        self._mask_context.close()
        self._active = None


def _indices(batch: Sequence[Row]) -> frozenset[int]:
    """Of all requests of a batch."""
    return frozenset(index for row in batch for asked in row.requests for index in asked)


def _by_request(rows: Sequence[Row], owner: torch.Tensor, average: RunningLogprobs) -> dict[int, Scored]:
    """Sums over each continuation's tokens, in float64, for every request that asks for it."""
    running, each = average.running.cpu().double(), average.each.cpu().double()  # (N, Q)
    asked = [requests for row in rows for requests in row.requests]
    sums = [torch.zeros(len(part), len(asked)).double().index_add_(1, owner, part) for part in (running, each)]
    gaps = torch.full((len(asked),), torch.inf, dtype=torch.double)
    gaps.scatter_reduce_(0, owner, running[-1] - each.mean(dim=0), "amin")
    greedy = torch.ones(len(asked)).scatter_reduce_(0, owner, average.greedy().cpu().float(), "amin").bool()
    found: dict[int, Scored] = {}
    for at, requests in enumerate(asked):
        if not (sums[0][:, at].isfinite().all() and sums[1][:, at].isfinite().all()):
            raise NotFinite(requests[0])
        scored = Scored(sums[0][:, at].tolist(), sums[1][:, at].tolist(), bool(greedy[at]), float(gaps[at]))
        found |= dict.fromkeys(requests, scored)
    return found
