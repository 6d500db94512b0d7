"""How requests for log-likelihoods are laid out in forward passes, so that shared tokens are computed once.

Requests with one context (the choices of a question) are one row: the context, then each continuation as a branch that
sees the context and itself, but no other branch. Rows that begin alike (the questions of a subject, after the same
examples) are one group: the beginning is computed once and kept as keys and values. Pure planning: no model here.

    group prefix │ context                 │ branch 1   │ branch 2
    examples ... │ Question ... Answer:    │ choice one │ another choice
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LEAST_PREFIX = 8
"""Tokens that a shared beginning must have to be kept."""
BRANCH_TOKENS = 128
"""A row with branches may always have so many tokens in them, and more after a long context. Attention looks at all
pairs of a row's tokens, so long branches after a short context (whole texts after the first token) cost more together
than apart."""


@dataclass(frozen=True)
class Request:
    """One continuation after one context, both as token ids; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.context) + len(self.continuation) - 1


@dataclass
class Row:
    """A context with the continuations that are asked of it."""

    context: tuple[int, ...]
    continuations: list[tuple[int, ...]] = field(default_factory=list)
    requests: list[list[int]] = field(default_factory=list)
    """For each continuation, the indices of the requests that ask for it."""

    @property
    def branch_tokens(self) -> int:
        """Read after the context: all tokens of the continuations but the last of each."""
        return sum(len(continuation) - 1 for continuation in self.continuations)

    def takes(self, continuation: tuple[int, ...]) -> bool:
        """Whether another branch is better put here than into a row of its own."""
        tokens = self.branch_tokens + len(continuation) - 1
        return not self.continuations or tokens <= max(BRANCH_TOKENS, 2 * len(self.context))

    def new_tokens(self, prefix: int) -> int:
        """Tokens to run when the first ``prefix`` ones are kept."""
        return len(self.context) - prefix + self.branch_tokens


@dataclass
class Group:
    """Rows that share their first ``prefix`` tokens; 0 where nothing is shared."""

    prefix: int
    rows: list[Row]


def truncated(context: Sequence[int], continuation: Sequence[int], max_length: int) -> tuple[Request, int]:
    """As lm-eval cuts it, from the left, and by how many tokens."""
    excess = max(0, len(context) + len(continuation) - (max_length + 1))
    return Request(tuple(context[excess:]), tuple(continuation)), excess


def rows_of(requests: Sequence[Request]) -> list[Row]:
    """Requests gathered by context, equal ones once; a context with long continuations has several rows."""
    rows: list[Row] = []
    newest: dict[tuple[int, ...], Row] = {}
    asking: dict[Request, list[int]] = {}
    for index, request in enumerate(requests):
        if request in asking:
            asking[request].append(index)
            continue
        asking[request] = [index]
        row = newest.get(request.context)
        if row is None or not row.takes(request.continuation):
            row = newest[request.context] = Row(request.context)
            rows.append(row)
        row.continuations.append(request.continuation)
        row.requests.append(asking[request])
    return rows


def separate_rows(requests: Sequence[Request]) -> list[Row]:
    """A row for each request, but for continuations of one token, which need no branch: for models where a branch
    cannot be hidden from the others."""
    rows = []
    for row in rows_of(requests):
        single = [at for at, continuation in enumerate(row.continuations) if len(continuation) == 1]
        if single:
            at_once = Row(row.context)
            at_once.continuations = [row.continuations[at] for at in single]
            at_once.requests = [row.requests[at] for at in single]
            rows.append(at_once)
        for at, continuation in enumerate(row.continuations):
            if len(continuation) > 1:
                rows.append(Row(row.context, [continuation], [row.requests[at]]))
    return rows


def groups_of(rows: list[Row], least_saving: int) -> list[Group]:
    """Rows gathered by the beginnings that save most; a row belongs to one group.

    The contexts, sorted, form a tree of common beginnings; a beginning of P tokens that R rows share saves (R - 1) P.
    Bottom-up, each node of the tree is kept whole if that saves more than its parts.

    Args:
        rows: of any contexts.
        least_saving: in tokens; a beginning that saves less is not worth a forward pass of its own.
    """
    if not rows:
        return []
    encoded = [np.array(row.context, dtype=">u4") for row in rows]  # big-endian: bytes sort as tokens do
    order = sorted(range(len(rows)), key=lambda at: encoded[at].tobytes())
    contexts = [encoded[at] for at in order]
    shared = [_common(left, right) for left, right in itertools.pairwise(contexts)]
    chosen = _best_beginnings(shared, [len(context) for context in contexts], least_saving)
    taken = {place for _, first, end in chosen for place in range(first, end)}
    groups = [Group(prefix, [rows[order[place]] for place in range(first, end)]) for prefix, first, end in chosen]
    rest = [rows[order[place]] for place in range(len(rows)) if place not in taken]
    return groups + ([Group(0, rest)] if rest else [])


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """Length of the common beginning."""
    length = min(len(left), len(right))
    differ = left[:length] != right[:length]
    return int(differ.argmax()) if differ.any() else length


@dataclass
class _Node:
    """Contexts ``first`` to ``end`` of the sorted ones, which share ``depth`` tokens."""

    depth: int
    first: int
    saving: int = 0
    """Of the best parts found below it."""
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    """(prefix, first, end) of each."""


def _best_beginnings(shared: list[int], lengths: list[int], least_saving: int) -> list[tuple[int, int, int]]:
    """(prefix, first, end) of the chosen groups: the intervals of the tree of common beginnings, closed bottom-up."""

    def closed(node: _Node, end: int) -> _Node:
        # At least the context's last token is run: it predicts the first token of the continuation.
        prefix = min(node.depth, min(lengths[node.first : end]) - 1)
        saving = (end - node.first - 1) * prefix
        if prefix >= LEAST_PREFIX and saving >= max(least_saving, node.saving):
            return _Node(node.depth, node.first, saving, [(prefix, node.first, end)])
        return node

    stack = [_Node(0, 0)]
    for place, depth in enumerate([*shared, 0]):
        below: _Node | None = None
        while depth < stack[-1].depth:
            node = closed(stack.pop(), place + 1)
            if depth <= stack[-1].depth:
                stack[-1].saving += node.saving
                stack[-1].parts += node.parts
                below = None
            else:
                below = node
        if depth > stack[-1].depth:
            first = below.first if below else place
            stack.append(_Node(depth, first, below.saving if below else 0, below.parts if below else []))
    return closed(stack[0], len(lengths)).parts


def batches_of(group: Group, tokens: int, most_rows: int, scored: int, whole: bool = False) -> list[list[Row]]:
    """Rows of a group in batches, longest first, so that a batch that does not fit in memory shows at once.

    Args:
        group: whose prefix is kept.
        tokens: that a batch may have, padding counted; a longer row is a batch by itself.
        most_rows: of a batch.
        scored: places, padding counted, whose logits a batch may ask for.
        whole: logits come for all tokens.
    """
    batches: list[list[Row]] = []
    longest = columns = 0
    for row in sorted(group.rows, key=lambda row: (-row.new_tokens(group.prefix), row.context, row.continuations)):
        new = row.new_tokens(group.prefix)
        asked = new if whole else 1 + row.branch_tokens
        rows = len(batches[-1]) + 1 if batches else 1
        if not batches or rows > most_rows or rows * longest > tokens or rows * max(columns, asked) > scored:
            batches.append([])
            longest, columns = new, asked
        columns = max(columns, asked)
        batches[-1].append(row)
    return batches
